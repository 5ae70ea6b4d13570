"""What a model was trained with in earlier attempts: of a run's checkpoint, and of its export."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from checkpoints_tools.huggingface.training_history import TrainingHistory
from mmscale.config import Config
from mmscale.config.load import resolve
from mmscale.data.stream.causal_masking import Masking
from mmscale.train.learned_data import LEARNED

MODEL = {"kind": "dense", "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
HALF, PARTS, TEXT = (Masking(0.5, "whole"), Masking(0.8, "partial"), Masking(0.3, "none"))


def config(masking: Masking | None) -> Config:
    objective = {} if masking is None else {"cm3_rate": masking.rate, "image_spans": masking.image_spans}
    base = {"model": MODEL | {"seq_length": 32}, "data": {"path": "d"}, "vocab": {"reserved": True}}
    return resolve({**base, "objective": objective})


def source(
    now: Masking | None, *masked: Masking | None, stream: bool = True, info: dict[str, Any] | None = None
) -> Any:
    """A checkpoint whose attempts masked like this, the newest last."""
    plain = [None if one is None else {"rate": one.rate, "image_spans": one.image_spans} for one in masked]
    part = {"path": "old", "identity": "a", "taken": 3}
    segments = [{"masking": one, "parts": [part]} for one in plain]
    return SimpleNamespace(
        config=config(now), stream=segments if stream else [], main=SimpleNamespace(info=lambda: info or {})
    )


@pytest.mark.parametrize(("masked", "learned"), [
    ((None,), None),
    ((HALF,), HALF),
    ((HALF, None), HALF),
    ((PARTS, None), PARTS),
    ((PARTS, HALF, None), Masking(0.5, "partial")),  # parts of images were learned too
    ((TEXT, HALF), HALF),
    ((None, TEXT, None, None), TEXT),
])  # fmt: skip
def test_masking(masked: tuple[Masking | None, ...], learned: Masking | None) -> None:
    found = TrainingHistory.of_run(source(masked[-1], *masked))
    assert found.masking == learned
    applied = found.applied_to(config(masked[-1]))
    assert bool(applied.objective.cm3_rate) == (learned is not None)
    if learned is not None:
        assert (applied.objective.cm3_rate, applied.objective.image_spans) == (learned.rate, learned.image_spans)
    assert applied.model_copy(update={"objective": config(masked[-1]).objective}) == config(masked[-1])
    held = json.loads(json.dumps(found.as_fields()))
    assert TrainingHistory.of_export(held, config(masked[-1])) == found


@pytest.mark.parametrize("now", [None, HALF])
def test_checkpoints_and_exports_of_earlier_versions(now: Masking | None) -> None:
    """They know their own settings only."""
    assert TrainingHistory.of_run(source(now, stream=False)) == TrainingHistory(now)
    assert TrainingHistory.of_export({}, config(now)) == TrainingHistory(now)


def test_data_that_was_read_before() -> None:
    tuned = {"sft": {LEARNED: [{"path": "main", "identity": "b"}]}}
    found = TrainingHistory.of_run(source(None, None, None, info=tuned))
    assert found.before == (("old", "a"), ("main", "b"))
    assert TrainingHistory.of_export(json.loads(json.dumps(found.as_fields())), config(None)) == found


@pytest.mark.parametrize("held", [
    {"masking": 3},
    {"masking": {"rate": "x", "image_spans": "whole"}},
    {"masking": {"rate": 1.0, "image_spans": "all"}},
    {"read_before": [1]},
])  # fmt: skip
def test_damaged_settings_of_an_export(held: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError, KeyError)):
        TrainingHistory.of_export(held, config(None))
