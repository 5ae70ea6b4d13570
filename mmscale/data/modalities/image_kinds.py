"""The kinds of image tokenizers: how each is fitted to the images of training documents, and how it is loaded.

Every kind is an entry of both tables. No torch here (a `vq` tokenizer imports it).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale import bounded
from mmscale.config import ImageTokenizerConfig
from mmscale.config.plugins import use_of
from mmscale.data import digests
from mmscale.data.modalities.image_files import read_pixels
from mmscale.data.modalities.image_plugin import PluginTokenizer
from mmscale.data.modalities.image_settings import SETTINGS, Fitting
from mmscale.data.modalities.image_tokens import ImageTokenizer, KMeansTokenizer, LevelsTokenizer, ResidualTokenizer
from mmscale.data.modalities.modality import Report, Sample
from mmscale.data.modalities.patches import to_patches
from mmscale.errors import ConfigError, DataError

_PATCHES_PER_IMAGE = 8  # one image is read for every 8 requested patches: enough variety without reading all images
_PATCHES_PER_CODE = 40  # with fewer patches per code, k-means overfits to them
_LEAST_CODES = 16
_SETTING = {ResidualTokenizer.kind: KMeansTokenizer.kind}  # saved kinds whose name in the settings differs

Fit = Callable[[Sample, int, Report], ImageTokenizer | None]
Load = Callable[[Path, Mapping[str, Any]], ImageTokenizer]


def fit_image_tokenizer(items: Sample, codes: int, report: Report) -> ImageTokenizer | None:
    """The tokenizer of `data.prepare.image`: the one in its folder if it exists, otherwise a new one.

    Args:
        items: the images of training documents.
        codes: ids of the image range.
        report: receives messages.

    Returns:
        None if there are no images to fit it to.

    Raises:
        ConfigError: its settings do not fit each other.
        DataError: a named folder cannot be read.
    """
    image = items.settings.image
    if image.path is not None and (Path(image.path) / SETTINGS).is_file():
        return _reused(image)
    return FITS.get(image.kind, _fit_plugin)(items, codes, report)


def check_image(image: ImageTokenizerConfig, codes: int) -> ImageTokenizer | None:
    """Refuse settings with which `fit_image_tokenizer` cannot make a tokenizer, without images.

    Args:
        image: the settings.
        codes: ids of the image range.

    Returns:
        The tokenizer, if it needs no images. A model of kind vq is not read: this takes seconds.

    Raises:
        ConfigError, DataError: as for `fit_image_tokenizer`.
    """
    if image.path is not None:
        digests.check_path(image.path, "data.prepare.image.path")
    if image.kind == "vq":
        _check_vq(image)
        return None
    if image.path is not None and (image.kind not in FIXED or (Path(image.path) / SETTINGS).is_file()):
        return _reused(image)
    return without_images(image, codes)


def load_image_tokenizer(folder: Path) -> ImageTokenizer:
    """Read a tokenizer that its `save` wrote.

    Raises:
        DataError: it is missing or damaged.
    """
    file = folder / SETTINGS
    try:
        settings = bounded.read_object(file)
        if (load := LOADS.get(settings["kind"])) is not None:
            return load(folder, settings)
        if "args" in settings:  # which only plug-ins have
            return PluginTokenizer.load(folder, settings)
    except (OSError, AssertionError, *bounded.BAD_CONTENT) as error:
        raise DataError(
            f"image tokenizer: {folder} cannot be read: {error or type(error).__name__}",
            remedy="name a folder that holds a fitted image tokenizer, or prepare the data again",
        ) from error
    raise DataError(f"image tokenizer: {file} is of unknown kind {settings['kind']!r}", remedy="update mmscale")


def without_images(image: ImageTokenizerConfig, codes: int) -> ImageTokenizer | None:
    """The tokenizer, if the settings determine it completely; None: it must be fitted to images.

    Args:
        image: the settings.
        codes: ids of the image range.
    """
    made = FIXED.get(image.kind)
    return None if made is None else made(image, codes)


def fitting_of(image: ImageTokenizerConfig) -> Fitting:
    """How these settings make pictures square."""
    return Fitting(image.fit, image.background)


def _levels(image: ImageTokenizerConfig, codes: int) -> LevelsTokenizer:
    return LevelsTokenizer(image.size, image.channels, min(codes, 256), fitting_of(image))


def _fit_levels(items: Sample, codes: int, report: Report) -> LevelsTokenizer:
    del report
    return _levels(items.settings.image, codes)


def _check_vq(image: ImageTokenizerConfig) -> None:
    path = _path_of_vq(image)
    if not ((path / SETTINGS).is_file() or (path / "config.json").is_file()):
        raise DataError(
            f"image tokenizer: {path} is no model folder: it has no config.json",
            remedy="name a local folder of a JanusVQVAE, Emu3VQVAE or ChameleonVQVAE in data.prepare.image.path",
        )


def _path_of_vq(image: ImageTokenizerConfig) -> Path:
    if image.path is None:
        raise ConfigError("data.prepare.image: kind vq needs path", remedy="name the local folder of a VQ model")
    return Path(image.path)


def _fit_vq(items: Sample, codes: int, report: Report) -> ImageTokenizer:
    del codes, report
    image = items.settings.image
    path, fitting = _path_of_vq(image), fitting_of(image)
    # Imports torch and transformers, which the other kinds do not need.
    from mmscale.data.modalities.image_vq import VQTokenizer

    return VQTokenizer.from_pretrained(path, size=image.size, channels=image.channels, fitting=fitting)


def _load_vq(folder: Path, settings: Mapping[str, Any]) -> ImageTokenizer:
    from mmscale.data.modalities.image_vq import VQTokenizer  # likewise

    return VQTokenizer.load(folder, settings)


def _fit_kmeans(items: Sample, codes: int, report: Report) -> ImageTokenizer | None:
    image = items.settings.image
    if image.path is not None:
        return _reused(image)  # raises: there is none
    if image.size % image.patch:
        raise ConfigError(
            f"data.prepare.image: patches of {image.patch} pixels do not tile images of {image.size} pixels",
            remedy="choose a patch that divides size",
        )
    patches, read = _patches(items, report)
    if not len(patches):
        return None
    most = max(_LEAST_CODES, read // _PATCHES_PER_CODE)
    first, second = min(codes - image.residual, most), min(image.residual, most)
    if first + second < codes and len(np.unique(patches, axis=0)) > most:
        report.say(
            f"note: {read} patches of training images make at most {first + second} of {codes} image codes, one for "
            f"{_PATCHES_PER_CODE} patches; the other ids stay unused. More images make more codes, or a larger "
            "data.prepare.image.fit_patches if not all images were read. `mmscale plan --data FILES` proposes a number "
            "that takes less time to fit"
        )
    base = KMeansTokenizer.fit(
        patches,
        size=image.size,
        channels=image.channels,
        patch=image.patch,
        codes=first,
        fitting=fitting_of(image),
        on_progress=report.on_progress,
    )
    if not second:
        return base
    return ResidualTokenizer.fit(
        patches, base=base, codes=second, on_progress=lambda detail: report.on_progress(f"second codebook, {detail}")
    )


def _reused(image: ImageTokenizerConfig) -> ImageTokenizer:
    assert image.path is not None
    tokenizer = load_image_tokenizer(Path(image.path))
    has = (tokenizer.kind, tokenizer.size, tokenizer.channels, getattr(tokenizer, "patch", image.patch))
    same_kind = _SETTING.get(tokenizer.kind, tokenizer.kind) == image.kind
    if not same_kind or has[1:] != (image.size, image.channels, image.patch):
        raise ConfigError(
            "data.prepare.image: {} holds a {} tokenizer of size {}, channels {}, patch {}".format(image.path, *has),
            remedy=f"set kind, size, channels and patch to these, or name a folder of a {image.kind} tokenizer",
        )
    if tokenizer.fitting != fitting_of(image):
        own = tokenizer.fitting
        raise ConfigError(
            f"data.prepare.image: {image.path} is for pictures with fit {own.fit} and background "
            f"{list(own.background)}, not {image.fit} and {list(image.background)}: one picture would get two rows of "
            "codes",
            remedy="set fit and background to these, or fit a tokenizer of its own",
        )
    return tokenizer


def _reader(image: ImageTokenizerConfig) -> Callable[..., NDArray[np.uint8]]:
    """Reads the source of an item as pixels, by these settings."""
    return functools.partial(read_pixels, size=image.size, channels=image.channels, fitting=fitting_of(image))


def _patches(items: Sample, report: Report) -> tuple[NDArray[np.uint8], int]:
    """A uniform sample of at most fit_patches patches, uint8 [N, D], and how many it was taken from.

    Every patch gets a random number, and those with the smallest numbers are kept, so that memory holds at most twice
    the sample.
    """
    image = items.settings.image
    patch, wanted = image.patch, image.fit_patches
    numbers = np.random.default_rng(0)
    kept = np.zeros((0, patch * patch * image.channels), np.uint8)
    drawn = np.zeros(0)
    read = 0
    images = items.values("train", max(1, wanted // _PATCHES_PER_IMAGE), _reader(image))
    while batch := list(itertools.islice(images, 256)):
        patches = to_patches(np.stack(batch), patch)
        read += len(patches)
        report.on_progress(f"reading images, {read} patches")
        kept, drawn = np.concatenate([kept, patches]), np.concatenate([drawn, numbers.random(len(patches))])
        if len(kept) > wanted:
            chosen = np.sort(np.argpartition(drawn, wanted)[:wanted])
            kept, drawn = kept[chosen], drawn[chosen]
    return kept, read


def _fit_plugin(items: Sample, codes: int, report: Report) -> ImageTokenizer | None:
    image = items.settings.image
    if image.path is not None:
        return _reused(image)  # raises: there is none
    use = use_of(image, "kind", key="kind")
    assert use is not None, "what is not built in is a plug-in"
    use = dataclasses.replace(use, key="data.prepare.image.kind")
    tokenizer = PluginTokenizer(use, image.size, image.channels, fitting_of(image))
    images = items.values("train", max(1, image.fit_patches // _PATCHES_PER_IMAGE), _reader(image))
    first = next(images, None)
    if first is None:
        return None
    report.on_progress("fitting to images")
    tokenizer.fit(itertools.chain([first], images), codes)
    return tokenizer


FITS: Mapping[str, Fit] = {"levels": _fit_levels, "kmeans": _fit_kmeans, "vq": _fit_vq}
# By the kind in the settings file; a k-means tokenizer with a second codebook has a separate kind.
LOADS: Mapping[str, Load] = {
    LevelsTokenizer.kind: LevelsTokenizer.load,
    KMeansTokenizer.kind: KMeansTokenizer.load,
    ResidualTokenizer.kind: ResidualTokenizer.load,
    "vq": _load_vq,
}
# Kinds that need no images.
FIXED: Mapping[str, Callable[[ImageTokenizerConfig, int], ImageTokenizer]] = {"levels": _levels}
