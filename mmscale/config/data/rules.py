"""Rules about data and its preparation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mmscale.config.data.schema import ImageTokenizerConfig, PrepareConfig
from mmscale.config.derived import blend_phases
from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config

_LEVELS = (2, 256)
_ImageRule = Callable[[ImageTokenizerConfig, int | None], Iterator[Problem]]

_OF_FILES = ("documents", "megatron")  # values of data.prepare.source that read data.prepare.documents


def _data(config: Config) -> Iterator[Problem]:
    if config.data.path is not None and config.data.blend:
        yield Problem("data.path and data.blend are both set", "keep one of them")
    late = [entry for entry in config.data.blend if isinstance(entry.weight, dict) and 0 not in entry.weight]
    if late:
        yield Problem(
            f"data.blend: the weights of {late[0].path} do not begin at step 0", "give its weight from step 0 on"
        )
        return
    silent = [step for step, weights in blend_phases(config) if not any(weights)]
    if any(step > 0 for step in silent) and 0 not in silent:
        yield Problem(
            f"data.blend: from step {silent[0]} on every source has weight 0", "give one a positive weight there"
        )
    elif silent:
        yield Problem(
            "data.blend: every source has weight 0, so there is no training data", "give one a positive weight"
        )
    multiple = config.data.document_multiple
    if config.model.seq_length % multiple:
        yield Problem(
            f"model.seq_length = {config.model.seq_length} is not divisible by data.document_multiple = {multiple}: "
            "the longest documents would not fit once they are padded",
            "change one of them",
        )
    prepare = config.data.prepare
    if prepare is None:
        return
    reads = prepare.source in _OF_FILES
    if reads and not prepare.documents:
        yield Problem(
            f"data.prepare.documents is empty, but data.prepare.source = {prepare.source}",
            "name the files",
        )
    if not reads and prepare.documents:
        yield Problem(
            f"data.prepare.documents is set, but data.prepare.source = {prepare.source} reads no documents",
            "remove one of them",
        )
    if prepare.held_out >= 1.0:
        yield Problem("data.prepare.held_out = 1 leaves nothing to train on", "use a value below 1")
    yield from _canaries(prepare)
    yield from _images(config, prepare)


def _canaries(prepare: PrepareConfig) -> Iterator[Problem]:
    if prepare.canaries is None:
        return
    if prepare.source == "megatron":
        yield Problem(
            "data.prepare.canaries is set, but the documents of a Megatron corpus are linked as they are",
            "remove it, or prepare the documents themselves",
        )
    if len(set(prepare.canaries.copies)) < max(1, len(prepare.canaries.copies)):
        yield Problem("data.prepare.canaries.copies has no numbers, or one of them twice", "name each number once")


def _vq(image: ImageTokenizerConfig, codes: int | None) -> Iterator[Problem]:
    if image.path is None:
        yield Problem("data.prepare.image.path is missing, kind = vq needs the folder of its model", "give the folder")


def _kmeans(image: ImageTokenizerConfig, codes: int | None) -> Iterator[Problem]:
    if image.size % image.patch:
        yield Problem(
            f"data.prepare.image.size = {image.size} is not divisible by data.prepare.image.patch = {image.patch}",
            "change one of them",
        )
    if image.residual and codes is not None and image.residual >= codes:
        yield Problem(
            f"data.prepare.image.residual = {image.residual} leaves none of the {codes} ids of vocab.modalities' "
            "image to the first codebook",
            "use fewer residual codes, or give image more ids",
        )
    if image.residual and image.path is not None:
        yield Problem(
            "data.prepare.image.residual and path are both set: a reused codebook is not changed", "remove one of them"
        )


def _levels(image: ImageTokenizerConfig, codes: int | None) -> Iterator[Problem]:
    if codes is not None and not _LEVELS[0] <= codes <= _LEVELS[1]:
        yield Problem(
            f"vocab.modalities: image has {codes} ids, data.prepare.image.kind = levels needs one for each of "
            f"{_LEVELS[0]} to {_LEVELS[1]} grey levels",
            "change the size of the image modality, or use kind: kmeans",
        )


# By kind of image tokenizer: its rule, which is called with the ids of the image modality, and the number of codes of
# one image; None: unknown until its model is loaded.
IMAGE_RULES: dict[str, tuple[_ImageRule, Callable[[ImageTokenizerConfig], int] | None]] = {
    "levels": (_levels, lambda image: image.size**2 * image.channels),
    "kmeans": (_kmeans, lambda image: (image.size // image.patch) ** 2 * (2 if image.residual else 1)),
    "vq": (_vq, None),
}


def _images(config: Config, prepare: PrepareConfig) -> Iterator[Problem]:
    image = prepare.image
    codes = next((modality.size for modality in config.vocab.modalities if modality.name == "image"), None)
    if image.kind not in IMAGE_RULES:
        return  # a plug-in
    rule, codes_per_image = IMAGE_RULES[image.kind]
    yield from rule(image, codes)
    if codes_per_image is None:
        return  # the model determines the number of tokens of an image
    tokens = codes_per_image(image) + 2  # <boi> and <eoi>
    for key, limit in (
        ("data.prepare.max_document_tokens", prepare.max_document_tokens),
        ("model.seq_length", config.model.seq_length),
    ):
        if codes is not None and tokens > limit:
            yield Problem(
                f"{key} = {limit} is less than the {tokens} tokens of one image, and an image is never cut",
                "raise it, or use smaller images or larger patches",
            )


RULES: tuple[Rule, ...] = (_data,)
