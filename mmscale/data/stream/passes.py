"""The data sets that a model is evaluated on: one pass over each, by name (as in `mmscale.runs.held_out.HeldOut`)."""

from __future__ import annotations

from pathlib import Path

from mmscale.config import Config
from mmscale.config.derived import SOURCE, source_names
from mmscale.data.prepared.manifest import HELD_OUT, has_documents, read_blend
from mmscale.data.prepared.validation import naming, read_validation
from mmscale.data.stream.mixture import Mixture, open_mixture
from mmscale.data.vocab import Vocabulary

SOURCES = ""  # name for the held-out documents of all training data


def open_passes(config: Config, *, vocabulary: Vocabulary, each: bool | None = None) -> dict[str, Mixture]:
    """One pass each over the held-out documents of all sources, of each source of a blend, and each validation set.

    Args:
        config: names the data.
        vocabulary: of the configuration.
        each: whether sources of a blend are also evaluated separately; default: train.eval_sources.

    Returns:
        The passes by name, `SOURCES` first; empty if there is no data to evaluate on.

    Raises:
        ConfigError: no data set is named.
        DataError: a data set is missing, damaged, of another vocabulary or other tokenizers, or has too long documents.
    """
    blend = read_blend(config)
    found = {}
    if has_documents(blend, HELD_OUT):
        found[SOURCES] = open_mixture(config, HELD_OUT, vocabulary=vocabulary)
    each = config.train.eval_sources if each is None else each
    for name, path in (source_names(config) if each else {}).items():
        folder = Path(path)
        if has_documents({folder: blend[folder]}, HELD_OUT):
            found[f"{SOURCE}{name}"] = open_mixture(config, HELD_OUT, vocabulary=vocabulary, folder=folder)
    for one in read_validation(config, blend):
        with naming(one.name):
            found[one.name] = open_mixture(config, one.split, vocabulary=vocabulary, folder=one.folder)
    return found
