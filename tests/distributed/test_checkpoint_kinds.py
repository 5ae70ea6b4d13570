"""A checkpoint whose tensors are not what their names say is refused: by a load on all ranks, by tools, by `verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_tools import folders
from checkpoints_tools.copying import archive
from checkpoints_tools.sources import open_source
from mmscale.checkpoint.kinds import KINDS, wrong_types
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.errors import CheckpointError
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.state.train_state import TrainState
from tests.distributed.test_resume import settings, start, train
from tests.support import run_ranks

STATE = "optimizer.state."


def _remainders(master: Tensor) -> Tensor:
    """The lower halves of fp32 numbers, as megatron-core's `store_param_remainders` keeps them."""
    return master.contiguous().view(torch.int16)[..., ::2].contiguous()


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


# Which tensors, what happens to them (types on all ranks, values on the last rank), what a load says.
TYPES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "remainders": (f"{STATE}param.", _remainders, "is int16, but a master weight is float32"),
    "rounded_masters": (f"{STATE}param.", Tensor.bfloat16, "is bfloat16, but a master weight is float32"),
    "codes": (f"{STATE}exp_avg_sq.", Tensor.byte, "is uint8 without its scales optimizer.state.exp_avg_sq_scale."),
    "integer_moments": (f"{STATE}exp_avg.", Tensor.int, "is int32, but a moment of Adam is"),
    "integer_weights": ("decoder.final_layernorm.weight", Tensor.short, "is int16, but a weight is float32"),
}
VALUES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "nan_weight": ("decoder.layers.0.mlp.experts", _with(float("nan")), "holds values that are not finite"),
    "infinite_moment": (f"{STATE}exp_avg.", _with(float("inf")), "holds values that are not finite"),
    "negative_moment": (f"{STATE}exp_avg_sq.", _with(-1.0), "holds second moments below zero"),
}


class Tampered(TrainState):
    """A run's state, of which some tensors are written changed."""

    case: tuple[str, Callable[[Tensor], Tensor], str]
    everywhere: bool

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        state = super().sharded(loading=loading)
        if not loading and (self.everywhere or torch.distributed.get_rank() == 1):
            for entry in _tensors(state):
                if entry.key.startswith(self.case[0]):
                    entry.data = self.case[1](entry.data.detach())
                    entry.dtype = entry.data.dtype
        return state


def _tensors(part: Any) -> Iterator[Any]:
    if isinstance(part, dict | list):
        for value in part.values() if isinstance(part, dict) else part:
            yield from _tensors(value)
    elif hasattr(part, "global_shape"):
        yield part


def test_a_load_refuses_what_names_do_not_promise(tmp_path: Path) -> None:
    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        config = settings("moma", parallel={"ep": 2})
        parts = build(config, process_groups.initialize_layout(ep=2))
        train(config, parts, TrainState(parts.chunks, parts.optimizer), until=1)  # makes the moments
        options: dict[str, Any] = {"every": 0, "keep": 9, "attempt": 1, "info": {}, "on_event": lambda *_, **__: None}
        managers = {name: CheckpointManager(tmp_path / name, **options) for name in (*TYPES, *VALUES)}
        for name, checkpoints in managers.items():
            state = Tampered(parts.chunks, parts.optimizer, step=2)
            state.case, state.everywhere = TYPES.get(name) or VALUES[name], name in TYPES
            checkpoints.save(state, last=True)
        for name, checkpoints in managers.items():
            case = TYPES.get(name) or VALUES[name]
            with pytest.raises(CheckpointError, match=case[2]) as raised:  # on both ranks, or this test would hang
                checkpoints.load(TrainState(parts.chunks, parts.optimizer), 2)
            assert raised.value.remedy
        process_groups.finalize()

    def tools_do(ranks: RankEnv) -> None:
        for name, (_, _, message) in TYPES.items():
            result = folders.verify(tmp_path / name)
            assert not result["whole"] and message in result["checkpoints"][0]["problems"][0], name
            weights = name == "integer_weights"
            if name != "codes":  # one tensor alone does not show that scales are missing
                with pytest.raises(CheckpointError, match=message):
                    archive(tmp_path / name, 2, tmp_path / f"{name}_archive", weights=weights)
            if not weights:  # the way out that the message names
                archive(tmp_path / name, 2, tmp_path / f"{name}_weights", weights=True)
                assert folders.verify(tmp_path / f"{name}_weights")["whole"]
                assert open_source(tmp_path / f"{name}_weights", None).names()
        assert all(folders.verify(tmp_path / name)["whole"] for name in VALUES)  # its digests and types are right

    run_ranks(ranks_do, world_size=2, timeout_s=600)
    run_ranks(tools_do, world_size=1)  # tensorstore works in no fork of a process that has used it


def test_every_kind_has_a_type_that_it_refuses() -> None:
    """The table against names as checkpoints have them."""
    names = {
        "a master weight": f"{STATE}param.output_layer.weight",
        "the scale of a moment": f"{STATE}exp_avg_sq_scale.output_layer.weight",
        "a moment of Adam": f"{STATE}exp_avg.output_layer.weight",
        "the state of an optimizer": "optimizer.state.momentum.output_layer.weight",
        "an FP8 scaling state": "decoder.layers.0.mlp.experts.text.w1.fp8_state",
        "a weight": "decoder.layers.0.mlp.router.text",
    }
    assert [kind.what for kind in KINDS] == list(names)
    for kind in KINDS:
        name = names[kind.what]
        assert wrong_types({name: "int16"}) == [f"{name} is int16, but {kind.what} is {' or '.join(kind.dtypes)}"]
        for dtype in kind.dtypes:
            assert wrong_types({name: dtype}, alone=True) == []
