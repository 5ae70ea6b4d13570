# examples/emoji: bases, the split, the documents and the questions. Most tests use a font that matplotlib brings; those
# with Debian's packages are skipped where these are missing (MMSCALE_EMOJI_ROOT: unpacked).
"""Tests of emoji as documents."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import pytest

from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.inspect_set import summary
from mmscale.data.prepared.manifest import Task
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.tasks import read_task
from tests.digits import program
from tests.unit.data.samples import config, files_of

PROGRAM = program("emoji/write_documents")
DEJAVU = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # black symbols, some emoji among them
ROOT = Path(os.environ.get("MMSCALE_EMOJI_ROOT", "/"))
NOTO, CLDR = ROOT / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", ROOT / "usr/share/unicode/cldr/common"
needs_packages = pytest.mark.skipif(
    not (NOTO.exists() and CLDR.exists()), reason="fonts-noto-color-emoji and unicode-cldr-core are not installed"
)


def annotations(folder: Path, names: dict[str, str], *, language: str = "en", derived: str = "") -> Path:
    """Files as the CLDR has them."""
    for part, content in (("annotations", names), ("annotationsDerived", {})):
        (folder / part).mkdir(parents=True, exist_ok=True)
        entries = "".join(
            f'<annotation cp="{text}">word | other</annotation><annotation cp="{text}" type="tts">{name}</annotation>'
            for text, name in content.items()
        )
        file = folder / part / f"{language}.xml"
        file.write_text(f"<?xml version='1.0'?><ldml><annotations>{entries}{derived}</annotations></ldml>")
    return folder


def symbols(folder: Path, *, languages: tuple[str, ...] = ("en",)) -> list[str]:
    """The 64 zodiac, chess, card and weather symbols from U+2600 on, which DejaVu has, and one that no font has."""
    for language in languages:
        names = {chr(0x2600 + number): f"{language} symbol number {number}" for number in range(64)}
        annotations(folder, names | {"\U000e0fff": "nothing"}, language=language)
    return ["--font", str(DEJAVU), "--annotations", str(folder), "--languages", *languages]


def written(out: Path, arguments: list[str], held_out: float = 0.25) -> list[dict[str, Any]]:
    """The documents."""
    assert PROGRAM.main(["--out", str(out), "--held-out", str(held_out), *arguments]) == 0
    return records(out / "documents.jsonl")


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def picture(folder: Path, record: dict[str, Any]) -> Path:
    (found,) = [folder / piece["path"] for piece in record["content"] if piece["type"] == "image"]
    return Path(found)


@pytest.mark.parametrize(
    ("variants", "base"),
    [
        ("👋 👋🏻 👋🏿", "👋"),
        ("🏃 🏃🏽 🏃‍♀️ 🏃🏽‍♂️ 🏃‍♂", "🏃"),
        ("🧑 👨 👩 👩🏿 👨‍🦰 👩🏽‍🦲", "🧑"),
        ("🧑‍🚒 👩‍🚒 👨🏻‍🚒", "🧑\u200d🚒"),
        ("👫 👬 👭 👩🏻‍🤝‍👨🏿 🧑‍🤝‍🧑", "👫"),
        ("💏 👩‍❤️‍💋‍👨 🧑🏻‍❤️‍💋‍🧑🏿", "💏"),
        ("💑 👨‍❤️‍👨", "💑"),
        ("👪 👨‍👩‍👧‍👦 👩‍👦", "👪"),
        ("🤝 🫱🏻‍🫲🏿", "🤝"),
        ("🎅 🤶 🧑‍🎄 🎅🏾", "🤶"),
        ("❤ ❤️", "❤"),
        ("🦰", "🦰"),
        ("🏽", "🏽"),
        ("🇩🇪", "🇩🇪"),
        ("🏴‍☠️", "🏴\u200d☠"),
    ],
)
def test_variants_have_one_base(variants: str, base: str) -> None:
    assert {PROGRAM.base_of(text) for text in variants.split()} == {base}
    assert PROGRAM.base_of(base) == base


def test_skin_tones() -> None:
    toned = [PROGRAM.has_skin_tone(text) for text in ("👋", "👋🏻", "🏻", "👩🏽‍🚒", "👩‍🚒")]
    assert toned == [False, True, False, True, False]


def test_documents_of_both_directions_and_languages(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = written(out, symbols(tmp_path, languages=("en", "de")))
    assert len(found) == 64 * 2 * 2 and len({record["id"] for record in found}) == len(found)
    by_emoji = defaultdict(list)
    for record in found:
        by_emoji[picture(out, record)].append(record)
    assert len(by_emoji) == 64  # the one without a glyph is left out
    for group in by_emoji.values():
        assert [record["content"][0]["type"] for record in group] == ["image", "text", "image", "text"]
        assert len({record["split"] for record in group}) == 1
        texts = [piece["text"] for record in group for piece in record["content"] if piece["type"] == "text"]
        number = texts[0].rsplit(" ", 1)[1]
        wordings = (PROGRAM.DESCRIBE, PROGRAM.DRAW) * 2
        for text, templates, language in zip(texts, wordings, ("en", "en", "de", "de"), strict=True):
            assert text in {template.format(f"{language} symbol number {number}") for template in templates}
    pixels = np.asarray(PIL.Image.open(picture(out, found[0])))
    edge = PROGRAM.EDGE
    assert pixels.shape == (edge, edge, 3) and (pixels[0] == 255).all() and pixels.min() < 50


def test_a_trial_has_the_first_ones_and_a_second_start_changes_nothing(tmp_path: Path) -> None:
    arguments = symbols(tmp_path / "names")
    whole, few = written(tmp_path / "whole", arguments), written(tmp_path / "few", [*arguments, "--limit", "10"])
    assert len(few) == 20 and few == whole[:20]
    assert not (tmp_path / "few/emoji.jsonl").read_text(), "too few for a question"
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "few").rglob("*.*")}
    assert written(tmp_path / "few", [*arguments, "--limit", "10"]) == few
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "few").rglob("*.*")} == times


def test_emoji_that_look_the_same_are_on_one_side(tmp_path: Path) -> None:
    """A, Greek Alpha and Cyrillic A; and a, which looks different but is of no other's base."""
    folder = annotations(tmp_path, {"A": "one", "\u0391": "two", "\u0410": "three", "a": "four"})
    found = PROGRAM.all_emoji(PROGRAM.Settings(font=str(DEJAVU), annotations=str(folder), held_out=0.5))
    groups = {emoji.text: emoji.group for emoji in found}
    assert groups == {"A": "A", "\u0391": "A", "\u0410": "A", "a": "a"}


def test_prepared_set_and_task(tmp_path: Path) -> None:
    out = tmp_path / "documents"
    found = written(out, symbols(tmp_path / "names"), held_out=0.4)
    image = {"kind": "kmeans", "size": 16, "channels": 3, "patch": 8, "residual": 8}
    named = {"documents": [str(out / "documents.jsonl")], "tasks": {"emoji": str(out / "emoji.jsonl")}}
    settings = config(vocab={"text": 400, "image": 32}, image=image, part_documents=50, **named)
    manifest = prepare(settings, tmp_path / "set", progress=False)
    assert sum(split.documents for split in manifest.splits.values()) == 128 and not manifest.rejected
    assert manifest.tokens_per_image == 8 and manifest.tasks == (Task(name="emoji", file="tasks/emoji.jsonl"),)
    assert summary(tmp_path / "set")["image_tokenizer"]["kind"] == "kmeans-residual"
    assert manifest.splits["validation"].documents == len([one for one in found if one["split"] == "validation"])
    items = read_task(tmp_path / "set", manifest, "emoji")
    text = open_text_tokenizer(tmp_path / "set")
    assert len(items) == manifest.splits["validation"].documents // 2 >= PROGRAM.CHOICES
    for item in items:
        start, end = item.answer
        assert end == len(item.ids) and len(set(item.choices)) == PROGRAM.CHOICES
        assert text.decode(item.ids[:start]).startswith(tuple(template[:-2] for template in PROGRAM.DESCRIBE))
        assert text.decode(item.ids[start:end]).split()[-1].isdigit()
    before = files_of(tmp_path / "set")
    written(out, symbols(tmp_path / "names"), held_out=0.4)
    prepare(settings, tmp_path / "set", progress=False)
    assert files_of(tmp_path / "set") == before


def test_missing_and_useless_sources(tmp_path: Path) -> None:
    fix = "fix: apt-get install fonts-noto-color-emoji unicode-cldr-core"
    names, empty = (
        annotations(tmp_path / "names", {"☀": "sun"}),
        annotations(tmp_path / "empty", {"\U000e0fff": "none"}),
    )
    broken = annotations(tmp_path / "broken", {})
    (broken / "annotations/en.xml").write_text("<ldml><annotations>")
    for folder, font, languages, cause, remedy in (
        (tmp_path / "none", DEJAVU, ["en"], "annotations/en.xml cannot be read", fix),
        (names, DEJAVU, ["en", "xx"], "annotations/xx.xml cannot be read", "fix: choose languages from en"),
        (names, tmp_path / "none.ttf", ["en"], "none.ttf cannot be read", fix),
        (empty, DEJAVU, ["en"], "draws none of the characters", "fix: name a font of emoji"),
        (broken, DEJAVU, ["en"], "cannot be read: no element found", fix),
    ):
        arguments = ["--font", str(font), "--annotations", str(folder), "--languages", *languages]
        with pytest.raises(SystemExit) as refused:
            written(tmp_path / "out", arguments)
        first, second = str(refused.value).splitlines()
        assert first.startswith("error: ") and cause in first and second.strip().startswith(remedy)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def real() -> Any:
    return PROGRAM.all_emoji(PROGRAM.Settings(font=str(NOTO), annotations=str(CLDR), skin_tones=True))


@pytest.mark.long
@needs_packages
def test_real_emoji(real: Any) -> None:
    assert len(real) > 3000
    names = {emoji.names[0]: emoji for emoji in real}
    assert {"grinning face", "flag: Germany", "woman firefighter: dark skin tone", "keycap: 7"} <= names.keys()
    held_out = {emoji.group for emoji in real if emoji.held_out}
    assert 0.07 < len(held_out) / len({emoji.group for emoji in real}) < 0.13
    assert names["flag: Norway"].group == names["flag: Bouvet Island"].group
    assert names["firefighter"].group == names["woman firefighter: dark skin tone"].group


@pytest.mark.long
@needs_packages
def test_no_real_picture_and_no_base_is_on_both_sides(real: Any) -> None:
    sides: dict[object, set[bool]] = defaultdict(set)
    for emoji, pixels in real.items():
        sides[pixels.tobytes()].add(emoji.held_out)
        sides[PROGRAM.base_of(emoji.text)].add(emoji.held_out)
    assert {len(found) for found in sides.values()} == {1}
