"""Nominal shares of the modalities, measured from a configuration's training data. Reads manifests only; no torch."""

from __future__ import annotations

from pathlib import Path

from mmscale.config import Config
from mmscale.config.derived import first_weights
from mmscale.data.holes import MEAN_SPANS, PER_SPAN
from mmscale.data.prepared.identity import selected
from mmscale.data.prepared.manifest import check_vocabulary, named_sources, parts_of, read_manifest
from mmscale.data.vocab import Vocabulary


def nominal_share(config: Config) -> dict[str, float]:
    """The share that determines static expert capacities: `model.experts.share`, or with `auto` that of the data.

    Raises:
        ConfigError: no data set is named.
        DataError: a data set is missing or damaged.
    """
    share = config.model.experts.share
    return share_of_data(config) if share == "auto" else dict(share)


def share_of_data(config: Config) -> dict[str, float]:
    """Share of each modality in the training tokens.

    The weights of a blend count sequences. Packed sequences are nearly full, so these weights are also used for tokens.
    If weights change during a run, the initial ones are used, so that the shares do not depend on the number of steps.

    Raises:
        ConfigError: no data set is named.
        DataError: a data set is missing or damaged.
    """
    entries = named_sources(config)
    weights = first_weights(config)
    share = dict.fromkeys(config.vocab.names, 0.0)
    for entry, weight in zip(entries, weights, strict=True):
        folder = Path(entry.path)
        manifest = read_manifest(folder)
        check_vocabulary(folder, manifest, Vocabulary.from_config(config.vocab))
        parts_of(folder, manifest, "train")
        weighted = selected(config, folder, manifest)
        own = manifest.share("train") if weighted is None else weighted.share()
        if weighted is None:
            documents = sum(part.documents for part in manifest.splits["train"].parts if not part.masked)
            per_token = documents / sum(manifest.splits["train"].tokens(name) for name in manifest.modalities)
        else:
            per_token = weighted.copies / sum(weighted.tokens.values())
        for name, part in _with_holes(own, config, documents=per_token).items():
            share[name] += weight / sum(weights) * part
    return share


def _with_holes(share: dict[str, float], config: Config, *, documents: float) -> dict[str, float]:
    """The share with the tokens that causal masking adds, which are text.

    Args:
        share: of the documents as they are stored.
        config: says how many documents are masked.
        documents: that are not conversations, per token. Each is assumed to have room for its spans.
    """
    added = documents * config.objective.cm3_rate * MEAN_SPANS * PER_SPAN
    text = config.vocab.names[0]
    return {name: (part + added * (name == text)) / (1.0 + added) for name, part in share.items()}
