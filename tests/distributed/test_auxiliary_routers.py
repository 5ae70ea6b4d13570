"""Auxiliary routers under every layout: what they learn, their thresholds and what they decide equal one process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.module import Float16Module

from mmscale.config import Config
from mmscale.config.derived import global_micro_batches, with_auxiliary_routers
from mmscale.data.vocab import Vocabulary
from mmscale.model.auxiliary import RouterLearning
from mmscale.model.build import build_chunks, transformer_config
from mmscale.model.mixed_modal import Routing
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.auxiliary import AuxiliaryTrainer, figures, set_thresholds, summary
from mmscale.train.auxiliary_stage import take_step
from mmscale.train.batch import Batch, to_device
from mmscale.train.step import Stepper, mean_losses, reduce_sums
from mmscale.train.synthetic import SyntheticMixture
from mmscale.train.verify import with_share
from tests.distributed.layouts import config
from tests.distributed.test_layouts import FOUR_RANKS, TWO_RANKS
from tests.support import run_ranks

STEPS = 4
TOLERANCE = 2e-6  # as for the main model


@dataclass(frozen=True)
class Seen:
    """Numbers of the stage: cross entropy and gradient norm of each step, then held-out losses by routing."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    accuracy: float
    thresholds: tuple[float, ...]
    causal: dict[str, float]

    def differences(self, other: Seen) -> dict[str, float]:
        """Largest differences, relative for norms."""
        return {
            "loss": max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)),
            "norm": max(abs(a - b) / a for a, b in zip(self.norms, other.norms, strict=True)),
            "accuracy": abs(self.accuracy - other.accuracy),
            "causal": max(abs(value - other.causal[name]) for name, value in self.causal.items()),
        }


def settings(model: str, *, parallel: Mapping[str, Any] | None = None, dtype: str = "fp32") -> Config:
    """Routers in a small model, at a learning rate that makes them decide after a few steps."""
    made = with_auxiliary_routers(with_share(config(model, parallel=parallel, dtype=dtype)))
    optim = made.auxiliary.optim.model_copy(update={"lr": 1e-3})
    return made.model_copy(update={"auxiliary": made.auxiliary.model_copy(update={"optim": optim})})


def batches(made: Config, step: int, vocabulary: Vocabulary, *, routing: Routing = Routing.BATCH) -> list[Batch]:
    """This rank's part of a step's synthetic batch."""
    groups = process_groups.collection()
    share = made.model.experts.share
    assert isinstance(share, dict)
    mixture, per_step = SyntheticMixture(made, share=share), global_micro_batches(made)
    numbers = range(step * per_step + groups.dp.rank(), (step + 1) * per_step, groups.dp.size())
    return [to_device(mixture.micro_batch(n), vocabulary, routing=routing) for n in numbers]


def stage(made: Config) -> Seen:
    """Some steps of the stage from the run's initial weights, calibration, and what the routers then decide."""
    groups = process_groups.collection()
    transformer = transformer_config(made)
    models = build_chunks(made, groups, transformer=transformer)
    modules: Any = [Float16Module(transformer, m) if transformer.bf16 else m for m in models]
    trainer = AuxiliaryTrainer(made, transformer, modules, groups)
    stepper = Stepper(made, modules, None, groups)
    vocabulary = Vocabulary.from_config(made.vocab)
    losses, norms = [], []
    for step in range(STEPS):
        result = take_step(stepper, trainer, batches(made, step, vocabulary), lr=made.auxiliary.optim.lr)
        losses.append(summary(trainer.figures())["loss"])
        norms.append(result.grad_norm)
    measured = RouterLearning(gradients=False, histograms=True)
    own = batches(made, STEPS, vocabulary)
    for batch in own:
        batch.params.learning = measured
    stepper.evaluate(own)
    found = summary(figures(measured, groups))
    set_thresholds(measured, groups)
    causal = {}
    for routing in Routing:
        if routing is not Routing.THRESHOLD or made.model.keeps_thresholds:
            sums = stepper.evaluate(batches(made, STEPS, vocabulary, routing=routing))
            causal[routing.value] = mean_losses(reduce_sums(sums, groups), made.vocab.names)["loss"]
    (kind,) = {name for name in found if name.endswith("text/accuracy") or name == "experts/mixed/accuracy"} or {
        "depth/accuracy"
    }
    thresholds = tuple(float(b.mean()) for m in models for n, b in m.named_buffers() if n.endswith(".threshold"))
    return Seen(tuple(losses), tuple(norms), found[kind], thresholds, causal)


def under(made: Config) -> Seen:
    """The same with process groups around it."""
    parallel = made.parallel
    process_groups.initialize_layout(
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, seed=made.run.seed
    )
    try:
        return stage(made)
    finally:
        process_groups.destroy_layout()


def alone(model: str, file: Path) -> Seen:
    """The numbers of one process, from a forked rank."""

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        file.write_text(json.dumps(asdict(under(settings(model)))))
        process_groups.finalize()

    run_ranks(ranks_do, world_size=1)
    plain = json.loads(file.read_text())
    return Seen(*(tuple(v) if isinstance(v, list) else v for v in plain.values()))


def _compare(reference: Seen, model: str, world_size: int, layouts: Mapping[str, Mapping[str, Any]]) -> None:
    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        for name, parallel in layouts.items():
            found = reference.differences(under(settings(model, parallel=parallel)))
            # A score within rounding of a threshold may fall on the other side of it.
            accuracy, causal = found.pop("accuracy"), found.pop("causal")
            assert max(found.values()) <= TOLERANCE and accuracy <= 1e-3 and causal <= 2e-5, (name, found, causal)
        process_groups.finalize()

    run_ranks(ranks_do, world_size=world_size, timeout_s=240)


def _some(layouts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: layouts[name] for name in names}


@pytest.mark.parametrize("model", ["moma", "moma_depth", "moe", "moma_post_per_expert_shared"])
def test_two_ranks_equal_one_process(model: str, tmp_path: Path) -> None:
    reference = alone(model, tmp_path / "alone.json")
    assert reference.losses[-1] < reference.losses[0], "nothing was learned"
    assert reference.causal["batch"] != reference.causal["causal"] != reference.causal["top1"]
    _compare(reference, model, 2, _some(TWO_RANKS, ["dp2", "tp2", "pp2", "ep2", "pp2_interleaved"]))


@pytest.mark.parametrize("model", ["moma_depth"])
def test_four_ranks_equal_one_process(model: str, tmp_path: Path) -> None:
    reference = alone(model, tmp_path / "alone.json")
    _compare(reference, model, 4, _some(FOUR_RANKS, ["tp2_pp2", "tp2_ep2", "pp2_ep2", "dp2_ep2"]))
