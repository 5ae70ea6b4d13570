"""A second built-in data set: pictures of emoji and their names, as name <-> picture documents, and a task on them.

Pictures come from a colour font (Debian: fonts-noto-color-emoji), names from the annotations of the Unicode CLDR
(Debian: unicode-cldr-core). Nothing is downloaded. All variants of a base emoji, and emoji that look the same, are in
the same split; emoji_base.py finds the base. No torch here.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont, features

from mmscale.config import EmojiConfig
from mmscale.data.built_in.emoji_base import base_of, has_skin_tone
from mmscale.data.documents.schema import Document, Image, Text
from mmscale.data.prepared.encode import DocumentEncoder, Encoded
from mmscale.data.prepared.tasks import TaskItem
from mmscale.errors import ConfigError, DataError

# The name comes last in DESCRIBE, so that everything before it is the question.
DESCRIBE = ("this is {}", "it shows {}", "the emoji is {}", "somebody sent {}")
DRAW = ("draw {}", "show me {}", "send {}", "a picture of {}")
TASK = "emoji"
CHOICES = 10  # names to choose from, one of them right
EDGE = 136  # edge of a picture [pixels]: the width of a glyph of Noto Color Emoji, which has this one size
_FONT_SIZE = 109  # the bitmap font's only size
_FOLDERS = ("annotations", "annotationsDerived")  # derived: skin tones, flags, keycaps, sequences
_NOBODY = "\U0010fffd"  # a private-use character, which no font contains
_LAST = "\U0010ffff"  # sorts after every emoji, so that it never becomes the name of a group
_GET = (
    "apt-get install fonts-noto-color-emoji unicode-cldr-core, or name unpacked copies in data.prepare.emoji.font and "
    "data.prepare.emoji.annotations"
)


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


@dataclass(frozen=True)
class EmojiSlice:
    """Records first..first+count-1 of the emoji.

    For every emoji and every language there is one record that describes and one that draws. The order of emoji is
    independent of what they show.

    Attributes:
        settings: where they come from.
        held_out: share of base emoji for validation.
        digest: hash of the files.
    """

    first: int
    count: int
    settings: EmojiConfig
    held_out: float
    digest: str = field(repr=False)

    @property
    def identity(self) -> str:
        """A hash of the files' content, the templates, the selection of emoji, and the range of records."""
        chosen = (
            self.settings.languages,
            self.settings.skin_tones,
            self.settings.limit,
            self.held_out,
            PIL.__version__,
        )
        content = repr((self.digest, DESCRIBE, DRAW, EDGE, *chosen)).encode()
        return f"emoji:{hashlib.sha256(content).hexdigest()}:{self.first}+{self.count}"

    def read(self) -> Iterator[Document]:
        """The slice's documents.

        Raises:
            DataError: the font or the names are missing or damaged.
        """
        emoji = all_emoji(self.settings, self.held_out)
        font = _font(self.settings.font)
        for record in range(self.first, self.first + self.count):
            pair, draws = divmod(record, 2)
            number, language = divmod(pair, len(self.settings.languages))
            yield _document(
                emoji[number], font, language=self.settings.languages[language], index=language, draws=draws
            )


def emoji_slices(settings: EmojiConfig, *, held_out: float, slice_records: int) -> list[EmojiSlice]:
    """The whole source in slices.

    Args:
        settings: where they come from.
        held_out: share of base emoji for validation.
        slice_records: records of a slice, at most.

    Raises:
        DataError: the font or the names are missing or damaged, or have nothing in common.
    """
    total = 2 * len(settings.languages) * len(all_emoji(settings, held_out))
    digest = _digest(settings)
    return [
        EmojiSlice(at, min(slice_records, total - at), settings, held_out, digest)
        for at in range(0, total, slice_records)
    ]


def _hash(purpose: str, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}:{text}".encode()).digest()[:8], "big")


def _document(emoji: Emoji, font: ImageFont.FreeTypeFont, *, language: str, index: int, draws: int) -> Document:
    templates = DRAW if draws else DESCRIBE
    caption = Text(templates[_hash(f"template {language}", emoji.text) % len(templates)].format(emoji.names[index]))
    code = "-".join(f"{ord(point):x}" for point in emoji.text)
    name = f"emoji-{code}-{language}-{'draw' if draws else 'describe'}"
    image = Image(picture(emoji.text, font), name)
    content = (caption, image) if draws else (image, caption)
    return Document(name, content, f"emoji:{code}", split="validation" if emoji.held_out else "train")


# --------------------------------------------------------------------------------------------- pictures and names


@lru_cache(maxsize=4)
def all_emoji(settings: EmojiConfig, held_out: float) -> tuple[Emoji, ...]:
    """Every emoji that the font draws and that has a name in every language.

    Args:
        settings: where they come from.
        held_out: share of base emoji for validation.

    Raises:
        DataError: the font or the names are missing or damaged, or have nothing in common.
    """
    names = [_names(Path(settings.annotations), language) for language in settings.languages]
    font = _font(settings.font)
    nothing = bytes(font.getmask(_NOBODY))
    known = [text for text in names[0] if all(text in other for other in names)]
    known = sorted(known, key=lambda text: _hash("order", text))
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
        raise DataError(
            f"emoji: {settings.font} draws none of the characters that {settings.annotations} names",
            remedy=f"name a font of emoji: {_GET}",
        )
    groups = _groups(drawn)
    return tuple(
        Emoji(
            text,
            tuple(other[text] for other in names),
            group := groups[text],
            held_out=_hash("split", group) / 2**64 < held_out,
        )
        for text in drawn
    )


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


@lru_cache(maxsize=4)
def _font(file: str) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise DataError(
            "emoji: this Pillow cannot shape text (no Raqm), so that sequences of characters are drawn one by one",
            remedy="install Pillow's wheel from PyPI",
        )
    try:
        return ImageFont.truetype(file, _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise DataError(f"emoji: the font {file} cannot be read: {error}", remedy=_GET) from error


def _files(annotations: Path, language: str) -> list[Path]:
    return [annotations / folder / f"{language}.xml" for folder in _FOLDERS]


def _names(annotations: Path, language: str) -> dict[str, str]:
    """Names of one language: the annotations that a screen reader says."""
    found: dict[str, str] = {}
    for file in _files(annotations, language):
        try:
            # files of the system; and expat limits what entities may grow to
            entries = ElementTree.parse(file).getroot().iter("annotation")  # noqa: S314
        except (OSError, ElementTree.ParseError) as error:
            there = sorted(other.stem for other in file.parent.glob("??.xml")) if file.parent.is_dir() else []
            remedy = f"choose languages from {', '.join(there)}" if there and not file.exists() else _GET
            raise DataError(f"emoji: the names in {file} cannot be read: {error}", remedy=remedy) from error
        found |= {
            entry.attrib["cp"]: entry.text.strip()
            for entry in entries
            if entry.get("type") == "tts" and entry.text and entry.text != "↑↑↑"  # the CLDR's "as in the parent"
        }
    return found


def _digest(settings: EmojiConfig) -> str:
    digest = hashlib.sha256()
    files = [Path(settings.font)]
    for language in settings.languages:
        files += _files(Path(settings.annotations), language)
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------- the task


def emoji_task(settings: EmojiConfig, held_out: float, encoder: DocumentEncoder) -> list[TaskItem]:
    """A question for every held-out base: which of ten names, all of held-out emoji, does the picture have?

    The model has not seen the emoji or a variant of it, but may know words of its name from others.

    Args:
        settings: where they come from; questions are in the first language.
        held_out: share of base emoji for validation.
        encoder: makes ids in the same way as for the training documents.

    Returns:
        Empty if fewer than ten bases are held out.

    Raises:
        DataError: a document does not fit.
    """
    by_group: dict[str, Emoji] = {}
    for emoji in all_emoji(settings, held_out):
        if emoji.held_out:
            by_group.setdefault(emoji.group, emoji)
    asked = list(by_group.values())
    by_name = list({emoji.names[0]: emoji for emoji in asked}.values())
    if len(by_name) < CHOICES:
        return []
    font = _font(settings.font)
    items = []
    for emoji in by_name:
        document = _document(emoji, font, language=settings.languages[0], index=0, draws=0)
        (encoded,) = encoder.encode([document])
        if not isinstance(encoded, Encoded):
            raise DataError(f"emoji: {encoded.id} was rejected: {encoded.reason}", remedy="raise max_document_tokens")
        others = sorted(by_name, key=lambda other, own=emoji: _hash(own.text, other.text))  # type: ignore[misc]
        chosen = [emoji, *(other for other in others if other is not emoji)][:CHOICES]
        chosen.sort(key=lambda other: other.names[0])
        items.append(_item(encoded, emoji, chosen, encoder))
    return items


def _item(encoded: Encoded, emoji: Emoji, chosen: Sequence[Emoji], encoder: DocumentEncoder) -> TaskItem:
    """A question whose answers end with `</s>`: otherwise "cat" would be likelier than all names that begin with it."""
    text = encoded.document.content[-1]
    assert isinstance(text, Text)
    question = text.text.removesuffix(emoji.names[0])
    captions = [tuple(encoder.text.encode(question + other.names[0]).tolist()) for other in chosen]
    ids = tuple(encoded.ids.tolist())
    ends = [(*caption, ids[-1]) for caption in captions]
    common = 0
    while len({end[: common + 1] for end in ends}) == 1:
        common += 1
    choices = tuple(end[common:] for end in ends)
    right = choices[list(chosen).index(emoji)]
    if len(set(choices)) < len(choices):
        raise ConfigError("emoji: the text tokenizer cannot tell two names apart", remedy="use another tokenizer")
    return TaskItem(ids, (len(ids) - len(right), len(ids)), choices)
