"""Makes the two tokenizers of a data set: trained on a sample of its training documents, or loaded.

Both are deterministic, so a run that is broken off here and started again makes the same ones. Held-out documents are
not looked at, except to measure how well images survive.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.config import ImageTokenizerConfig, PrepareConfig
from mmscale.data import image_tokens, text_tokens
from mmscale.data.documents import BadDocumentError, Document, DocumentSlice, SplitName, Text
from mmscale.data.encode import IMAGE
from mmscale.data.image_files import load_image
from mmscale.data.image_settings import SETTINGS
from mmscale.data.image_tokens import ImageTokenizer, KMeansTokenizer, LevelsTokenizer, ResidualTokenizer
from mmscale.data.patches import to_patches
from mmscale.data.progress import Detail, Reporter
from mmscale.data.text_tokens import TextTokenizer
from mmscale.data.vocab import Vocabulary
from mmscale.errors import ConfigError, DataError

_TEXT_CHARACTERS = 200_000_000  # more text hardly changes the merges, and counting it takes minutes
_PATCHES_PER_IMAGE = 8  # an image is read for every 8 patches asked for: enough variety without reading everything
_MEASURED_IMAGES = 1024
_PATCHES_PER_CODE = 40  # k-means centres of fewer patches describe these patches and not new ones
_LEAST_CODES = 16


def text_tokenizer(
    out: Path, settings: PrepareConfig, vocabulary: Vocabulary, slices: Sequence[DocumentSlice], reporter: Reporter
) -> TextTokenizer:
    """The data set's text tokenizer: what an earlier run left, else the one named, else a new one.

    Raises:
        DataError: it does not fit the text range, or a named file cannot be read.
    """
    low, high = vocabulary.ranges[0]
    folder = out / text_tokens.FOLDER
    if (folder / text_tokens.FILE).is_file():
        try:
            return TextTokenizer.load(folder / text_tokens.FILE, size=high - low)
        except DataError:
            reporter.say(f"{folder} is damaged and made again")
    if settings.text.load is not None:
        tokenizer = TextTokenizer.load(Path(settings.text.load), size=high - low)
    else:
        with reporter.part("text tokenizer") as tell:
            tokenizer = TextTokenizer.train(_texts(slices, settings.held_out, tell), size=high - low)
    tokenizer.save(folder)
    reporter.say(f"text tokenizer: {tokenizer.vocab_size} of {high - low} ids in use")
    return tokenizer


def image_tokenizer(
    out: Path, settings: PrepareConfig, vocabulary: Vocabulary, slices: Sequence[DocumentSlice], reporter: Reporter
) -> ImageTokenizer | None:
    """The data set's image tokenizer, likewise; None if the vocabulary or the documents have no images.

    Raises:
        ConfigError: its settings do not fit each other.
        DataError: its codes do not fit the image range, or a named folder cannot be read.
    """
    if IMAGE not in vocabulary.names:
        return None
    folder = out / image_tokens.FOLDER
    low, high = vocabulary.range_of(IMAGE)
    if (folder / SETTINGS).is_file():
        try:
            return image_tokens.load_image_tokenizer(folder)
        except DataError:
            reporter.say(f"{folder} is damaged and made again")
    with reporter.part("image tokenizer") as tell:
        tokenizer = _make_image_tokenizer(settings, high - low, slices, reporter, tell)
    if tokenizer is None:
        return None
    if tokenizer.vocab_size > high - low:
        raise DataError(
            f"image tokenizer: {tokenizer.kind} has {tokenizer.vocab_size} codes, the image range {high - low} ids",
            remedy=f"give image {tokenizer.vocab_size} ids in vocab.modalities",
        )
    with reporter.part("image tokenizer") as tell:
        tell("measuring what is lost")
        measured = _measure(tokenizer, settings, slices)
    image_tokens.save_whole(tokenizer, folder, measured=measured)
    if measured["psnr_db"] is not None:
        lost = f"PSNR {measured['psnr_db']} dB"
    else:
        lost = "nothing is lost" if measured.get("exact") else "PSNR not measured"
    on = f"; {lost} on {measured['images']} {measured['split']} images" if measured["images"] else ""
    size = f"{tokenizer.vocab_size} codes, {tokenizer.tokens_per_image} tokens an image"
    reporter.say(f"image tokenizer: {tokenizer.kind}, {size}{on}")
    return tokenizer


def _make_image_tokenizer(
    settings: PrepareConfig, codes: int, slices: Sequence[DocumentSlice], reporter: Reporter, tell: Detail
) -> ImageTokenizer | None:
    image = settings.image
    if image.kind == "levels":
        return LevelsTokenizer(image.size, image.channels, min(codes, 256))
    if image.kind == "vq":
        if image.path is None:
            raise ConfigError("data.prepare.image: kind vq needs path", remedy="name the local folder of a VQ model")
        from mmscale.data.image_vq import VQTokenizer  # torch and transformers, which the other kinds do without

        return VQTokenizer.from_pretrained(Path(image.path), size=image.size, channels=image.channels)
    if image.path is not None:
        return _reused(image)
    if image.size % image.patch:
        raise ConfigError(
            f"data.prepare.image: patches of {image.patch} pixels do not tile images of {image.size} pixels",
            remedy="choose a patch that divides size",
        )
    patches, read = _patches(settings, slices, tell)
    if not len(patches):
        return None
    most = max(_LEAST_CODES, read // _PATCHES_PER_CODE)
    first, second = min(codes - image.residual, most), min(image.residual, most)
    if first + second < codes and len(np.unique(patches, axis=0)) > most:
        reporter.say(
            f"note: {read} patches of training images make at most {first + second} of {codes} image codes, one for "
            f"{_PATCHES_PER_CODE} patches; the other ids stay unused. More images make more codes, or a larger "
            "data.prepare.image.fit_patches if not all images were read"
        )
    base = KMeansTokenizer.fit(
        patches, size=image.size, channels=image.channels, patch=image.patch, codes=first, tell=tell
    )
    if not second:
        return base
    return ResidualTokenizer.fit(
        patches, base=base, codes=second, tell=lambda detail: tell(f"second codebook, {detail}")
    )


def _reused(image: ImageTokenizerConfig) -> ImageTokenizer:
    assert image.path is not None
    tokenizer = image_tokens.load_image_tokenizer(Path(image.path))
    has = (tokenizer.kind, tokenizer.size, tokenizer.channels, getattr(tokenizer, "patch", image.patch))
    if has[0] not in ("kmeans", "kmeans-residual") or has[1:] != (image.size, image.channels, image.patch):
        raise ConfigError(
            "data.prepare.image: {} holds a {} tokenizer of size {}, channels {}, patch {}".format(image.path, *has),
            remedy="set size, channels and patch to these, or name a folder of a k-means tokenizer",
        )
    return tokenizer


def _documents(piece: DocumentSlice, split: SplitName, held_out: float) -> Iterator[Document]:
    """A slice's good documents of one split; bad ones are reported when the parts are made."""
    return (item for item in piece.read() if isinstance(item, Document) and item.split_for(held_out) == split)


def _texts(slices: Sequence[DocumentSlice], held_out: float, tell: Detail) -> Iterator[str]:
    """Training text, at most _TEXT_CHARACTERS, equally from the start of every slice."""
    share = _TEXT_CHARACTERS // max(1, len(slices))
    for number, piece in enumerate(slices, start=1):
        tell(f"reading text, part {number} of {len(slices)}")
        characters = 0
        for document in _documents(piece, "train", held_out):
            for content in document.content:
                if isinstance(content, Text):
                    characters += len(content.text)
                    yield content.text
            if characters >= share:
                break
    tell("choosing merges")


def _images(
    slices: Sequence[DocumentSlice], split: SplitName, settings: PrepareConfig, limit: int
) -> Iterator[NDArray[np.uint8]]:
    """Readable images of a split uint8 [H, W, C], at most `limit`, equally from the start of every slice."""
    share = -(-limit // max(1, len(slices)))
    for piece in slices:
        images = (image for document in _documents(piece, split, settings.held_out) for image in document.images)
        for image in itertools.islice(images, share):
            try:
                yield load_image(image, size=settings.image.size, channels=settings.image.channels)
            except BadDocumentError:
                continue


def _patches(settings: PrepareConfig, slices: Sequence[DocumentSlice], tell: Detail) -> tuple[NDArray[np.uint8], int]:
    """A uniform sample of at most fit_patches patches, uint8 [N, D], and how many it was taken from.

    Every patch draws a number, and the smallest numbers stay: memory holds no more than twice the sample.
    """
    patch, wanted = settings.image.patch, settings.image.fit_patches
    numbers = np.random.default_rng(0)
    kept = np.zeros((0, patch * patch * settings.image.channels), np.uint8)
    drawn = np.zeros(0)
    read = 0
    images = _images(slices, "train", settings, max(1, wanted // _PATCHES_PER_IMAGE))
    while batch := list(itertools.islice(images, 256)):
        patches = to_patches(np.stack(batch), patch)
        read += len(patches)
        tell(f"reading images, {read} patches")
        kept, drawn = np.concatenate([kept, patches]), np.concatenate([drawn, numbers.random(len(patches))])
        if len(kept) > wanted:
            chosen = np.sort(np.argpartition(drawn, wanted)[:wanted])
            kept, drawn = kept[chosen], drawn[chosen]
    return kept, read


def _measure(tokenizer: ImageTokenizer, settings: PrepareConfig, slices: Sequence[DocumentSlice]) -> dict[str, object]:
    """Quality on held-out images, or on training images if none is held out."""
    for split in ("validation", "train"):
        images = list(itertools.islice(_images(slices, split, settings, _MEASURED_IMAGES), _MEASURED_IMAGES))
        if images:
            return image_tokens.quality(tokenizer, np.stack(images)) | {"split": split}
    return {"images": 0, "codes_used": 0, "psnr_db": None, "split": "train"}
