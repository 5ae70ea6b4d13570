"""Muon: every parallel layout equals one process, because every matrix is orthogonalised whole by one owner.

Losses, gradient norms and every tensor of a checkpoint are compared, with the tolerances of test_layouts.py. Momentum
is Adam's first moment by name and scale, so that the comparison of gradients is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.config import Config
from mmscale.errors import ConfigError
from mmscale.layers import model_tensors
from mmscale.layers.matrices import is_hidden_matrix
from mmscale.plan import MessageKind, Operation, communication, rank_memory
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.optim.muon import Muon
from mmscale.train.proof.verify_layout import Trace, compare, with_share
from mmscale.train.state.train_state import TrainState
from tests.distributed.layouts import LOSS_TOLERANCE, NORM_TOLERANCE, References, assert_passes, judge, start, trace
from tests.distributed.layouts import config as plain_config
from tests.distributed.test_fp8_layouts import CLOSE, with_recipe
from tests.distributed.test_moments_layouts import copied, kept
from tests.distributed.test_resume import STEPS, leg, settings, tensors, train
from tests.support import run_ranks
from tests.unit.train.optim.test_muon import reference, true_matrices

MUON = {"optimizer": "muon"}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp2": {},
        "tp2": {"tp": 2},
        "pp2": {"pp": 2},
        "ep2": {"ep": 2},
        "cp2": {"cp": 2},
        "pp2_interleaved": {"pp": 2, "vpp": 2},
        "dp2_overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    },
    4: {
        "tp2_dp2": {"tp": 2},
        "tp2_ep2": {"tp": 2, "ep": 2},
        "tp2_pp2": {"tp": 2, "pp": 2},
        "dp2_ep2": {"ep": 2},
        "cp2_tp2": {"cp": 2, "tp": 2},
    },
}
_SPREAD = ("moma", "moe")  # kinds whose experts can be distributed


def config(model: str, *, padded: bool = False, **options: Any) -> Config:
    """A model of the layout tests with Muon; `padded`: documents as in test_context_parallel.py."""
    return plain_config(model, data={"document_multiple": 8 if padded else 1}, optim=MUON, **options)


def layouts_of(model: str, world_size: int) -> dict[str, dict[str, Any]]:
    """The layouts that a model can have."""
    spread = model.startswith(_SPREAD)
    return {name: parallel for name, parallel in LAYOUTS[world_size].items() if spread or "ep" not in parallel}


def equals_one_process(
    references: References, model: str, world_size: int, names: Sequence[str], folder: Path, **options: Any
) -> None:
    """Layouts of a model one after another in one set of ranks."""
    for padded in (False, True):
        references.get(config(model, padded=padded, **options))

    def steps(ranks: RankEnv) -> None:
        start(ranks)
        for name in names:
            parallel = LAYOUTS[world_size][name]
            made = config(model, parallel=parallel, padded="cp" in parallel, **options)
            assert_passes(judge(references, made, ranks, folder / name), f"muon {model} {name}")
        groups.finalize()

    run_ranks(steps, world_size=world_size, timeout_s=600)


# Every change has each kind of parallelism once, `make test` some of them; the rest is exhaustive.
ALWAYS: dict[tuple[str, int], tuple[str, ...]] = {
    ("moma_depth", 2): ("ep2", "cp2", "pp2_interleaved"),
    ("mot", 2): ("tp2", "dp2_overlap"),
    ("moma", 4): ("tp2_ep2", "dp2_ep2"),
}
MODELS = (
    *("dense", "moma_7t1i", "moma_token_choice", "moma_one_kv_head", "moe", "moma_untied"),
    *("moma_post_per_expert_shared", "moma_depth", "mot"),
)


def _rest(model: str, size: int) -> tuple[str, ...]:
    return tuple(name for name in layouts_of(model, size) if name not in ALWAYS.get((model, size), ()))


@pytest.mark.parametrize(
    ("model", "world_size", "names"),
    [
        *(
            pytest.param(
                *(model, size, names), id=f"{model}-{size}", marks=() if model == "moma_depth" else pytest.mark.long
            )
            for (model, size), names in ALWAYS.items()
        ),
        *(
            pytest.param(model, size, _rest(model, size), id=f"{model}-{size}-rest", marks=pytest.mark.exhaustive)
            for model, size in [*((model, size) for model in MODELS for size in LAYOUTS), ("moma", 4)]
        ),
    ],
)
def test_layouts_equal_one_process(
    references: References, model: str, world_size: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    equals_one_process(references, model, world_size, names, tmp_path)


def with_optim(made: Config, **values: Any) -> Config:
    """The configuration with other settings of the main optimizer."""
    optim = made.optim.model_validate(made.optim.model_dump() | values)
    return made.model_copy(update={"optim": optim})


def expected(made: Config, name: str, weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """A weight after some steps of the same learning rate, in fp64: Muon matrix by matrix, or AdamW."""
    optim, first = made.optim, torch.zeros_like(weight)
    second = torch.zeros_like(weight)
    decay = optim.weight_decay if weight.ndim > 1 else 0.0
    hidden = {tensor.name: is_hidden_matrix(tensor) for tensor in model_tensors(made)}[name]
    for step, gradient in enumerate(gradients, start=1):
        weight = weight * (1 - optim.lr * decay)
        if not hidden:
            first = optim.beta1 * first + (1 - optim.beta1) * gradient
            second = optim.beta2 * second + (1 - optim.beta2) * gradient**2
            root = (second / (1 - optim.beta2**step)).sqrt() + optim.eps
            weight = weight - optim.lr * first / (1 - optim.beta1**step) / root
            continue
        mu = optim.muon.momentum
        first = mu * first + (1 - mu) * gradient
        wanted = mu * first + (1 - mu) * gradient if optim.muon.nesterov else first
        weight = weight.clone()
        # `true_matrices` gives the matrices in an order; numbers in place of values tell where their elements belong.
        places = true_matrices(torch.arange(weight.numel()).view(weight.shape), name, made)
        for place, matrix in zip(places, true_matrices(wanted, name, made), strict=True):
            scale = optim.muon.rms * max(matrix.shape) ** 0.5
            weight.view(-1)[place.reshape(-1)] -= (optim.lr * scale * reference(matrix)).reshape(-1)
    return weight


@pytest.mark.long
def test_emulated_fp8_under_layouts(references: References) -> None:
    """The first step equals one process, later ones are close, as for TP in test_fp8_layouts.py.

    Owners stack other matrices together, which changes the last bits of weights. One of them may then be rounded to the
    next FP8 value.
    """

    def fp8(**parallel: Any) -> Config:
        return with_recipe(config("moma", parallel=parallel), "delayed")

    reference = references.get(fp8())
    assert reference.losses != references.get(config("moma")).losses

    def steps(ranks: RankEnv) -> None:
        start(ranks)
        for parallel in ({}, {"ep": 2}, {"pp": 2}):
            found = trace(fp8(**parallel), ranks)
            first = [Trace(one.losses[:1], one.grad_norms[:1]) for one in (reference, found)]
            loss, norm = compare(*first)
            assert loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE, (parallel, loss, norm)
            assert max(compare(reference, found)) <= CLOSE, (parallel, reference, found)
        groups.finalize()

    run_ranks(steps, world_size=2, timeout_s=300)


@pytest.mark.long
def test_rounds_change_nothing(references: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter in a round of its own."""
    monkeypatch.setattr("mmscale.train.optim.matrix_exchange.ROUND_ELEMENTS", 1)
    references.get(config("moma"))

    def steps(ranks: RankEnv) -> None:
        start(ranks)
        made = config("moma", parallel={"tp": 2})
        assert_passes(judge(references, made, ranks, tmp_path), "muon in rounds")
        groups.finalize()

    run_ranks(steps, world_size=2, timeout_s=300)


@pytest.mark.parametrize(
    ("model", "nesterov"),
    [
        ("moma_7t1i", True),
        ("mot", False),
        pytest.param("moma_7t1i", False, marks=pytest.mark.exhaustive),
        pytest.param("mot", True, marks=pytest.mark.exhaustive),
    ],
)
def test_steps_equal_a_slow_reference(model: str, nesterov: bool) -> None:
    """Every weight of a model after two real steps, from the clipped gradients of these steps."""
    base = with_share(config(model))
    muon = base.optim.muon.model_copy(update={"nesterov": nesterov})
    made = with_optim(base, weight_decay=0.1, lr=1e-2, schedule="constant", muon=muon.model_dump())

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        parts = build(made, groups.initialize_layout(seed=made.run.seed))
        names = {parameter: name for chunk in parts.chunks for name, parameter in chunk.module.named_parameters()}
        gradients: dict[str, list[Tensor]] = {}
        held = [
            (names[parameter], parameter, part._main(parameter), part.optimizer)
            for part in parts.optimizer.chained_optimizers
            for parameter in part.model_param_group_index_map
        ]
        before = {name: parameter.detach().double().clone() for name, parameter, _, _ in held}
        step = Muon.step

        def watched(self: Muon, closure: Any = None) -> Any:
            for name, parameter, main, inner in held:
                if inner is self:
                    gradients.setdefault(name, []).append(main.grad.double().view(parameter.shape).clone())
            return step(self, closure)

        Muon.step = watched  # type: ignore[method-assign]
        try:
            train(made, parts, TrainState(parts.chunks, parts.optimizer), until=2)
        finally:
            Muon.step = step  # type: ignore[method-assign]
        lr = {float(group["lr"]) for group in parts.optimizer.param_groups}
        assert lr == {made.optim.lr}
        for name, parameter, _, _ in held:
            wanted = expected(made, name, before[name], gradients[name])
            change = (wanted - before[name]).norm()
            assert float((parameter.detach().double() - wanted).norm() / change) < 1e-3, name
            assert float(change) > 0, name
        groups.destroy_layout()
        groups.finalize()

    run_ranks(ranks_do, world_size=1, timeout_s=300)


@pytest.mark.parametrize(
    "parallel",
    [{}, *(pytest.param(one, marks=pytest.mark.long) for one in ({"tp": 2}, {"ep": 2}))],
    ids=["dp2", "tp2", "ep2"],
)
def test_state_and_messages_are_those_of_the_plan(
    tmp_path: Path, parallel: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of all ranks together: of the optimizer's state, and of what data-parallel and other ranks exchange."""
    made = with_share(config("moma", parallel=parallel))

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        layout = made.parallel
        parts = build(made, groups.initialize_layout(tp=layout.tp, ep=layout.ep, seed=made.run.seed))
        sent: Counter[str] = Counter()
        exchange = torch.distributed.all_to_all_single

        def counted(output: Tensor, values: Tensor, *args: Any, group: Any) -> Any:
            sent["tp" if group is parts.groups.tp else "muon"] += values.nbytes
            return exchange(output, values, *args, group=group)

        for part in parts.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                for shard in group["params"]:
                    shard.grad = torch.ones_like(shard)
        monkeypatch.setattr("torch.distributed.all_to_all_single", counted)
        for part in parts.optimizer.chained_optimizers:
            part.optimizer.step()
        states = [state for part in parts.optimizer.chained_optimizers for state in part.optimizer.state.values()]
        kept = sum(value.nbytes for state in states for value in state.values())
        assert all(state.keys() <= {"exp_avg", "exp_avg_sq"} for state in states)
        totals = [sum(values) for values in zip(*groups.gathered((kept, sent["muon"], sent["tp"])), strict=True)]
        payloads: Counter[str] = Counter()
        for traffic in communication(made, 2):
            if traffic.operation is Operation.ALL_TO_ALL and traffic.kind is not MessageKind.EP:
                payloads[traffic.kind] += round(2 * traffic.payload)
        expected_state = 2 * rank_memory(made, 2).optimizer
        assert totals == [expected_state, payloads["muon"], payloads["tp"]]
        groups.destroy_layout()
        groups.finalize()

    run_ranks(ranks_do, world_size=2, timeout_s=300)


RESUMED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("moma_depth_joint", {"ep": 2}, {}, "fp32"),
    ("mot", {"tp": 2}, {}, "bf16"),
    ("moma", {}, {"moments": "fp8_coat"}, "fp32"),
    ("moma", {"pp": 2, "vpp": 2}, {"moments": "bf16"}, "bf16"),
]


@pytest.mark.parametrize(
    "row",
    [
        *(pytest.param(row, marks=pytest.mark.long) for row in RESUMED[:3]),
        pytest.param(RESUMED[3], marks=pytest.mark.exhaustive),
    ],
    ids=lambda row: row[0],
)
def test_same_layout_goes_on_exactly(tmp_path: Path, row: tuple[str, dict[str, Any], dict[str, Any], str]) -> None:
    """Two steps, a checkpoint, and two more equal four steps, bit for bit; matrices have no second moment."""
    model, parallel, optim, dtype = row
    made = with_optim(settings(model, dtype=dtype, parallel=parallel), **MUON, **optim)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        whole, halves = tmp_path / "whole", tmp_path / "halves"
        uninterrupted = leg(made, whole, load=None, until=STEPS)
        resumed = leg(made, halves, load=None, until=2) + leg(made, halves, load=2, until=STEPS)
        assert resumed == uninterrupted
        one, other = tensors(whole, STEPS), tensors(halves, STEPS)
        assert one.keys() == other.keys()
        assert not [key for key in one if not torch.equal(one[key], other[key])]
        first = {key.removeprefix(FIRST) for key in one if key.startswith(FIRST)}
        second = {key.removeprefix(SECOND) for key in one if key.startswith(SECOND)}
        assert first - second == matrices(made) and second < first
        groups.finalize()

    run_ranks(ranks_do, world_size=2, timeout_s=600)


FIRST, SECOND = "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."


def matrices(made: Config) -> set[str]:
    """Names in checkpoints of the weights that Muon updates."""
    return {tensor.name for tensor in model_tensors(made) if is_hidden_matrix(tensor)}


@pytest.mark.long
class TestOtherOptimizers:
    """A checkpoint of one optimizer is read by a run of the other, and written again by it."""

    @staticmethod
    @pytest.fixture(scope="class")
    def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("optimizers")

        def ranks_do(ranks: RankEnv) -> None:
            start(ranks)
            tp2 = {"tp": 2}
            leg(settings("moma"), folder / "adam", load=None, until=2)
            leg(with_optim(settings("moma"), moments="fp8_coat"), folder / "adam_fp8", load=None, until=2)
            leg(with_optim(settings("moma"), **MUON), folder / "muon", load=None, until=2)
            muon, adam = with_optim(settings("moma", parallel=tp2), **MUON), settings("moma", parallel=tp2)
            copied(muon, folder / "adam", folder / "adam_as_muon")
            copied(muon, folder / "adam_fp8", folder / "adam_fp8_as_muon")
            copied(adam, folder / "muon", folder / "muon_as_adam")
            copied(with_optim(adam, moments="bf16"), folder / "muon", folder / "muon_as_adam_bf16")
            leg(muon, folder / "adam_as_muon", load=2, until=3)
            leg(adam, folder / "muon_as_adam", load=2, until=3)
            slow = with_optim(settings("moma"), beta2=0.999)
            with pytest.raises(ConfigError, match="Adam has no moments of the matrices that Muon trained"):
                copied(slow, folder / "muon", folder / "refused")
            groups.destroy_layout()
            groups.finalize()

        run_ranks(ranks_do, world_size=2, timeout_s=600)
        return folder

    @pytest.mark.parametrize("source", ["adam", "adam_fp8"])
    def test_muon_takes_its_momentum_from_adam(self, runs: Path, source: str) -> None:
        before, after = kept(runs / source), kept(runs / f"{source}_as_muon")
        dropped = {f"{SECOND}{name}" for name in matrices(settings("moma"))}
        assert before.keys() - after.keys() == dropped and not after.keys() - before.keys()
        assert not [name for name in after if not torch.equal(before[name], after[name])]

    @pytest.mark.parametrize("target", ["muon_as_adam", "muon_as_adam_bf16"])
    def test_adam_starts_muons_matrices_without_moments(self, runs: Path, target: str) -> None:
        before, after = kept(runs / "muon"), kept(runs / target)
        new = {f"{SECOND}{name}" for name in matrices(settings("moma"))}
        assert after.keys() - before.keys() == new and not before.keys() - after.keys()
        restarted = new | {name.replace(SECOND, FIRST) for name in new}
        assert all(float(after[name].abs().max()) == 0.0 for name in restarted)
        others = before.keys() - restarted
        for name in others:
            assert torch.equal(before[name].to(after[name].dtype), after[name]), name
        assert any(name.startswith(SECOND) and float(after[name].max()) > 0 for name in others)

    def test_both_train_on(self, runs: Path) -> None:
        for run in ("adam_as_muon", "muon_as_adam"):
            found = kept(runs / run, 3)
            assert all(bool(value.isfinite().all()) for value in found.values())
            assert all(float(found[f"{FIRST}{name}"].abs().max()) > 0 for name in matrices(settings("moma")))
