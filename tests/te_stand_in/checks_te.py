"""Transformer-Engine's layers against the torch backend's, over the stand-in beside this file.

Run by tests/distributed/test_transformer_engine.py in a process of its own, whose megatron-core finds the stand-in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_engine as stand_in

from mmscale.config import Config
from mmscale.model.build import build_chunks, transformer_config
from mmscale.runtime import groups as process_groups
from mmscale.runtime import transformer_engine
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.layouts import assert_equal, config, trace
from tests.distributed.test_resume import TOLERANCE, leg, settings, start, tensors
from tests.support import run_ranks

# Before mmscale hides what a machine without a GPU cannot use.
assert Path(str(stand_in.__file__)).parent == Path(__file__).parent


@pytest.fixture(autouse=True)
def _can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "problem", lambda: None)


def using(made: Config, backend: str) -> Config:
    """The same model with the classes of a backend, its experts too."""
    experts = made.model.experts.model_copy(update={"compute": "te" if backend == "te" else "bmm"})
    return made.model_copy(update={"model": made.model.model_copy(update={"backend": backend, "experts": experts})})


def test_models_train_as_with_the_torch_backend() -> None:
    def ranks_of_one(ranks: RankEnv) -> None:
        start(ranks)
        for model in ("moma_post_per_expert_shared", "dense_depth_first"):
            found = {name: trace(using(config(model), name), ranks) for name in ("torch", "te")}
            assert_equal(found["torch"], found["te"], model)

    run_ranks(ranks_of_one, world_size=1)


def test_slots_hold_the_classes_of_the_backend(tmp_path: Path) -> None:
    from mmscale.model.experts_te import TEExperts
    from mmscale.model.linear_te import FusedDocumentAttention, Norm, NormColumnLinear, RowLinear

    def one(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout()
        made = using(config("moma", dtype="bf16"), "te")
        layer = build_chunks(made, groups)[0].decoder.layers[0]
        assert type(layer.self_attention.linear_qkv) is NormColumnLinear
        assert type(layer.self_attention.linear_proj) is RowLinear
        assert type(layer.self_attention.core_attention) is FusedDocumentAttention
        assert type(layer.self_attention.q_layernorm) is type(layer.pre_mlp_layernorm) is Norm
        assert all(type(experts) is TEExperts for experts in layer.mlp.experts.values())
        # The layers add gradients by themselves; megatron-core's output layer would refuse without apex.
        assert layer.self_attention.linear_qkv.fuse_wgrad_accumulation
        assert layer.mlp.experts["text"].linear_fc1.fuse_wgrad_accumulation
        assert not transformer_config(made).gradient_accumulation_fusion

    run_ranks(one, world_size=1)


def test_a_run_may_change_its_backend_and_its_layout(tmp_path: Path) -> None:
    """To Transformer-Engine and back, with other layouts: the numbers of the run that changed nothing."""
    chains: Any = {
        "moma": (("torch", {"ep": 2}, 2), ("te", {"tp": 2}, 3), ("torch", {"ep": 2}, 4)),
        "dense": (("torch", {"tp": 2}, 2), ("te", {"tp": 2}, 3)),
    }

    def ranks_of_two(ranks: RankEnv) -> None:
        start(ranks)
        for model, chain in chains.items():
            same, changed = tmp_path / f"{model}_same", tmp_path / f"{model}_changed"
            reference = leg(using(settings(model, parallel=chain[0][1]), "torch"), same, load=None, until=chain[-1][2])
            at, losses, norms = None, (), ()
            for backend, parallel, until in chain:
                found = leg(using(settings(model, parallel=parallel), backend), changed, load=at, until=until)
                at, losses, norms = until, losses + found.losses, norms + found.norms
            assert losses == pytest.approx(reference.losses, rel=TOLERANCE), model
            assert norms == pytest.approx(reference.norms, rel=10 * TOLERANCE), model
            # The same names and shapes, whoever wrote it.
            wrote = tensors(changed, 3)
            assert {k: v.shape for k, v in wrote.items()} == {k: v.shape for k, v in tensors(changed, 2).items()}

    run_ranks(ranks_of_two, world_size=2)


def test_every_row_of_the_gpu_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code but the FP8 kernels', which only a GPU has: recipes train, unquantised. Fewer of them, to save time."""
    from mmscale.bench import gpu, gpu_checks, gpu_layers

    monkeypatch.setattr(gpu_layers, "VARIANTS", (("te", "off"), ("te", "delayed")))
    monkeypatch.setattr(gpu_checks, "RECIPES", ("tensorwise",))
    monkeypatch.setattr(gpu_checks, "from_cpu", lambda: (0.0, "tests/gpu"))  # another process, which has no stand-in

    def one(ranks: RankEnv) -> None:
        del ranks
        result = gpu.run(device="cpu", tiny=True, repeats=1, steps=10)
        missing = [row["name"] + ": " + row["note"] for row in result["rows"] if row["ms"] is None]
        assert not missing
        assert {row["number"] for row in result["rows"]} == set(range(1, 8))
        failed = [check for check in result["checks"] if not check["passed"]]
        assert [check["name"] for check in failed] == [
            f"bytes of e4m3, {kind}" for kind in ("tensorwise", "rows of 128", "tiles of 128")
        ], failed
        assert gpu.render(result).count("not measured") == 0

    run_ranks(one, world_size=1)


def test_fused_attention_stays_within_documents() -> None:
    from mmscale.model.attention import DocumentAttention
    from mmscale.model.linear_te import FusedDocumentAttention
    from mmscale.model.mixed_modal import MixedModalParams

    def one(ranks: RankEnv) -> None:
        start(ranks)
        groups = process_groups.initialize_layout()
        transformer = transformer_config(config("moma"))  # 4 heads, 2 groups
        kinds: Any = {"attn_mask_type": _causal(), "attention_type": "self", "pg_collection": groups}
        ours = DocumentAttention(transformer, 1)
        fused = FusedDocumentAttention(transformer, 1, **kinds)
        generator = torch.Generator().manual_seed(5)
        documents = torch.randint(0, 2, (3, 40), generator=generator).cumsum(1)
        zeros = torch.zeros_like(documents)
        q, k, v = (torch.randn(40, 3, h, 16, generator=generator, requires_grad=True) for h in (4, 2, 2))
        for bound in (None, 130):
            params = MixedModalParams.of(
                modality_ids=zeros, position_ids=zeros, document_ids=documents, documents=bound
            )
            gradients = []
            for attention in (ours, fused):
                out = attention(q, k, v, packed_seq_params=params)
                gradients.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
            for mine, other in zip(*gradients, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)

    run_ranks(one, world_size=1)


def _causal() -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    return AttnMaskType.causal


def test_scales_of_delayed_fp8_survive_another_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module's scales and histories come back as they were, experts' with their expert, whatever the layout."""
    from mmscale.model.experts_te import GroupedLinear
    from mmscale.model.state_te import scaled_modules

    from mmscale.train import local_state  # isort: skip
    from mmscale.train.state import TrainState, unwrapped  # isort: skip

    def modules(state: TrainState) -> list[tuple[str, Any]]:
        return list(scaled_modules(unwrapped(state.chunks[0])))

    def fp8(parallel: dict[str, int]) -> Config:
        made = using(settings("moma", dtype="bf16", parallel=parallel), "te")
        precision = made.precision.model_copy(update={"fp8": "delayed", "fp8_amax_history": 5})
        return made.model_copy(update={"precision": precision})

    def expected(name: str, module: Any, rank: int) -> torch.Tensor:
        first = rank * module.products if isinstance(module, GroupedLinear) else 0
        numbers = torch.arange(1000).view(1, -1)[:, first : first + module.products]
        return (torch.arange(6 * 5).view(6, 1, 5) + 100 * numbers.unsqueeze(-1)).float() + len(name)

    def ranks_of_two(ranks: RankEnv) -> None:
        from mmscale.checkpoint.manager import CheckpointManager
        from mmscale.train.parts import build
        from tests.distributed.test_resume import _unheard

        start(ranks)
        options: Any = {"every": 0, "keep": 9, "attempt": 1, "info": {}, "on_event": _unheard}
        for turn, parallel in enumerate(({"ep": 2}, {}, {"tp": 2}, "torch")):
            made = fp8(parallel) if isinstance(parallel, dict) else using(settings("moma", dtype="bf16"), "torch")
            layout = made.parallel
            groups = process_groups.initialize_layout(tp=layout.tp, ep=layout.ep)
            parts = build(made, groups)
            state = TrainState(parts.chunks, None)
            checkpoints = CheckpointManager(tmp_path, **options)
            if turn == 0:
                found = modules(state)
                assert len(found) == 4 * (2 + 4)  # two linears and two times two grouped ones in each of 4 layers
                for name, module in found:
                    module.set_fp8_state(expected(name, module, groups.ep.rank()))
                state.step = 2
                checkpoints.save(state, last=True)
            else:
                checkpoints.load(state, 2)
            if turn == 1:  # a snapshot in memory brings them into a new model too
                tensors, plain = local_state.capture(TrainState(parts.chunks, parts.optimizer))
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
                parts = build(made, groups)
                state = TrainState(parts.chunks, parts.optimizer)
                assert local_state.problems(state, tensors, plain) == []
                local_state.restore(state, tensors, plain)
            for name, module in modules(state):
                assert torch.equal(module.fp8_state(), expected(name, module, groups.ep.rank())), (turn, name)
            process_groups.destroy_layout()

    run_ranks(ranks_of_two, world_size=2)
