"""Every routing mode evaluates the same under every layout: experts, depth and both, in a run and in the router stage.

One sequence per micro-batch, routers before and after their first steps, and ranks whose micro-batch keeps no token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.config import Config
from mmscale.config.derived import global_micro_batches, with_auxiliary_routers
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.packed import pack_rows
from mmscale.data.vocab import Vocabulary
from mmscale.model.build import build_chunks, transformer_config
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.tables.routings import Routing
from mmscale.train.assembly import build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.proof.verify_layout import with_share
from mmscale.train.steps.auxiliary_routers import AuxiliaryTrainer
from mmscale.train.steps.batch import Batch, part_of, to_device
from mmscale.train.steps.evaluation import evaluate
from mmscale.train.steps.router_step import RouterStepper
from mmscale.train.steps.step import Stepper, Steps
from tests.distributed.layouts import config
from tests.support import run_ranks

TOLERANCE = 5e-7  # relative: 2e-6 of a loss near 4, as for training steps
STEPS = 2
HELD_OUT = 6  # micro-batches: with 4 a step the last step is filled up

ROUTED = {"experts": "moma_joint", "depth": "dense_depth_joint", "both": "moma_depth_joint", "uneven": "moma_7t1i"}
DATA = {"document_multiple": 4}  # for context parallelism
TWO_RANKS: dict[str, dict[str, Any]] = {
    "ep2": {"ep": 2},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {},
    "cp2": {"cp": 2},
}
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "tp2_ep2": {"tp": 2, "ep": 2},
    "cp2_ep4": {"cp": 2, "ep": 4},
    "cp2_tp2": {"cp": 2, "tp": 2},
}


@dataclass(frozen=True)
class HeldOut:
    """A pass over synthetic micro-batches of which every third holds padding only."""

    made: Config

    def len_epoch(self) -> int:
        """Micro-batches of the pass."""
        return HELD_OUT

    def micro_batch(self, number: int) -> MicroBatch:
        """The micro-batch with this number."""
        if number % 3 == 1:
            rows: list[list[np.ndarray]] = [[] for _ in range(self.made.train.micro_batch_size)]
            return pack_rows(rows, vocabulary=Vocabulary.from_config(self.made.vocab), seq_length=64)[0]
        return _mixture(self.made).micro_batch(1000 + number)

    def sequence_counts(self, number: int) -> Any:
        """Tokens of each modality in each sequence of a micro-batch."""
        ids = self.micro_batch(number).modality_ids
        return np.stack([(ids == modality).sum(axis=1) for modality in range(len(self.made.vocab.names))], axis=1)


def _mixture(made: Config) -> SyntheticMixture:
    share = made.model.experts.share
    assert isinstance(share, dict)
    return SyntheticMixture(made, share=share)


def _settings(routed: str, parallel: Mapping[str, Any], *, micro_batch: int) -> Config:
    model = ROUTED[routed]
    sizes = {"micro_batch_size": micro_batch, "global_batch_size": 4 * micro_batch}
    made = with_share(config(model, parallel=parallel, data=DATA, **sizes))
    # Routers that decide after a few steps.
    optim = made.auxiliary.optim.model_copy(update={"lr": 1e-3})
    return made.model_copy(update={"auxiliary": made.auxiliary.model_copy(update={"optim": optim})})


def _batches(made: Config, step: int) -> list[Batch]:
    own, per_step = part_of(process_groups.collection()), global_micro_batches(made)
    vocabulary = Vocabulary.from_config(made.vocab)
    return [to_device(content, vocabulary) for content in own.batch(_mixture(made), step * per_step, per_step)]


def _evaluations(made: Config, stepper: Steps, prefix: str) -> dict[str, float]:
    """Held-out losses of every routing mode."""
    mixture: Any = HeldOut(made)
    found = {}
    for routing in Routing:
        losses = evaluate(
            made,
            stepper=stepper,
            mixture=mixture,
            groups=process_groups.collection(),
            batches=None,
            routing=routing,
        )
        found |= {f"{prefix} {routing} {name}": value for name, value in losses.items()}
    return found


def in_a_run(made: Config) -> dict[str, float]:
    """Train with joint routers and averaged thresholds, and evaluate before and after."""
    parts = build(made, process_groups.collection())
    found = _evaluations(made, parts.stepper, "young")
    for step in range(STEPS):
        parts.stepper.train(_batches(made, step), lr=made.optim.lr)
    return found | _evaluations(made, parts.stepper, "trained")


def in_the_stage(made: Config) -> dict[str, float]:
    """Train the routers of a model that stays as it is, and evaluate before and after."""
    off = made.model.model_copy(update={"auxiliary": made.model.auxiliary.model_copy(update={"mode": "off"})})
    made = with_auxiliary_routers(made.model_copy(update={"model": off}))
    groups = process_groups.collection()
    transformer = transformer_config(made)
    models: Any = build_chunks(made, groups, transformer=transformer)
    trainer = AuxiliaryTrainer(made, transformer, models, groups)
    stepper = RouterStepper(Stepper(made, models, None, groups), trainer)
    found = _evaluations(made, stepper, "young")
    for step in range(STEPS):
        stepper.apply(stepper.compute(_batches(made, step)), lr=made.auxiliary.optim.lr)
    return found | _evaluations(made, stepper, "trained")


WAYS = {"run": in_a_run, "stage": in_the_stage}


def _under(way: str, made: Config) -> dict[str, float]:
    parallel = made.parallel
    process_groups.initialize_layout(tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, cp=parallel.cp)
    try:
        return WAYS[way](made)
    finally:
        process_groups.destroy_layout()


def _compare(
    routed: str, way: str, folder: Path, world_size: int, layouts: Mapping[str, Mapping[str, Any]], *, micro_batch: int
) -> None:
    """All layouts in one start of the ranks against one process."""
    file = folder / "alone.json"

    def alone(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        file.write_text(json.dumps(_under(way, _settings(routed, {}, micro_batch=micro_batch))))
        process_groups.finalize()

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        for layout, parallel in layouts.items():
            if parallel.get("ep", 1) > 1 and routed == "depth":
                continue  # no experts to spread
            found = _under(way, _settings(routed, parallel, micro_batch=micro_batch))
            assert found.keys() == wanted.keys()
            differences = {name: abs(value - wanted[name]) / wanted[name] for name, value in found.items()}
            worst = max(differences, key=lambda name: differences[name])
            assert differences[worst] <= TOLERANCE, (layout, worst, found[worst], wanted[worst])
        process_groups.finalize()

    run_ranks(alone, world_size=1)
    wanted: dict[str, float] = json.loads(file.read_text())
    assert len({wanted[f"trained {routing} loss"] for routing in Routing}) >= (3 if routed == "depth" else 4), wanted
    run_ranks(ranks_do, world_size=world_size, timeout_s=600)


# Those of `make test`: experts and stages on several ranks, of which not all have a loss.
SHORT = ("ep2", "pp2")


@pytest.mark.parametrize(
    "names",
    [SHORT, pytest.param([name for name in TWO_RANKS if name not in SHORT], marks=pytest.mark.long)],
    ids=["", "more"],
)
def test_a_run_evaluates_every_routing_mode_as_one_process(names: Sequence[str], tmp_path: Path) -> None:
    _compare("both", "run", tmp_path, 2, {name: TWO_RANKS[name] for name in names}, micro_batch=1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize(("world_size", "layouts"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two", "four"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("routed", ROUTED)
def test_every_routing_mode_equals_one_process(
    routed: str, way: str, world_size: int, layouts: dict[str, dict[str, Any]], micro_batch: int, tmp_path: Path
) -> None:
    _compare(routed, way, tmp_path, world_size, layouts, micro_batch=micro_batch)
