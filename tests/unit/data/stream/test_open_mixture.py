"""A stream from a configuration: its blend, its share, its cache, and what is missing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.config import Config
from mmscale.data.prepared.share import nominal_share
from mmscale.data.stream.mixture import open_mixture
from mmscale.data.stream.source import Source
from mmscale.errors import ConfigError, DataError
from tests.unit.data.corpora import THREE, VOCABULARY, corpus, document, prepare
from tests.unit.data.stream.mixtures import (
    OPTIONS,
    SEQ,
    digest,
    mix,
)

# From a configuration


def config(**data: Any) -> Config:
    model = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "seq_length": SEQ}
    vocab = {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 32}]}
    return Config.model_validate({"model": model, "vocab": vocab, "data": data, "train": {"micro_batch_size": 2}})


def test_tables_are_asked_once_for_a_sequence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, asked = mix(folder), Counter[str]()
    mixture.counts(0)  # deals the window
    rows = Source.rows

    def counted(self: Source, documents: np.ndarray) -> Any:
        asked["rows"] += 1
        return rows(self, documents)

    monkeypatch.setattr(Source, "rows", counted)
    mixture.micro_batch(0)
    assert asked["rows"] == OPTIONS["micro_batch_size"]


@pytest.mark.parametrize("changes", [{}, {"seed": 4}, {"seq_length": 256, "order": "blocks"}])
def test_a_stream_like_another(changes: dict[str, Any], folder: Path) -> None:
    """Equal to one that is made with these arguments, also of a pass; the other stays what it is."""
    for once in (False, True):
        first = mix(folder, once=once)
        before = [digest(first.micro_batch(index)) for index in range(4)]
        like, made = first.like(**changes), mix(folder, **{"once": once, **changes})
        assert [digest(like.micro_batch(index)) for index in range(4)] == [
            digest(made.micro_batch(index)) for index in range(4)
        ]
        assert [digest(first.micro_batch(index)) for index in range(4)] == before


def test_open_mixture_trains_endlessly_and_evaluates_once(folder: Path, tmp_path: Path) -> None:
    held_out = prepare(tmp_path / "set", corpus(9, seed=9), split="validation")
    endless = open_mixture(config(path=str(folder)), "train", vocabulary=VOCABULARY)
    assert not endless.once
    assert endless.micro_batch(0).tokens.shape == (2, SEQ)
    assert open_mixture(config(path=str(held_out)), "validation", vocabulary=VOCABULARY).once


def test_open_mixture_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither data\.path nor data\.blend"):
        open_mixture(config(), "train", vocabulary=VOCABULARY)
    with pytest.raises(DataError, match="no folder"):
        open_mixture(config(path=str(tmp_path / "nowhere")), "train", vocabulary=VOCABULARY)
    with pytest.raises(DataError, match="another vocabulary"):
        open_mixture(config(path=str(folder)), "train", vocabulary=THREE)
    with pytest.raises(DataError, match=r"document \d+ has \d+ tokens, model\.seq_length is 16"):
        mix(folder, seq_length=16)


def test_nominal_share_weighs_the_blend(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    text = prepare(tmp_path / "text", [document(n, text=9, rng=rng) for n in range(9)])
    alone = nominal_share(config(path=str(folder)))
    assert sum(alone.values()) == pytest.approx(1.0)
    assert 0 < alone["image"] < 1
    blend = [{"path": str(folder), "weight": 1}, {"path": str(text), "weight": 3}]
    assert nominal_share(config(blend=blend))["image"] == pytest.approx(alone["image"] / 4)
    fixed = config(path=str(folder)).model_dump()
    fixed["model"]["experts"]["share"] = {"text": 0.25, "image": 0.75}
    assert nominal_share(Config.model_validate(fixed)) == {"text": 0.25, "image": 0.75}
    with pytest.raises(ConfigError, match="neither"):
        nominal_share(config())


def test_the_cache_lies_beside_the_data(folder: Path) -> None:
    mix(folder)
    assert any((folder / ".cache").iterdir())
