"""Rules about data and its preparation."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config, PrepareConfig

_LEVELS = (2, 256)
_MAX_SHIFTS = 8


def _data(config: Config) -> Iterator[Problem]:
    if config.data.path is not None and config.data.blend:
        yield Problem("data.path and data.blend are both set", "keep one of them")
    if config.data.blend and not any(entry.weight for entry in config.data.blend):
        yield Problem("data.blend: every source has weight 0, nothing is trained on", "give one a positive weight")
    prepare = config.data.prepare
    if prepare is None:
        return
    if prepare.source == "documents" and not prepare.documents:
        yield Problem(
            "data.prepare.documents is empty, but data.prepare.source = documents",
            "name the files, or use source: digits",
        )
    if prepare.source != "documents" and prepare.documents:
        yield Problem(
            f"data.prepare.documents is set, but data.prepare.source = {prepare.source} reads no documents",
            "remove one of them",
        )
    if prepare.source == "emoji" and not prepare.emoji.languages:
        yield Problem("data.prepare.emoji.languages is empty", "name at least one, e.g. [en]")
    if prepare.augment > _MAX_SHIFTS:
        yield Problem(
            f"data.prepare.augment = {prepare.augment}: there are {_MAX_SHIFTS} shifts by one pixel",
            f"use at most {_MAX_SHIFTS}",
        )
    if prepare.held_out >= 1.0:
        yield Problem("data.prepare.held_out = 1 leaves nothing to train on", "use a value below 1")
    yield from _images(config, prepare)


def _images(config: Config, prepare: PrepareConfig) -> Iterator[Problem]:
    image = prepare.image
    codes = next((modality.size for modality in config.vocab.modalities if modality.name == "image"), None)
    if image.kind == "vq":
        if image.path is None:
            yield Problem(
                "data.prepare.image.path is missing, kind = vq needs the folder of its model", "give the folder"
            )
        return  # how many tokens an image has is the model's affair
    if image.kind == "kmeans":
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
                "data.prepare.image.residual and path are both set: a codebook that is reused is taken as it is",
                "remove one of them",
            )
    elif codes is not None and not _LEVELS[0] <= codes <= _LEVELS[1]:
        yield Problem(
            f"vocab.modalities: image has {codes} ids, data.prepare.image.kind = levels wants one for each of "
            f"{_LEVELS[0]} to {_LEVELS[1]} grey levels",
            "change the size of the image modality, or use kind: kmeans",
        )
    if image.kind == "levels":
        codes_per_image = image.size**2 * image.channels
    else:
        codes_per_image = (image.size // image.patch) ** 2 * (2 if image.residual else 1)
    tokens = codes_per_image + 2  # <boi> and <eoi>
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
