"""Arithmetic on configurations: parameters, FLOPs, memory, layouts, and the text of it.

That the built model has exactly these parameters is tested beside the model.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from mmscale.config import Config
from mmscale.config.load import resolve
from mmscale.config.rules import check
from mmscale.plan import (
    count_parameters,
    flops_per_token,
    memory,
    plan,
    rank_memory,
    render,
    search,
    stage_layers,
    stage_parameters,
)
from mmscale.plan.memory import GIB

H, F, D, HEADS, GROUPS, LAYERS, ROWS, LENGTH = 64, 96, 16, 4, 2, 8, 256, 64


def config(*overrides: str, **model: Any) -> Config:
    values = {
        "vocab": {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 60}]},
        "model": {
            "kind": "moma",
            "num_layers": LAYERS,
            "hidden_size": H,
            "ffn_hidden_size": F,
            "num_attention_heads": HEADS,
            "num_query_groups": GROUPS,
            "seq_length": LENGTH,
            "experts": {"counts": {"text": 4, "image": 2}, "share": {"text": 0.75, "image": 0.25}},
        }
        | model,
    }
    return resolve(values, overrides)


def dense(*overrides: str, **model: Any) -> Config:
    return config(*overrides, kind="dense", experts={}, **model)


ATTENTION = H * (HEADS + 2 * GROUPS) * D + HEADS * D * H
NORMS = 2 * H + 2 * D


class TestParameters:
    def test_dense(self) -> None:
        found = count_parameters(dense())
        assert found.total == 2 * ROWS * H + LAYERS * (ATTENTION + 3 * H * F + NORMS) + H
        assert found.active == found.total
        assert found.per_modality == {}

    def test_moma(self) -> None:
        found = count_parameters(config())
        assert found.experts == LAYERS * 6 * 3 * H * F
        assert found.routers == LAYERS * 6 * H
        assert found.per_modality == {
            "text": LAYERS * 4 * (3 * H * F + H),
            "image": LAYERS * 2 * (3 * H * F + H),
        }
        assert found.active == count_parameters(dense()).total + found.routers

    def test_active_follows_capacity_and_depth(self) -> None:
        factor = config("model.experts.capacity_factor=2")
        assert count_parameters(factor).active - count_parameters(config()).active == LAYERS * 3 * H * F
        depth = count_parameters(dense("model.depth.every=2"))
        full = count_parameters(dense())
        layer = (full.total - 2 * ROWS * H - H) // LAYERS
        assert depth.total - full.total == depth.depth_routers == LAYERS // 2 * H
        assert full.total - depth.active == pytest.approx(LAYERS / 2 * (0.75 * layer - H), abs=1)

    @pytest.mark.parametrize(
        ("overrides", "more"),
        [
            (["model.qk_norm=false"], -LAYERS * 2 * D),
            (["model.norm=post"], 0),
            # one norm less around the experts, one for each group
            (["model.norm=post_per_expert"], LAYERS * H),
            (["model.norm=post_per_expert", "model.experts.shared=1"], LAYERS * (2 * H + 3 * H * F)),
            (["model.experts.shared=2", "model.experts.shared_ffn_hidden_size=10"], LAYERS * 3 * H * 20),
            (["model.tie_embeddings=true"], -ROWS * H),
            (["model.depth.every=3"], 3 * H),
            (["vocab.pad_multiple=1"], -2 * 96 * H),
        ],
    )
    def test_options(self, overrides: list[str], more: int) -> None:
        assert count_parameters(config(*overrides)).total - count_parameters(config()).total == more

    def test_parts_sum_to_the_total(self) -> None:
        parts = count_parameters(config("model.experts.shared=1", "model.depth.every=2")).as_dict()
        total, _, _ = (parts.pop(key) for key in ("total", "active", "per_modality"))
        assert sum(value for value in parts.values() if isinstance(value, int)) == total


class TestFlops:
    def test_dense(self) -> None:
        found = flops_per_token(dense())
        assert found.projections == 2 * LAYERS * ATTENTION
        assert found.attention == LAYERS * 2 * HEADS * D * LENGTH
        assert found.ffn == 2 * LAYERS * 3 * H * F
        assert found.output == 2 * H * ROWS
        assert found.training == 3 * found.forward

    def test_experts_at_their_capacity(self) -> None:
        # 64 tokens: 12 for each of 4 text experts, 8 for each of 2 image experts: as many slots as tokens.
        assert flops_per_token(config()).ffn == flops_per_token(dense()).ffn
        assert flops_per_token(config("model.experts.capacity_factor=2")).ffn == 2 * flops_per_token(dense()).ffn
        rounded = flops_per_token(config("model.experts.capacity_multiple=16")).ffn
        assert rounded == pytest.approx((4 * 16 + 2 * 16) / 64 * flops_per_token(dense()).ffn)

    def test_shared_experts_see_every_token(self) -> None:
        assert flops_per_token(config("model.experts.shared=1")).ffn == 2 * flops_per_token(dense()).ffn

    def test_depth_layers_work_on_their_fraction(self) -> None:
        found, full = flops_per_token(dense("model.depth.every=2")), flops_per_token(dense())
        assert found.projections == pytest.approx(full.projections * (1 + 0.25) / 2)
        # a quarter of the tokens, each looking at a quarter as many
        assert found.attention == pytest.approx(full.attention * (1 + 0.0625) / 2)


class TestMemory:
    def test_states_of_one_rank(self) -> None:
        found, total = rank_memory(config("precision.dtype=fp32"), 1), count_parameters(config()).total
        assert (found.parameters, found.gradients, found.optimizer) == (4 * total, 4 * total, 8 * total)
        half = rank_memory(config("precision.dtype=bf16"), 1)
        assert (half.parameters, half.optimizer) == (2 * total, 12 * total)

    def test_optimizer_state_is_sharded_over_data_parallel_ranks(self) -> None:
        one, four = rank_memory(config(), 1), rank_memory(config(), 4)
        assert four.optimizer == pytest.approx(one.optimizer / 4)
        assert four.parameters == one.parameters

    @pytest.mark.parametrize("layout", ["tp=2", "pp=2", "ep=2", "pp=4"])
    def test_every_parameter_is_on_some_rank(self, layout: str) -> None:
        c = config(f"parallel.{layout}")
        parameters = count_parameters(c)
        split = [stage_parameters(c, parameters, stage) for stage in range(c.parallel.pp)]
        replicated = sum(layer.replicated for layer in parameters.layers) + parameters.final_norms
        experts = sum(experts for _, experts in split) * c.parallel.tp * c.parallel.ep
        rest = (sum(rest for rest, _ in split) - replicated) * c.parallel.tp + replicated
        assert experts == parameters.experts
        assert experts + rest == pytest.approx(parameters.total)

    def test_a_tied_output_layer_on_another_stage_is_a_copy(self) -> None:
        c = config("parallel.pp=2", "model.tie_embeddings=true")
        held = sum(sum(stage_parameters(c, count_parameters(c), stage)) for stage in range(2))
        assert held == count_parameters(c).total + ROWS * H

    def test_activations(self) -> None:
        base = rank_memory(config(), 1).activations
        assert rank_memory(config("train.micro_batch_size=2"), 1).activations == pytest.approx(2 * base)
        assert rank_memory(config("parallel.recompute=full"), 1).activations < base
        assert rank_memory(config("parallel.tp=2"), 2).activations < base
        assert rank_memory(config("model.depth.every=1"), 1).activations < base

    def test_parts_of_activations(self) -> None:
        plain, deep = rank_memory(config(), 1), rank_memory(config("model.depth.every=2"), 1)
        assert 0 < plain.expert_choice < plain.activations
        assert plain.depth == 0 < deep.depth
        assert deep.expert_choice < plain.expert_choice
        none = rank_memory(dense(), 1)
        assert none.expert_choice == none.depth == 0

    def test_selective_recompute_lies_between(self) -> None:
        def held(*overrides: str) -> float:
            return rank_memory(config("train.micro_batch_size=4", *overrides), 1).activations

        selective = "parallel.recompute=selective"
        attention, mlp, both = (
            held(selective, f"parallel.recompute_modules=[{modules}]")
            for modules in ("core_attn", "mlp", "core_attn, mlp")
        )
        assert held("parallel.recompute=full") < both < min(attention, mlp)
        assert max(attention, mlp) < held()

    def test_stages_in_flight(self) -> None:
        """1F1B: the first of four stages holds four micro-batches, the last one; no stage more than there are."""
        of = [memory.in_flight(config("parallel.pp=4"), stage, 8) for stage in range(4)]
        assert of == [4, 3, 2, 1]
        assert memory.in_flight(config("parallel.pp=4"), 0, 2) == 2
        # Interleaved: (pp - 1) * 2 + (chunks - 1) * pp + 1 chunks of half a stage each.
        assert memory.in_flight(config("parallel.pp=2", "parallel.vpp=2"), 0, 8) == 2.5

    def test_interleaved_chunks_are_dealt_round_robin(self) -> None:
        c = config("parallel.pp=2", "parallel.vpp=2")
        assert stage_layers(c, 0) == [0, 1, 4, 5]
        assert stage_layers(c, 1) == [2, 3, 6, 7]


class TestLayouts:
    def test_all_are_allowed_and_use_all_ranks(self) -> None:
        found = search(config(), 8)
        assert found.layouts
        assert found.rejected
        for layout in found.layouts:
            check(layout.config, world_size=8)
            entry = layout.as_dict()
            assert entry["tp"] * entry["pp"] * entry["dp"] == 8
            assert entry["reasons"]
            parts = entry["cost"]
            assert math.isfinite(parts["total"])
            assert parts["compute"] + parts["communication"] + parts["bubble"] == pytest.approx(parts["total"])

    def test_cheapest_first(self) -> None:
        found = search(config(), 8).layouts
        assert [layout.cost for layout in found] == sorted(layout.cost for layout in found)
        assert {layout.fits for layout in found} == {None}

    def test_what_fits_stands_first(self) -> None:
        everything = [layout.memory.total for layout in search(config(), 8).layouts]
        memory = sorted(everything)[len(everything) // 2] / GIB
        found = search(config(), 8, gpu_memory=memory).layouts
        verdicts = [bool(layout.fits) for layout in found]
        assert True in verdicts
        assert False in verdicts
        assert verdicts == sorted(verdicts, reverse=True)
        assert all(("does not fit" in layout.reasons[0]) is not layout.fits for layout in found)

    def test_full_recomputation_only_where_it_is_needed(self) -> None:
        assert {layout.config.parallel.recompute for layout in search(config(), 2, gpu_memory=80).layouts} == {"none"}
        assert "full" in {layout.config.parallel.recompute for layout in search(config(), 2, gpu_memory=1e-4).layouts}

    def test_the_configurations_own_layout_is_marked(self) -> None:
        own = [layout for layout in plan(config("parallel.tp=2"), gpus=4)["layouts"] if layout["current"]]
        assert [(layout["tp"], layout["pp"], layout["ep"]) for layout in own] == [(2, 1, 1)]

    def test_a_wider_tensor_group_than_a_node_is_named(self) -> None:
        wide = config("parallel.tp=16", num_attention_heads=16, num_query_groups=16)
        reasons = plan(wide)["layouts"][0]["reasons"]
        assert "tensor parallelism leaves the node of 8" in reasons


class TestPlan:
    def test_stable_keys(self) -> None:
        found = json.loads(json.dumps(plan(config(), gpus=4, gpu_memory=80)))
        assert found["parameters"]["total"] > found["parameters"]["active"] > 0
        assert set(found["parameters"]["per_modality"]) == {"text", "image"}
        assert found["flops_per_token"]["forward"] > 0
        assert found["layouts"][0]["fits"] is True
        assert 0 < found["layouts"][0]["parameters_per_rank"] <= found["parameters"]["total"]
        assert found["tokens"] == found["tokens_per_step"] * 1000

    def test_without_devices_the_own_layout_on_as_few_ranks_as_it_needs(self) -> None:
        found = plan(config("parallel.tp=2", "parallel.ep=2"))
        assert found["gpus"] == 4
        assert [layout["current"] for layout in found["layouts"]] == [True]

    def test_automatic_shares_are_an_assumption_that_is_stated(self) -> None:
        automatic = config("model.experts.share=auto")
        assert "equal shares are assumed" in plan(automatic)["assumptions"][-1]
        assert flops_per_token(automatic).ffn == flops_per_token(dense()).ffn

    def test_text(self) -> None:
        text = render(plan(config(), gpus=8, gpu_memory=80))
        for words in (
            "parameters",
            "active per token",
            "per modality",
            "text",
            "FLOPs per token",
            "layouts on 8 ranks",
        ):
            assert words in text
        assert max(map(len, text.splitlines())) <= 120
        assert "\x1b" not in text

    def test_the_first_line_names_a_device_that_nobody_named(self) -> None:
        assert render(plan(config(), gpus=8)).startswith("for H100 SXM, the default of --gpu;")
        assert render(plan(config())).startswith("for H100 SXM, the default of --gpu;")
        for name in ("h100", "a100"):
            assert render(plan(config(), gpus=8, gpu=name)).startswith("model ")

    def test_text_in_a_narrow_terminal_keeps_numbers_and_reasons(self) -> None:
        text = render(plan(config(), gpus=8, gpu_memory=80), width=80)
        assert max(map(len, text.splitlines())) <= 80
        assert "tokens/s" in text
        assert "data parallelism only" in text
        assert "…" not in text

    def test_text_without_any_layout(self) -> None:
        summary = plan(config("train.global_batch_size=1"), gpus=3)
        assert summary["layouts"] == []
        assert "no layout of 3 ranks is possible" in render(summary)
        assert "refused" in render(summary)
