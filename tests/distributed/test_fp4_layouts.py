"""Emulated NVFP4 with context and expert parallelism, and after a restart.

test_fp8_layouts.py has tensor and data parallelism.

A block of the weight's gradient is 16 rows that follow one another on a rank, and a tensor's factor is of all rows
that an expert gets at once. So only a dense model is the same computation under context parallelism, if each rank's
part of a document is whole blocks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmscale.config import Config
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.verify_layout import Trace, compare, with_share
from tests.distributed.layouts import LOSS_TOLERANCE, start, trace
from tests.distributed.test_fp8_layouts import CLOSE, FIRST_NORM, fp8
from tests.distributed.test_resume import STEPS, largest_difference, leg, tensors
from tests.support import run_ranks

WHOLE = 64  # a document of as many tokens has four parts of one block: two for each of two ranks
CP2, EP2 = {"cp": 2}, {"ep": 2}
# Model, layout and multiple of documents; whether the first step is that of one process.
LAYOUTS: tuple[tuple[str, dict[str, Any], int, bool], ...] = (
    ("dense", CP2, WHOLE, True),
    ("dense", CP2, 8, False),
    ("moma", CP2, WHOLE, False),
    ("moma", EP2, WHOLE, False),
)


def made(model: str, multiple: int, parallel: dict[str, Any] | None = None) -> Config:
    return fp8("nvfp4", model=model, data={"document_multiple": multiple}, parallel=parallel)


@pytest.mark.long
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(LAYOUTS[:2], id="dense"),
        pytest.param(LAYOUTS[2:], marks=pytest.mark.exhaustive, id="experts"),
    ],
)
def test_the_first_step_equals_one_process_where_blocks_do(
    chosen: tuple[tuple[str, dict[str, Any], int, bool], ...], tmp_path: Path
) -> None:
    """Where they do not, it is as close as after steps that round otherwise, and not closer."""

    def alone(ranks: RankEnv) -> None:
        groups.start(ranks)
        for model, multiple in {(model, multiple) for model, _, multiple, _ in chosen}:
            found = trace(made(model, multiple), ranks, steps=1)
            (tmp_path / f"{model}-{multiple}").write_text(json.dumps([found.losses, found.grad_norms]))
        groups.finalize()

    def together(ranks: RankEnv) -> None:
        groups.start(ranks)
        for model, parallel, multiple, same in chosen:
            reference = Trace(*map(tuple, json.loads((tmp_path / f"{model}-{multiple}").read_text())))
            loss, norm = compare(reference, trace(made(model, multiple, parallel), ranks, steps=1))
            seen = (model, parallel, multiple, loss, norm)
            assert (loss <= LOSS_TOLERANCE and norm <= FIRST_NORM["nvfp4"]) == same, seen
            assert max(loss, norm) <= CLOSE, seen
        groups.finalize()

    run_ranks(alone, world_size=1, timeout_s=600)
    run_ranks(together, world_size=2, timeout_s=600)


@pytest.mark.long
@pytest.mark.parametrize(
    "parallel",
    [pytest.param(EP2, id="ep"), pytest.param(CP2, marks=pytest.mark.exhaustive, id="cp")],
)
def test_random_rounding_goes_on_after_a_restart(parallel: dict[str, Any], tmp_path: Path) -> None:
    """Two steps, a checkpoint and two more are four in one go, bit for bit."""
    config = with_share(made("moma", WHOLE, parallel))
    assert config.precision.fp4_stochastic_rounding

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        whole, halves = tmp_path / "whole", tmp_path / "halves"
        uninterrupted = leg(config, whole, load=None, until=STEPS)
        first = leg(config, halves, load=None, until=2)
        assert first + leg(config, halves, load=2, until=STEPS) == uninterrupted
        assert largest_difference(tensors(whole, STEPS), tensors(halves, STEPS)) == 0.0
        groups.finalize()

    run_ranks(ranks_do, world_size=2, timeout_s=600)
