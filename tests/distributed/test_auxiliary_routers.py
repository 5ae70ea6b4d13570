"""Auxiliary routers under every layout: what they learn, their thresholds and what they decide equal one process."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.checkpoint.sharded import metadata
from mmscale.config import Config
from mmscale.config.derived import global_micro_batches, with_auxiliary_routers
from mmscale.data.vocab import Vocabulary
from mmscale.model.auxiliary import RouterLearning
from mmscale.model.build import build_chunks, transformer_config
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.tables.routings import Routing
from mmscale.train.assembly import build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.proof.verify_layout import with_share
from mmscale.train.state.router_state import RouterState
from mmscale.train.steps.auxiliary_routers import AuxiliaryTrainer, figures, set_thresholds, summary
from mmscale.train.steps.batch import Batch, part_of, to_device
from mmscale.train.steps.router_step import RouterStepper
from mmscale.train.steps.step import Stepper, StepResult, mean_losses, reduce_sums
from tests.distributed.layouts import config
from tests.distributed.test_layouts import FOUR_RANKS, TWO_RANKS
from tests.distributed.test_resume import largest_difference, start, tensors
from tests.support import run_ranks

STEPS = 4
CLIP = 0.1  # below the norms of the first steps
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


def settings(
    model: str, *, parallel: Mapping[str, Any] | None = None, dtype: str = "fp32", document_multiple: int = 1
) -> Config:
    """Routers in a small model, at a learning rate that makes them decide after a few steps."""
    data = {"document_multiple": document_multiple}
    made = with_auxiliary_routers(with_share(config(model, parallel=parallel, dtype=dtype, data=data)))
    optim = made.auxiliary.optim.model_copy(update={"lr": 1e-3})
    return made.model_copy(update={"auxiliary": made.auxiliary.model_copy(update={"optim": optim})})


def batches(made: Config, step: int, vocabulary: Vocabulary, *, routing: Routing = Routing.BATCH) -> list[Batch]:
    """This rank's part of a step's synthetic batch."""
    groups = process_groups.collection()
    share = made.model.experts.share
    assert isinstance(share, dict)
    mixture, per_step = SyntheticMixture(made, share=share), global_micro_batches(made)
    mine = part_of(groups).batch(mixture, step * per_step, per_step)
    return [to_device(content, vocabulary, routing=routing) for content in mine]


def take_step(stepper: RouterStepper, batches: Sequence[Batch], *, lr: float) -> StepResult:
    """A step as the trainer takes it where nothing is to be judged."""
    return stepper.apply(stepper.compute(batches), lr=lr)


def built(made: Config, groups: ProcessGroupCollection) -> tuple[list[Any], AuxiliaryTrainer, RouterStepper]:
    """The model's chunks, the trainer of their routers and the steps of the stage."""
    transformer = transformer_config(made)
    models = build_chunks(made, groups, transformer=transformer)
    modules: Any = [Float16Module(transformer, m) if transformer.bf16 else m for m in models]
    trainer = AuxiliaryTrainer(made, transformer, modules, groups)
    return models, trainer, RouterStepper(Stepper(made, modules, None, groups), trainer)


def stage(made: Config) -> Seen:
    """Some steps of the stage from the run's initial weights, calibration, and what the routers then decide."""
    groups = process_groups.collection()
    models, _, stepper = built(made, groups)
    vocabulary = Vocabulary.from_config(made.vocab)
    losses, norms = [], []
    for step in range(STEPS):
        result = take_step(stepper, batches(made, step, vocabulary), lr=made.auxiliary.optim.lr)
        losses.append(stepper.figures()["loss"])
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
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, cp=parallel.cp, seed=made.run.seed
    )
    try:
        return stage(made)
    finally:
        process_groups.destroy_layout()


def alone(model: str, file: Path, **options: Any) -> Seen:
    """The numbers of one process, from a forked rank. Options: `settings`."""

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        file.write_text(json.dumps(asdict(under(settings(model, **options)))))
        process_groups.finalize()

    run_ranks(ranks_do, world_size=1)
    plain = json.loads(file.read_text())
    return Seen(*(tuple(v) if isinstance(v, list) else v for v in plain.values()))


def _compare(
    reference: Seen, model: str, world_size: int, layouts: Mapping[str, Mapping[str, Any]], **options: Any
) -> None:
    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        for name, parallel in layouts.items():
            found = reference.differences(under(settings(model, parallel=parallel, **options)))
            # A score within rounding of 0.5 may fall on the other side of it.
            accuracy, causal = found.pop("accuracy"), found.pop("causal")
            assert max(found.values()) <= TOLERANCE and accuracy <= 1e-3 and causal <= TOLERANCE, (name, found, causal)
        process_groups.finalize()

    run_ranks(ranks_do, world_size=world_size, timeout_s=600)


def _some(layouts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: layouts[name] for name in names}


@pytest.mark.parametrize(
    "model",
    ["moma_depth", *(pytest.param(m, marks=pytest.mark.exhaustive) for m in ("moma", "moma_post_per_expert_shared"))],
)
def test_two_ranks_equal_one_process(model: str, tmp_path: Path) -> None:
    reference = alone(model, tmp_path / "alone.json")
    assert reference.losses[-1] < reference.losses[0], "nothing was learned"
    assert reference.causal["batch"] != reference.causal["causal"] != reference.causal["top1"]
    _compare(reference, model, 2, _some(TWO_RANKS, ["dp2", "tp2", "ep2", "pp2_interleaved"]))


@pytest.mark.long
def test_a_pipeline_stage_without_routers(tmp_path: Path) -> None:
    """A dense model whose first layer alone is a Mixture-of-Depths layer."""
    reference = alone("dense_depth_first", tmp_path / "alone.json")
    assert reference.causal["batch"] != reference.causal["causal"]
    _compare(reference, "dense_depth_first", 2, _some(TWO_RANKS, ["tp2", "pp2", "pp2_interleaved"]))

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        made = settings("dense_depth_first", parallel={"pp": 2})
        whole = _resumed(made, tmp_path / "whole", load=None, until=3)
        halves = _resumed(made, tmp_path / "halves", load=None, until=2)
        halves += _resumed(made, tmp_path / "halves", load=2, until=3)
        assert halves == whole
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["moma_depth"])
def test_four_ranks_equal_one_process(model: str, tmp_path: Path) -> None:
    reference = alone(model, tmp_path / "alone.json")
    _compare(reference, model, 4, _some(FOUR_RANKS, ["tp2_ep2", "pp2_ep2"]))


@pytest.mark.long
def test_split_sequences_equal_one_process(tmp_path: Path) -> None:
    """Context parallelism: routers of experts and of Mixture-of-Depths layers learn from the tokens of all ranks."""
    reference = alone("moma_depth", tmp_path / "alone.json", document_multiple=8)
    assert reference.losses[-1] < reference.losses[0] and any(reference.thresholds)
    layouts = {"cp2_ep2": {"cp": 2, "ep": 2}}
    _compare(reference, "moma_depth", 2, layouts, document_multiple=8)


@pytest.mark.exhaustive
def test_more_splits_equal_one_process(tmp_path: Path) -> None:
    reference = alone("moma_depth", tmp_path / "alone.json", document_multiple=8)
    _compare(reference, "moma_depth", 2, {"cp2": {"cp": 2}}, document_multiple=8)
    _compare(reference, "moma_depth", 4, {"cp2_tp2": {"cp": 2, "tp": 2}}, document_multiple=8)


def _resumed(made: Config, folder: Path, *, load: int | None, until: int) -> list[tuple[float, float]]:
    """Fresh process groups and model, the stage from a checkpoint or from its start, and a checkpoint at the end."""
    parallel = made.parallel
    groups = process_groups.initialize_layout(
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, cp=parallel.cp, seed=made.run.seed
    )
    try:
        models, trainer, stepper = built(made, groups)
        vocabulary = Vocabulary.from_config(made.vocab)
        state = RouterState(models, trainer, metadata=metadata())
        checkpoints = CheckpointManager(folder, every=0, keep=9, attempt=1, info={}, on_event=lambda *_, **__: None)
        if load is not None:
            checkpoints.load(state, load)
        taken = []
        while state.step < until:
            batch = batches(made, state.step, vocabulary)
            result = take_step(stepper, batch, lr=made.auxiliary.optim.lr)
            state.step += 1
            taken.append((stepper.figures()["loss"], result.grad_norm))
        checkpoints.save(state)
        return taken
    finally:
        process_groups.destroy_layout()


@pytest.mark.parametrize(
    ("model", "dtype"), [("moma_depth", "fp32"), pytest.param("moma", "bf16", marks=pytest.mark.long)]
)
def test_the_stage_goes_on_exactly_and_under_other_layouts(model: str, dtype: str, tmp_path: Path) -> None:
    """Four steps equal two, a checkpoint of the routers alone, and two more: bit for bit; elsewhere up to rounding."""

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        made = settings(model, parallel={"tp": 2}, dtype=dtype)
        whole = _resumed(made, tmp_path / "whole", load=None, until=4)
        halves = _resumed(made, tmp_path / "halves", load=None, until=2)
        halves += _resumed(made, tmp_path / "halves", load=2, until=4)
        assert halves == whole
        one, other = tensors(tmp_path / "whole", 4), tensors(tmp_path / "halves", 4)
        assert largest_difference(one, other) == 0.0
        assert {key for key in one if "auxiliary" not in key} == set(), "main weights were saved again"
        assert any(key.endswith("threshold") for key in one)
        for number, layout in enumerate(({"pp": 2, "vpp": 2}, {"ep": 2}) if dtype == "fp32" else ()):
            folder = tmp_path / f"other_{number}"
            shutil.copytree(tmp_path / "halves", folder) if ranks.rank == 0 else None
            torch.distributed.barrier()
            elsewhere = _resumed(settings(model, parallel=layout), folder, load=2, until=4)
            for (loss, norm), (wanted_loss, wanted_norm) in zip(elsewhere, whole[2:], strict=True):
                assert abs(loss - wanted_loss) <= TOLERANCE and abs(norm / wanted_norm - 1) <= TOLERANCE, layout
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2, timeout_s=600)


def _main_steps(made: Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All parameters and thresholds of this rank after some steps of the main run, and what they were."""
    parallel = made.parallel
    groups = process_groups.initialize_layout(
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, cp=parallel.cp, seed=made.run.seed
    )
    try:
        parts = build(made, groups)
        vocabulary = Vocabulary.from_config(made.vocab)

        def values() -> dict[str, Tensor]:
            return {
                f"{number}.{name.replace('module.', '')}": value.detach().clone()
                for number, chunk in enumerate(parts.chunks)
                for name, value in [*chunk.named_parameters(), *chunk.named_buffers()]
            }

        before = values()
        for step in range(3):
            result = parts.stepper.train(batches(made, step, vocabulary), lr=made.optim.lr)
            assert result.applied
            clipped = result.grad_norm > made.optim.clip_grad
            assert clipped == (made.optim.clip_grad == CLIP), "clipping must matter where it is asked for"
        return values(), before
    finally:
        process_groups.destroy_layout()


@pytest.mark.parametrize(
    "layouts",
    [
        [{"tp": 2}, {"ep": 2, "overlap_grad_reduce": True}],
        pytest.param([{}, {"pp": 2, "recompute": "full"}], marks=pytest.mark.exhaustive),
    ],
    ids=["", "rest"],
)
def test_joint_routers_do_not_move_the_main_model_by_a_bit(layouts: list[dict[str, Any]]) -> None:
    """With clipping, whose norm would see any gradient of theirs; in layouts and with recompute."""

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        for parallel in layouts:
            joint = with_share(config("moma_depth_joint", parallel=parallel))
            joint = joint.model_copy(update={"optim": joint.optim.model_copy(update={"clip_grad": CLIP})})
            plain = config("moma_depth", parallel=parallel).model_copy(update={"optim": joint.optim})
            found, before = _main_steps(joint)
            wanted, _ = _main_steps(with_share(plain))
            assert wanted.keys() < found.keys()
            for name, value in wanted.items():
                assert torch.equal(value, found[name]), (parallel, name)
            learned = [name for name in found if name.endswith((".hidden", ".out"))]
            assert learned and all(not torch.equal(found[name], before[name]) for name in learned), parallel
            averaged = [name for name in found if "threshold." in name]
            assert averaged and all(not torch.equal(found[name], before[name]) for name in averaged), parallel
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2, timeout_s=600)


@pytest.mark.long
def test_averaged_thresholds_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    def thresholds(parallel: Mapping[str, Any]) -> dict[str, float]:
        made = with_share(config("moma_depth_joint", parallel=parallel))
        return {name: float(value.sum()) for name, value in _main_steps(made)[0].items() if "threshold." in name}

    def reference(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        (tmp_path / "alone.json").write_text(json.dumps(thresholds({})))
        process_groups.finalize()

    run_ranks(reference, world_size=1)
    wanted = json.loads((tmp_path / "alone.json").read_text())

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        for parallel in ({"ep": 2}, {"tp": 2, "recompute": "full"}):
            found = thresholds(parallel)
            assert found.keys() == wanted.keys()
            assert max(abs(found[name] - wanted[name]) for name in wanted) < 1e-5, (parallel, found, wanted)
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2, timeout_s=600)


def test_a_gradient_that_is_not_finite_changes_no_router() -> None:
    """Seen by one rank, refused by all."""

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        made = settings("moma_depth")
        groups = process_groups.initialize_layout(tp=1, pp=1, vpp=None, ep=1, seed=made.run.seed)
        transformer = transformer_config(made)
        models: Any = build_chunks(made, groups, transformer=transformer)
        trainer = AuxiliaryTrainer(made, transformer, models, groups)
        stepper = RouterStepper(Stepper(made, models, None, groups), trainer)
        vocabulary = Vocabulary.from_config(made.vocab)
        assert take_step(stepper, batches(made, 0, vocabulary), lr=1e-3).applied
        before = [p.detach().clone() for p in trainer.module.parameters()]
        own = batches(made, 1, vocabulary)
        stepper.accumulate(own)
        if ranks.rank == 1:
            next(iter(trainer.learning.records.values())).router.out.main_grad[0, 0] = float("nan")
        assert math.isnan(trainer.measure().grad_norm) and not trainer.step(lr=1e-3)
        assert all(torch.equal(p, was) for p, was in zip(trainer.module.parameters(), before, strict=True))
        assert take_step(stepper, batches(made, 2, vocabulary), lr=1e-3).applied
        process_groups.destroy_layout()
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2)
