"""Compares classifier-free guidance on held-out documents of the data that a model was trained on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from checkpoints_tools.huggingface.evaluate_export import trained_tokenizers
from checkpoints_tools.huggingface.generator import Generator
from checkpoints_tools.huggingface.item_rules import refuse_unlearned_mask
from checkpoints_tools.huggingface.shipped.decoding_moma import before_items
from mmscale.data.prepared.manifest import HELD_OUT, check_tokenizers, has_documents, read_blend
from mmscale.data.stream.source import Source
from mmscale.data.vocab import Vocabulary
from mmscale.errors import MmscaleError, UsageError
from mmscale.inference.guidance import GuidanceSweep, items_behind_prompts, sweep

_NUMBER = "give a number, for instance --guidance 2, and look at the drawings"


def held_out_guidance(
    path: Path, generator: Generator, *, modality: str, unconditional: str = "none", most: int = 128
) -> GuidanceSweep:
    """Losses of held-out items under each guidance.

    Args:
        path: the run or the exported folder.
        generator: its model.
        modality: of the items.
        unconditional: what stands for the prompt in the other branch, as in `Sampling`.
        most: number of documents that are read: the first ones with an item after a prompt.

    Raises:
        UsageError: the model does not generate such items, the data is missing, or has no such held-out documents.
    """
    refuse_unlearned_mask(generator.config, unconditional)
    rules = next((one for one in generator.rules() if one.name == modality), None)
    if rules is None:
        raise UsageError(f"--guidance auto: this model writes no {modality}s", remedy="leave --guidance away")
    if not generator.use_cache:
        raise UsageError("--guidance auto: not with --nproc", remedy="leave --nproc away, or give a number")
    documents: list[NDArray[np.int64]] = []
    try:
        blend = read_blend(generator.config)
        for folder, manifest in blend.items():
            if generator.step is None:  # an export; for a run the data was checked when it was opened
                check_tokenizers(folder, manifest.tokenizers, trained_tokenizers(path), where=str(path))
            if not has_documents({folder: manifest}, HELD_OUT):
                continue
            source = Source(folder, split=HELD_OUT, vocabulary=Vocabulary.from_config(generator.config.vocab))
            read = (source.read(np.array([number])) for number in range(len(source)))
            suited = (ids for ids in read if items_behind_prompts(ids, rules))
            documents += itertools.islice(suited, most - len(documents))
    except MmscaleError as error:
        raise UsageError(f"--guidance auto reads held-out documents: {error.cause}", remedy=_NUMBER) from error
    found = sweep(generator.model, documents, rules, before=before_items(generator.processor, unconditional))
    if found is None:
        raise UsageError(
            f"--guidance auto: {', '.join(map(str, blend))} holds out no document with an {modality} behind a prompt",
            remedy=_NUMBER,
        )
    return found
