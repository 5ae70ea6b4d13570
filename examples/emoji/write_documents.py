"""Writes pictures of emoji and their names as documents that read and draw them, and a task: which name does one have?

    apt-get install fonts-noto-color-emoji unicode-cldr-core
    python examples/emoji/write_documents.py --out data/emoji-documents

writes OUT/documents.jsonl, OUT/emoji.jsonl and the pictures of both, OUT/img. Pictures come from a colour font, names
from the annotations of the Unicode CLDR. Nothing is downloaded. All variants of a base emoji, and emoji that look the
same, are in the same split; emoji_base.py finds the base.

Files that have their content already are left alone, so that `mmscale data prepare` does not prepare them again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import PIL.Image
from emoji_base import base_of, has_skin_tone
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont, features

# The name comes last in DESCRIBE, so that everything before it is the question.
DESCRIBE = ("this is {}", "it shows {}", "the emoji is {}", "somebody sent {}")
DRAW = ("draw {}", "show me {}", "send {}", "a picture of {}")
CHOICES = 10  # names to choose from, one of them right
EDGE = 136  # edge of a picture [pixels]: the width of a glyph of Noto Color Emoji, which has this one size
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ANNOTATIONS = "/usr/share/unicode/cldr/common"
_FONT_SIZE = 109  # the bitmap font's only size
_FOLDERS = ("annotations", "annotationsDerived")  # derived: skin tones, flags, keycaps, sequences
_NOBODY = "\U0010fffd"  # a private-use character, which no font contains
_LAST = "\U0010ffff"  # sorts after every emoji, so that it never becomes the name of a group
_GET = "apt-get install fonts-noto-color-emoji unicode-cldr-core, or name unpacked copies with --font and --annotations"


class SourceError(Exception):
    """The font or the names are missing or damaged: one line of cause, and one of remedy."""

    def __init__(self, cause: str, *, remedy: str) -> None:
        super().__init__(f"{cause}\n  fix: {remedy}")


@dataclass(frozen=True)
class Settings:
    """What to write.

    Attributes:
        font: file of the colour font.
        annotations: folder with annotations/ and annotationsDerived/ of the CLDR.
        languages: of the names, file names of the CLDR.
        skin_tones: whether to include the variants of an emoji in five skin tones.
        limit: largest number of emoji, chosen by a hash; 0: all.
        held_out: share of base emoji for validation.
    """

    font: str = FONT
    annotations: str = ANNOTATIONS
    languages: tuple[str, ...] = ("en",)
    skin_tones: bool = False
    limit: int = 0
    held_out: float = 0.1


@dataclass(frozen=True)
class Emoji:
    """One emoji.

    Attributes:
        text: its code points.
        names: one for each language.
        group: the base that determines its split.
        held_out: whether it is for validation.
    """

    text: str
    names: tuple[str, ...]
    group: str
    held_out: bool

    @property
    def code(self) -> str:
        """Its code points as a part of names of files and documents."""
        return "-".join(f"{ord(point):x}" for point in self.text)


def number(purpose: str, text: str) -> int:
    """A number that depends on nothing but the arguments."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{text}".encode()).digest()[:8], "big")


# ------------------------------------------------------------------------------------------------------- documents


def document(emoji: Emoji, language: str, name: str, *, draws: bool) -> dict[str, Any]:
    """The document that describes an emoji in a language, or the one that draws it."""
    caption = {"type": "text", "text": _template(emoji, language, draws=draws).format(name)}
    image = {"type": "image", "path": f"img/{emoji.code}.png"}
    return {
        "id": f"emoji-{emoji.code}-{language}-{'draw' if draws else 'describe'}",
        "split": "validation" if emoji.held_out else "train",
        "content": [caption, image] if draws else [image, caption],
    }


def _template(emoji: Emoji, language: str, *, draws: bool) -> str:
    templates = DRAW if draws else DESCRIBE
    return templates[number(f"template {language}", emoji.text) % len(templates)]


def questions(found: Sequence[Emoji], language: str) -> list[dict[str, Any]]:
    """A question for every held-out base: which of ten names, all of held-out emoji, does the picture have?

    A model has not seen the emoji or a variant of it, but may know words of its name from others. Empty if fewer than
    ten bases are held out.
    """
    by_group: dict[str, Emoji] = {}
    for emoji in found:
        if emoji.held_out:
            by_group.setdefault(emoji.group, emoji)
    by_name = list({emoji.names[0]: emoji for emoji in by_group.values()}.values())
    if len(by_name) < CHOICES:
        return []
    asked = []
    for emoji in by_name:
        others = sorted(by_name, key=lambda other, own=emoji: number(own.text, other.text))  # type: ignore[misc]
        chosen = [emoji, *(other for other in others if other is not emoji)][:CHOICES]
        names = sorted(other.names[0] for other in chosen)
        text = _template(emoji, language, draws=False).removesuffix(" {}")
        content = [{"type": "image", "path": f"img/{emoji.code}.png"}, {"type": "text", "text": text}]
        own = {"choices": [f" {name}" for name in names], "answer": names.index(emoji.names[0])}
        asked.append({"id": f"emoji-{emoji.code}", "content": content} | own)
    return asked


# --------------------------------------------------------------------------------------------- pictures and names


def all_emoji(settings: Settings) -> dict[Emoji, NDArray[np.uint8]]:
    """Every emoji that the font draws and that has a name in every language, with its picture.

    The order is independent of what they show.

    Raises:
        SourceError: the font or the names are missing or damaged, or have nothing in common.
    """
    names = [_names(Path(settings.annotations), language) for language in settings.languages]
    font = _font(settings.font)
    nothing = bytes(font.getmask(_NOBODY))
    known = [text for text in names[0] if all(text in other for other in names)]
    known = sorted(known, key=lambda text: number("order", text))
    if not settings.skin_tones:
        known = [text for text in known if not has_skin_tone(text)]
    drawn: dict[str, NDArray[np.uint8]] = {}
    for text in known:
        if settings.limit and len(drawn) == settings.limit:
            break
        mask = font.getmask(text)  # a quick test: most annotated characters are not emoji
        # Wider: a sequence for which the font has no single glyph.
        if bytes(mask) not in (b"", nothing) and mask.size[0] <= EDGE:
            drawn[text] = picture(text, font)
    if not drawn:
        raise SourceError(
            f"{settings.font} draws none of the characters that {settings.annotations} names",
            remedy=f"name a font of emoji: {_GET}",
        )
    groups = _groups(drawn)
    return {
        Emoji(
            text,
            tuple(other[text] for other in names),
            groups[text],
            held_out=number("split", groups[text]) / 2**64 < settings.held_out,
        ): pixels
        for text, pixels in drawn.items()
    }


def _groups(drawn: dict[str, NDArray[np.uint8]]) -> dict[str, str]:
    """Emoji that must be in the same split: those of one base and those with equal pictures, joined transitively.

    The flags of Norway and of Bouvet Island look the same.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for text, pixels in drawn.items():
        one, other = root(base_of(text)), root(_LAST + hashlib.sha256(pixels.tobytes()).hexdigest())
        parent[max(one, other)] = min(one, other)
    return {text: root(base_of(text)) for text in drawn}


def picture(text: str, font: ImageFont.FreeTypeFont) -> NDArray[np.uint8]:
    """An emoji in the middle of a white square, uint8 [EDGE, EDGE, 3]."""
    canvas = PIL.Image.new("RGB", (EDGE, EDGE), "white")
    left, top, right, bottom = font.getbbox(text)
    corner = ((EDGE - left - right) // 2, (EDGE - top - bottom) // 2)
    ImageDraw.Draw(canvas).text(corner, text, font=font, embedded_color=True, fill="black")
    return np.asarray(canvas, dtype=np.uint8)


def _font(file: str) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise SourceError(
            "this Pillow cannot shape text (no Raqm), so that sequences of characters are drawn one by one",
            remedy="install Pillow's wheel from PyPI",
        )
    try:
        return ImageFont.truetype(file, _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise SourceError(f"the font {file} cannot be read: {error}", remedy=_GET) from error


def _names(annotations: Path, language: str) -> dict[str, str]:
    """Names of one language: the annotations that a screen reader says."""
    found: dict[str, str] = {}
    for file in [annotations / folder / f"{language}.xml" for folder in _FOLDERS]:
        try:
            # files of the system; and expat limits what entities may grow to
            entries = ElementTree.parse(file).getroot().iter("annotation")  # noqa: S314
        except (OSError, ElementTree.ParseError) as error:
            there = sorted(other.stem for other in file.parent.glob("??.xml")) if file.parent.is_dir() else []
            remedy = f"choose languages from {', '.join(there)}" if there and not file.exists() else _GET
            raise SourceError(f"the names in {file} cannot be read: {error}", remedy=remedy) from error
        found |= {
            entry.attrib["cp"]: entry.text.strip()
            for entry in entries
            if entry.get("type") == "tts" and entry.text and entry.text != "↑↑↑"  # the CLDR's "as in the parent"
        }
    return found


# ----------------------------------------------------------------------------------------------------------- files


def put(file: Path, content: bytes) -> None:
    """Write a file as a whole, unless it has this content already."""
    if file.is_file() and file.read_bytes() == content:
        return
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(file)


def lines(records: list[dict[str, Any]]) -> bytes:
    """Records as JSONL."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels [EDGE, EDGE, 3] as a PNG file."""
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(out: Path, settings: Settings) -> tuple[int, int]:
    """Write pictures, the task and the documents, in this order; the numbers of documents and of questions.

    Raises:
        SourceError: as for `all_emoji`; nothing has been written then.
    """
    found = all_emoji(settings)
    (out / "img").mkdir(parents=True, exist_ok=True)
    for emoji, pixels in found.items():
        put(out / f"img/{emoji.code}.png", png(pixels))
    records = [
        document(emoji, language, name, draws=draws)
        for emoji in found
        for language, name in zip(settings.languages, emoji.names, strict=True)
        for draws in (False, True)
    ]
    asked = questions(list(found), settings.languages[0])
    put(out / "emoji.jsonl", lines(asked))
    put(out / "documents.jsonl", lines(records))
    return len(records), len(asked)


def main(arguments: list[str]) -> int:
    """Write the files."""
    default = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. data/emoji-documents")
    parser.add_argument("--font", default=default.font, help="colour font; Debian: fonts-noto-color-emoji")
    parser.add_argument(
        "--annotations",
        default=default.annotations,
        help="folder with annotations/ and annotationsDerived/ of the Unicode CLDR; Debian: unicode-cldr-core",
    )
    parser.add_argument("--languages", nargs="+", default=default.languages, help="of the names (default en)")
    parser.add_argument("--skin-tones", action="store_true", help="include the variants in five skin tones")
    parser.add_argument("--limit", type=int, default=default.limit, help="largest number of emoji, for a trial")
    parser.add_argument("--held-out", type=float, default=default.held_out, help="share of base emoji (default 0.1)")
    asked = vars(parser.parse_args(arguments))
    out: Path = asked.pop("out")
    try:
        documents, task = write(out, Settings(**asked | {"languages": tuple(asked["languages"])}))
    except SourceError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{out}: {documents} documents, {task} questions\n")
    if not task:
        sys.stdout.write("too few bases are held out for a task: prepare with data.prepare.tasks={}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
