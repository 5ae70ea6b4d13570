"""What a checkpoint keeps besides tensors, and when a checkpoint is refused as another model's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmscale.checkpoint.shape import check_shape, shape_of
from mmscale.config import Config
from mmscale.config.load import resolve
from mmscale.errors import CheckpointError
from mmscale.resilience.anomaly import AnomalyHistory
from mmscale.train.state.train_state import TrainState

MOMA: dict[str, Any] = {
    "vocab": {"modalities": [{"name": "text", "size": 64}, {"name": "image", "size": 64}]},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 64,
        "experts": {"counts": {"text": 2, "image": 2}},
        "depth": {"every": 2, "capacity": 0.5, "multiple": 8},
    },
}


def config(*overrides: str) -> Config:
    return resolve(MOMA, overrides)


def saved(*overrides: str) -> dict[str, Any]:
    """The shape as it comes back from a checkpoint: through JSON, which knows no tuples."""
    shape: dict[str, Any] = json.loads(json.dumps(shape_of(config(*overrides))))
    return shape


def test_the_counters_go_out_and_come_back() -> None:
    state = TrainState([], None, step=7, sequences=56, tokens=1000, modality_tokens={"text": 600, "image": 400})
    kept = state.sharded(loading=False)
    assert json.loads(json.dumps(kept)) == kept  # plain data
    state.modality_tokens["text"] = 0  # what was kept is a copy
    other = TrainState([], None)
    other.restore(kept)
    assert other == TrainState([], None, step=7, sequences=56, tokens=1000, modality_tokens={"text": 600, "image": 400})


def test_anomalies_go_out_and_come_back_and_may_be_missing() -> None:
    """A checkpoint from before they were kept is no reason to refuse: nothing was skipped then."""
    history = AnomalyHistory(series={"loss": [0.1, 1 / 3]}, counts={"skip": 1}, spent=1, skipped=[[8, 16]])
    kept = TrainState([], None, step=7, anomalies=history).sharded(loading=False)
    assert json.loads(json.dumps(kept)) == kept
    other = TrainState([], None)
    other.restore(kept)
    assert other.anomalies == history and other.anomalies is not history
    del kept["progress"]["anomalies"]
    other.restore(kept)  # as on a roll-back, which must not keep what was there
    assert (other.step, other.anomalies) == (7, AnomalyHistory())


def test_loading_asks_for_no_counters() -> None:
    """They come with the common part of a checkpoint; asking for them by value would demand that they are equal."""
    assert TrainState([], None, step=3).sharded(loading=True) == {}


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=5",
        "optim.lr=1",
        "parallel.tp=2",
        "precision.dtype=fp32",
        "run.seed=3",
        "model.experts.noise=gumbel",
    ],
)
def test_settings_that_no_tensor_depends_on_may_change(override: str) -> None:
    check_shape(config(override), saved(), where="here")


@pytest.mark.parametrize(
    "override",
    [
        "model.num_layers=4",
        "model.hidden_size=64",
        "model.ffn_hidden_size=128",
        "model.num_attention_heads=2",
        "model.num_query_groups=2",
        "model.kv_channels=16",
        "model.qk_norm=false",
        "model.norm=post",
        "model.tie_embeddings=true",
        "model.experts.counts.text=4",
        "model.experts.shared=1",
        "model.depth=null",
        "vocab.modalities.0.size=65",
        "vocab.modalities.1.name=speech model.experts.counts={text: 2, speech: 2}",
        "model.kind=moe model.experts.counts={mixed: 2}",
    ],
)
def test_another_model_is_refused_with_the_setting_that_differs(override: str) -> None:
    changes = override.replace(" model.experts", "\nmodel.experts").split("\n")
    with pytest.raises(CheckpointError, match="holds another model") as raised:
        check_shape(config(*changes), saved(), where="runs/x/checkpoints/step_00000010")
    assert changes[0].split("=")[0].rsplit(".", 1)[0].replace(".0", "").replace(".1", "") in raised.value.cause
    assert "runs/x/checkpoints/step_00000010" in raised.value.cause
    assert "\n" not in raised.value.cause and "run.name" in raised.value.remedy


def test_all_differences_are_named_at_once() -> None:
    with pytest.raises(CheckpointError) as raised:
        check_shape(config("model.num_layers=4", "model.hidden_size=64"), saved(), where="here")
    assert "model.num_layers was 2, is 4" in raised.value.cause
    assert "model.hidden_size was 32, is 64" in raised.value.cause


def test_a_checkpoint_of_an_older_version_without_a_setting_is_refused_not_guessed() -> None:
    shape = saved()
    del shape["model.qk_norm"]
    with pytest.raises(CheckpointError, match=r"model\.qk_norm was None"):
        check_shape(config(), shape, where="here")
