"""Renders open icon sets as documents that read and draw them, and a task: which of ten names does an icon have?

    npm install --prefix icon-sets --ignore-scripts $(python examples/icons/render.py --packages)
    python examples/icons/render.py icon-sets/node_modules/@iconify-json data/icons-documents

The second command writes OUT/documents/SET.parquet, OUT/which.jsonl with OUT/img, OUT/names.json and OUT/credits.md.
Needs resvg_py and pyarrow. A set that was written before is not rendered again.

An icon has a base name ("arrow left") and a style ("rounded, outline"), an ending of its name. All
icons of one base name, in all sets and styles, are held out or trained on together.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from mmscale import bounded

PACKAGES = bounded.read_object(Path(__file__).with_name("package.json"))["dependencies"]
_MOST_BYTES = 1 << 26  # of a file of a package
HELD_OUT = 5  # percent of the base names
CHOICES, QUESTIONS = 10, 500
_SIZE = re.compile(r"^\d+(px|x)?$")  # endings of names that say which size an icon was drawn for
# Endings that are styles in every set, also where its package does not list them.
_STYLES = (
    "fill",
    "filled",
    "line",
    "outline",
    "outlined",
    "solid",
    "bold",
    "thin",
    "light",
    "duotone",
    "sharp",
    "rounded",
)


def number(*words: str) -> int:
    """The same number for the same words, everywhere."""
    return int(hashlib.sha256("\0".join(words).encode()).hexdigest()[:8], 16)


@dataclass(frozen=True)
class Icon:
    """An icon of a set.

    Attributes:
        key: its name in the set.
        name: base name in words.
        style: in words; empty: the set has none.
        svg: the picture.
    """

    key: str
    name: str
    style: str
    svg: str

    @property
    def split(self) -> str:
        """Decided by the base name alone."""
        return "validation" if number("split", self.name) % 100 < HELD_OUT else "train"


def icons(folder: Path) -> Iterator[Icon]:
    """The icons of one package that are not hidden; of one in several sizes the first, and no aliases."""
    content = bounded.read_object(folder / "icons.json", most=_MOST_BYTES)
    about = folder / "metadata.json"
    listed = bounded.read_object(about, most=_MOST_BYTES).get("suffixes", {}) if about.is_file() else {}
    endings = sorted((one for one in {*listed, *_STYLES} if one), key=lambda one: (-len(one), one))
    seen = set()
    for key, icon in sorted(content["icons"].items()):
        ending = next((one for one in endings if key.endswith(f"-{one}")), "")
        words = [word for word in key.removesuffix(f"-{ending}").split("-") if word]
        while len(words) > 1 and _SIZE.match(words[-1]):
            words.pop()
        name = " ".join(words)
        style = " ".join(word for word in ending.split("-") if not _SIZE.match(word))
        if icon.get("hidden") or not words or (name, style) in seen:
            continue
        seen.add((name, style))
        left, top, width, height = (
            icon.get(what, content.get(what, default)) for what, default in (("left", 0), ("top", 0), *_SQUARE)
        )
        box = f"{left} {top} {width} {height}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{width}" height="{height}">'
        yield Icon(key, name, style, f"{svg}{icon['body']}</svg>")


_SQUARE = (("width", 16), ("height", 16))


def render(icon: Icon, edge: int) -> bytes:
    """A PNG of edge x edge pixels on white, black where the icon has no colour of its own."""
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_string=icon.svg, width=edge, background="#ffffff", skip_system_fonts=True)
    with PIL.Image.open(io.BytesIO(bytes(drawn))) as opened:
        picture = opened.convert("RGB")
    if picture.size != (edge, edge):
        picture.thumbnail((edge, edge), PIL.Image.Resampling.LANCZOS)
        square = PIL.Image.new("RGB", (edge, edge), "white")
        square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
        picture = square
    written = io.BytesIO()
    picture.save(written, "PNG")
    return written.getvalue()


_CONTENT = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string()), ("bytes", pa.binary())]))
_SCHEMA = pa.schema([("id", pa.string()), ("group", pa.string()), ("split", pa.string()), ("content", _CONTENT)])


def write_set(folder: Path, out: Path, edge: int) -> tuple[str, int, int]:
    """Render one package; returns its name, how many icons it has, and how many could not be drawn."""
    prefix, file = folder.name, out / "documents" / f"{folder.name}.parquet"
    if file.exists():
        return prefix, pq.read_metadata(file).num_rows // 2, 0
    label = bounded.read_object(folder / "info.json")["name"].lower()
    rows: list[dict[str, Any]] = []
    failed = 0
    for icon in icons(folder):
        try:
            image = {"type": "image", "bytes": render(icon, edge)}
        except (ValueError, OSError):
            failed += 1
            continue
        about = ", ".join([icon.name, label, *([icon.style] if icon.style else [])])
        own = {"group": icon.name, "split": icon.split}
        reads = [image, {"type": "text", "text": f"this icon is {about}"}]
        draws = [{"type": "text", "text": f"draw {about}"}, image]
        rows.append({"id": f"{prefix}:{icon.key} read", "content": reads} | own)
        rows.append({"id": f"{prefix}:{icon.key} draw", "content": draws} | own)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary, row_group_size=1024)
    temporary.replace(file)
    return prefix, len(rows) // 2, failed


def write_questions(out: Path) -> int:
    """Which of ten names does a held-out icon have? One question for a base name, of at most `QUESTIONS` of them."""
    shown: dict[str, bytes] = {}
    for file in sorted((out / "documents").glob("*.parquet")):
        for row in pq.read_table(file, filters=[("split", "=", "validation")]).to_pylist():
            if row["id"].endswith(" read"):
                shown.setdefault(row["group"], row["content"][0]["bytes"])
    names = sorted(shown, key=lambda name: number("question", name))
    (out / "img").mkdir(exist_ok=True)
    lines = []
    for place, name in enumerate(names[:QUESTIONS]):
        (out / f"img/{place}.png").write_bytes(shown[name])
        others = sorted((one for one in names if one != name), key=lambda other, own=name: number(own, other))
        choices = sorted([name, *others[: CHOICES - 1]])
        content = [{"type": "image", "path": f"img/{place}.png"}, {"type": "text", "text": "this icon is"}]
        answers = [f" {choice}," for choice in choices]
        lines.append({"id": name, "content": content, "choices": answers, "answer": choices.index(name)})
    (out / "which.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def write_credits(packages: list[Path], out: Path) -> None:
    """Authors and licences of the sets, as each package states them."""
    rows = []
    for folder in packages:
        info = bounded.read_object(folder / "info.json")
        version = bounded.read_object(folder / "package.json")["version"]
        licence, author = info["license"], info["author"]
        rows.append(
            f"| {info['name']} | `@iconify-json/{folder.name}` {version} | {info['total']:,} | {author['name']} | "
            f"{licence.get('spdx', licence['title'])} |"
        )
    head = "| set | package | icons | author | licence |\n|---|---|---|---|---|\n"
    (out / "credits.md").write_text(head + "\n".join(rows) + "\n")


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description="Render icon sets as documents.")
    parser.add_argument("--packages", action="store_true", help="print the packages and their versions for npm")
    parser.add_argument("--size", type=int, default=32, help="edge of the pictures [pixels]")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("sets", nargs="?", type=Path, help="folder @iconify-json of the packages")
    parser.add_argument("out", nargs="?", type=Path, help="folder of the documents")
    given = parser.parse_args()
    if given.packages:
        sys.stdout.write(" ".join(f"{name}@{version}" for name, version in PACKAGES.items()) + "\n")
        return
    if given.sets is None or given.out is None:
        parser.error("the folders are missing")
    packages = [given.sets / name.partition("/")[2] for name in sorted(PACKAGES)]
    missing = [folder for folder in packages if not (folder / "icons.json").is_file()]
    if missing:
        parser.error(f"{missing[0]} is missing: run npm as this file's first lines say")
    total = 0
    with ProcessPoolExecutor(given.workers) as pool:
        for prefix, count, failed in pool.map(partial(write_set, out=given.out, edge=given.size), packages):
            more = f", {failed} cannot be drawn" if failed else ""
            sys.stdout.write(f"{prefix}: {count} icons{more}\n")
            sys.stdout.flush()
            total += count
    write_credits(packages, given.out)
    asked = write_questions(given.out)
    sys.stdout.write(f"{given.out}: {total} icons, {2 * total} documents, {asked} questions\n")


if __name__ == "__main__":
    main()
