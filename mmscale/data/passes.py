"""What a model is evaluated on: one pass over each set, by name."""

from __future__ import annotations

from mmscale.config import Config
from mmscale.data.manifest import HELD_OUT, has_documents, read_blend
from mmscale.data.mixture import Mixture, open_mixture
from mmscale.data.validation import naming, read_validation
from mmscale.data.vocab import Vocabulary

SOURCES = ""  # name of the held-out documents of the data that is trained on


def open_passes(config: Config, *, vocabulary: Vocabulary) -> dict[str, Mixture]:
    """The held-out documents of the sources, if they have some, and then every validation set.

    Args:
        config: names the data.
        vocabulary: of the configuration.

    Returns:
        One pass by name, `SOURCES` first; nothing if there is nothing to evaluate on.

    Raises:
        ConfigError: no data set is named.
        DataError: a data set is missing, damaged, of another vocabulary or other tokenizers, or has too long documents.
    """
    blend = read_blend(config)
    found = {}
    if has_documents(blend, HELD_OUT):
        found[SOURCES] = open_mixture(config, HELD_OUT, vocabulary=vocabulary)
    for one in read_validation(config, blend):
        with naming(one.name):
            found[one.name] = open_mixture(config, one.split, vocabulary=vocabulary, folder=one.folder)
    return found
