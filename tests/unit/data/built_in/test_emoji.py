# mmscale/data/built_in/emoji.py and emoji_base.py: bases, the split, the documents and the questions. Most tests use a
# font that matplotlib brings; those with Debian's packages are skipped where these are missing (MMSCALE_EMOJI_ROOT:
# unpacked).
"""Tests of the emoji data set."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from mmscale.config import EmojiConfig
from mmscale.data.built_in.emoji import CHOICES, DESCRIBE, DRAW, EDGE, Emoji, all_emoji, emoji_slices
from mmscale.data.built_in.emoji_base import base_of, has_skin_tone
from mmscale.data.documents.schema import Document, Image, Text
from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.inspect_set import summary
from mmscale.data.prepared.manifest import Task
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.tasks import read_task
from mmscale.errors import DataError
from tests.unit.data.samples import config, files_of

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


def symbols(folder: Path, *, languages: tuple[str, ...] = ("en",), **chosen: Any) -> EmojiConfig:
    """The 64 zodiac, chess, card and weather symbols from U+2600 on, which DejaVu has, and one that no font has."""
    for language in languages:
        names = {chr(0x2600 + number): f"{language} symbol number {number}" for number in range(64)}
        annotations(folder, names | {"\U000e0fff": "nothing"}, language=language)
    return EmojiConfig(font=str(DEJAVU), annotations=str(folder), languages=languages, **chosen)


def documents(settings: EmojiConfig, *, slice_records: int = 10_000, held_out: float = 0.25) -> list[Document]:
    slices = emoji_slices(settings, held_out=held_out, slice_records=slice_records)
    return [item for piece in slices for item in piece.read()]


def pixels(document: Document) -> np.ndarray:
    (image,) = document.images
    assert isinstance(image.source, np.ndarray)
    return image.source


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
    assert {base_of(text) for text in variants.split()} == {base}
    assert base_of(base) == base


def test_skin_tones() -> None:
    assert [has_skin_tone(text) for text in ("👋", "👋🏻", "🏻", "👩🏽‍🚒", "👩‍🚒")] == [False, True, False, True, False]


def test_documents_of_both_directions_and_languages(tmp_path: Path) -> None:
    found = documents(symbols(tmp_path, languages=("en", "de")))
    assert len(found) == 64 * 2 * 2 and len({document.id for document in found}) == len(found)
    by_emoji = defaultdict(list)
    for document in found:
        by_emoji[document.where].append(document)
    assert len(by_emoji) == 64  # the one without a glyph is left out
    for group in by_emoji.values():
        assert [type(document.content[0]) for document in group] == [Image, Text, Image, Text]
        assert len({document.split for document in group}) == 1
        assert len({pixels(document).tobytes() for document in group}) == 1
        texts = [piece.text for document in group for piece in document.content if isinstance(piece, Text)]
        number = texts[0].rsplit(" ", 1)[1]
        for text, templates, language in zip(texts, (DESCRIBE, DRAW) * 2, ("en", "en", "de", "de"), strict=True):
            assert text in {template.format(f"{language} symbol number {number}") for template in templates}
    picture = pixels(found[0])
    assert picture.shape == (EDGE, EDGE, 3) and (picture[0] == 255).all() and picture.min() < 50


def test_slices_do_not_matter_and_know_what_they_hold(tmp_path: Path) -> None:
    settings = symbols(tmp_path)
    whole, cut = documents(settings), documents(settings, slice_records=13)
    assert [document.id for document in whole] == [document.id for document in cut]
    assert [document.split for document in whole] == [document.split for document in cut]
    few = all_emoji(settings.model_copy(update={"limit": 10}), 0.25)
    assert len(few) == 10 and {emoji.text for emoji in few} < {emoji.text for emoji in all_emoji(settings, 0.25)}

    def identity(held_out: float = 0.25) -> str:
        return emoji_slices(settings, held_out=held_out, slice_records=50)[0].identity

    before = identity()
    assert before != identity(0.5) and before == identity()
    annotations(tmp_path, {"\u2600": "the sun"})
    assert before != identity()


def test_emoji_that_look_the_same_are_on_one_side(tmp_path: Path) -> None:
    """A, Greek Alpha and Cyrillic A; and a, which looks different but is of no other's base."""
    folder = annotations(tmp_path, {"A": "one", "\u0391": "two", "\u0410": "three", "a": "four"})
    found = all_emoji(EmojiConfig(font=str(DEJAVU), annotations=str(folder)), 0.5)
    groups = {emoji.text: emoji.group for emoji in found}
    assert groups == {"A": "A", "\u0391": "A", "\u0410": "A", "a": "a"}


def test_prepared_set_and_task(tmp_path: Path) -> None:
    symbols(tmp_path / "names")
    emoji = {"font": str(DEJAVU), "annotations": str(tmp_path / "names")}
    image = {"kind": "kmeans", "size": 16, "channels": 3, "patch": 8, "residual": 8}
    settings = config(
        vocab={"text": 400, "image": 32}, source="emoji", emoji=emoji, image=image, held_out=0.4, part_documents=50
    )
    manifest = prepare(settings, tmp_path / "set", progress=False)
    assert sum(split.documents for split in manifest.splits.values()) == 128 and not manifest.rejected
    assert manifest.tokens_per_image == 8 and manifest.tasks == (Task(name="emoji", file="tasks/emoji.jsonl"),)
    assert summary(tmp_path / "set")["image_tokenizer"]["kind"] == "kmeans-residual"
    held_out = manifest.splits["validation"].documents // 2
    items = read_task(tmp_path / "set", manifest, "emoji")
    text = open_text_tokenizer(tmp_path / "set")
    assert len(items) == held_out >= CHOICES
    for item in items:
        start, end = item.answer
        assert end == len(item.ids) and len(set(item.choices)) == CHOICES
        name = text.decode(item.ids[start:end])
        assert text.decode(item.ids[:start]).startswith(tuple(template[:-2] for template in DESCRIBE))
        assert name.split()[-1].isdigit()
    before = files_of(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    font = tmp_path / "elsewhere/font.ttf"
    font.write_bytes(DEJAVU.read_bytes())
    moved = settings.model_copy(
        update={
            "data": settings.data.model_copy(
                update={
                    "prepare": settings.data.prepare.model_copy(  # type: ignore[union-attr]
                        update={"emoji": EmojiConfig(font=str(font), annotations=emoji["annotations"])}
                    )
                }
            )
        }
    )
    prepare(moved, tmp_path / "set", progress=False)  # the same font in another place is the same data
    assert files_of(tmp_path / "set") == before


def test_missing_and_useless_sources(tmp_path: Path) -> None:
    fix = "apt-get install fonts-noto-color-emoji unicode-cldr-core"
    with pytest.raises(DataError, match=r"annotations/en\.xml cannot be read") as error:
        all_emoji(EmojiConfig(font=str(DEJAVU), annotations=str(tmp_path / "none")), 0.1)
    assert fix in error.value.remedy
    folder = annotations(tmp_path / "names", {"☀": "sun"})
    with pytest.raises(DataError, match=r"annotations/xx\.xml cannot be read") as error:
        all_emoji(EmojiConfig(font=str(DEJAVU), annotations=str(folder), languages=("en", "xx")), 0.1)
    assert error.value.remedy == "choose languages from en"
    with pytest.raises(DataError, match=r"the font .*none\.ttf cannot be read") as error:
        all_emoji(EmojiConfig(font=str(tmp_path / "none.ttf"), annotations=str(folder)), 0.1)
    assert fix in error.value.remedy
    annotations(tmp_path / "names", {"\U000e0fff": "nothing"})
    with pytest.raises(DataError, match="draws none of the characters"):
        all_emoji(EmojiConfig(font=str(DEJAVU), annotations=str(folder), limit=5), 0.1)
    (folder / "annotations/en.xml").write_text("<ldml><annotations>")
    with pytest.raises(DataError, match="cannot be read: no element found"):
        all_emoji(EmojiConfig(font=str(DEJAVU), annotations=str(folder), limit=6), 0.1)


@pytest.fixture(scope="module")
def real() -> tuple[Emoji, ...]:
    return all_emoji(EmojiConfig(font=str(NOTO), annotations=str(CLDR)), 0.1)


@pytest.mark.long
@needs_packages
def test_real_emoji(real: tuple[Emoji, ...]) -> None:
    assert len(real) > 3000
    names = {emoji.names[0]: emoji for emoji in real}
    assert {"grinning face", "flag: Germany", "woman firefighter: dark skin tone", "keycap: 7"} <= names.keys()
    held_out = {emoji.group for emoji in real if emoji.held_out}
    assert 0.07 < len(held_out) / len({emoji.group for emoji in real}) < 0.13
    assert names["flag: Norway"].group == names["flag: Bouvet Island"].group
    assert names["firefighter"].group == names["woman firefighter: dark skin tone"].group


@pytest.mark.long
@needs_packages
def test_no_real_picture_and_no_base_is_on_both_sides(real: tuple[Emoji, ...]) -> None:
    settings = EmojiConfig(font=str(NOTO), annotations=str(CLDR))
    sides: dict[object, set[str | None]] = defaultdict(set)
    for piece in emoji_slices(settings, held_out=0.1, slice_records=1000):
        for document in piece.read():
            sides[pixels(document).tobytes()].add(document.split)
    for emoji in real:
        sides[base_of(emoji.text)].add("validation" if emoji.held_out else "train")
    assert {len(found) for found in sides.values()} == {1}
