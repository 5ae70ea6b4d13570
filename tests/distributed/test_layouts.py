"""Every parallel layout equals one process, fp32: loss and gradient norm of several steps, and every tensor.

Each layout saves after its first step, so that first moments are gradients; the checkpoint is compared with that of one
process tensor by tensor, and the steps that follow go on from the one process's checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.verify_layout import Trace, compare
from tests.distributed.layouts import (
    MODELS,
    References,
    assert_passes,
    config,
    judge,
    start,
    trace,
)
from tests.support import run_ranks

TWO_RANKS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "ep2": {"ep": 2},
    "pp2_interleaved": {"pp": 2, "vpp": 2},
    "tp2_recompute": {"tp": 2, "recompute": "full"},
    "pp2_recompute": {"pp": 2, "recompute": "full"},
    "ep2_recompute_selective": {"ep": 2, "recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "tp2_loss_chunks": {"tp": 2, "loss_chunk": 48},  # two whole chunks and a part of one
    "pp2_interleaved_loss_chunks": {"pp": 2, "vpp": 2, "loss_chunk": 1},
    "dp2_overlap_loss_chunks": {"overlap_grad_reduce": True, "overlap_param_gather": True, "loss_chunk": 1000},
    "dp2_overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp2_ep2": {"tp": 2, "ep": 2},
    "pp2_ep2": {"pp": 2, "ep": 2},
    "dp2_ep2": {"ep": 2},
    "ep4": {"ep": 4},
    "pp2_interleaved_ep2_overlap": {"pp": 2, "vpp": 2, "ep": 2, "overlap_grad_reduce": True},
    "tp2_pp2_loss_chunks": {"tp": 2, "pp": 2, "loss_chunk": 40},
    "tp2_ep2_recompute": {"tp": 2, "ep": 2, "recompute": "full"},
}


def _run(
    references: References,
    model: str,
    folder: Path,
    world_size: int,
    layouts: dict[str, dict[str, Any]],
    *,
    absent: str | None = None,
    **train: Any,
) -> None:
    """All layouts one after another in one set of forked ranks."""
    references.get(config(model, **train), absent=absent)

    def steps(ranks: RankEnv) -> None:
        start(ranks)
        for name, parallel in layouts.items():
            made = config(model, parallel=parallel, **train)
            assert_passes(judge(references, made, ranks, folder / name, absent=absent), f"{model} {name}")
        groups.finalize()

    run_ranks(steps, world_size=world_size, timeout_s=600)


def _fits(model: str, layouts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A dense model has no experts to spread; equal stages must divide the layers."""
    layers, dense = MODELS[model].get("num_layers", 4), MODELS[model]["kind"] == "dense"
    return {
        name: p
        for name, p in layouts.items()
        if not (dense and p.get("ep", 1) > 1) and layers % (p.get("pp", 1) * p.get("vpp", 1)) == 0
    }


# At every change one model meets every kind of parallelism, recompute, overlap and chunk, where a row has several of
# them at once; a kind of expert, norm or choice meets the rows that could treat it differently. `exhaustive` has the
# rest of the product. ep2 has two replicas, as dp2 has.
EVERYTHING = "moma_depth_joint"
ALWAYS: dict[int, dict[str, tuple[str, ...]]] = {
    2: {
        EVERYTHING: (
            *("tp2_recompute", "ep2_recompute_selective"),
            *("pp2_interleaved_loss_chunks", "dp2_overlap_loss_chunks"),
        ),
        # A tied output weight stands on two stages, and meets chunks in every layout, too.
        "dense_tied": ("tp2_loss_chunks", "pp2_interleaved_loss_chunks"),
        "moe": ("ep2",),
        "moe_softmax": ("tp2",),
        "moma_post": ("tp2",),  # the paper's norms
        "moma_post_per_expert_shared": ("tp2", "ep2"),
        "moma_competitive": ("ep2",),
        "mot": ("tp2", "pp2_interleaved_loss_chunks"),
        "mot_frozen": ("pp2_interleaved_loss_chunks", "dp2_overlap_loss_chunks"),
        "moma_frozen": ("ep2",),
        "moma_untied": ("tp2_recompute", "ep2_recompute_selective"),
        "mot_4t1i": ("tp2", "pp2_interleaved_loss_chunks", "ep2_recompute_selective"),
        "mot_4t1i_depth": ("ep2",),
        "mot_4t1i_token_choice": ("tp2",),
        "moma_token_choice": ("pp2_interleaved_loss_chunks",),  # with tp and ep on four ranks
        "moe_token_choice": ("ep2",),
        "moma_token_choice_depth": ("tp2_recompute",),
        "moma_actual": ("tp2",),
        "moma_actual_micro_batch": ("ep2",),
    },
    4: {
        EVERYTHING: ("tp2_pp2", "pp2_interleaved_ep2_overlap", "tp2_ep2_recompute"),
        "moma_depth_per_modality": ("tp2_ep2",),
        "mot_post_depth": ("tp2_pp2",),
        "mot_4t1i": ("tp2_ep2", "pp2_interleaved_ep2_overlap"),
        "moma_token_choice": ("tp2_ep2_recompute",),
        "moma_frozen": ("tp2_ep2",),
    },
}


# `make test` has these, which meet every kind of parallelism; `make test-long` the other models.
SHORT: dict[int, tuple[str, ...]] = {
    2: (EVERYTHING, "dense_tied"),
    4: (EVERYTHING,),
}


def _rows(world_size: int) -> list[Any]:
    """Names of the models of every change."""
    short = SHORT[world_size]
    return [name if name in short else pytest.param(name, marks=pytest.mark.long) for name in ALWAYS[world_size]]


def _chosen(model: str, layouts: dict[str, dict[str, Any]], world_size: int, *, rest: bool) -> dict[str, Any]:
    """The layouts of every change, or the rest of them."""
    always, fits = ALWAYS[world_size].get(model, ()), _fits(model, layouts)
    assert set(always) <= fits.keys(), f"{model} has no layouts {set(always) - fits.keys()}"
    return {name: p for name, p in fits.items() if (name in always) is not rest}


@pytest.mark.parametrize("model", _rows(2))
def test_two_ranks_equal_one_process(references: References, model: str, tmp_path: Path) -> None:
    _run(references, model, tmp_path, 2, _chosen(model, TWO_RANKS, 2, rest=False))


@pytest.mark.parametrize("model", _rows(4))
def test_four_ranks_equal_one_process(references: References, model: str, tmp_path: Path) -> None:
    _run(references, model, tmp_path, 4, _chosen(model, FOUR_RANKS, 4, rest=False))


def _with_rest(layouts: dict[int, dict[str, Any]], always: dict[int, tuple[str, ...]]) -> list[Any]:
    """Names of layouts per number of ranks: those of every change, and the exhaustive rest."""
    rest = {size: tuple(name for name in layouts[size] if name not in always[size]) for size in layouts}
    return [
        *(pytest.param(size, names, id=str(size), marks=pytest.mark.long) for size, names in always.items()),
        *(
            pytest.param(size, rest[size], id=f"{size}-rest", marks=pytest.mark.exhaustive)
            for size in rest
            if rest[size]
        ),
    ]


UNEVEN: dict[int, dict[str, dict[str, Any]]] = {
    2: {"ep2": {"ep": 2}, "ep2_overlap_experts": {"ep": 2, "overlap_experts": True}},
    4: {"ep4": {"ep": 4}, "tp2_ep2": {"tp": 2, "ep": 2}, "pp2_ep2": {"pp": 2, "ep": 2, "recompute": "full"}},
}


UNEVEN_ALWAYS = {2: ("ep2", "ep2_overlap_experts"), 4: ("tp2_ep2",)}


@pytest.mark.parametrize(("world_size", "names"), _with_rest(UNEVEN, UNEVEN_ALWAYS))
def test_groups_that_expert_parallelism_does_not_divide(
    references: References, world_size: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    """7 text experts and 1 image expert: ranks hold different numbers of each group, some none."""
    _run(references, "moma_7t1i", tmp_path, world_size, {name: UNEVEN[world_size][name] for name in names})


UNEQUAL_STAGES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "pp2": {"pp": 2, "pp_layers": (2, 3)},
        "pp2_interleaved": {"pp": 2, "vpp": 2, "pp_layers": (1, 2, 1, 1)},
    },
    4: {
        "pp4": {"pp": 4, "pp_layers": (1, 2, 1, 1)},
        "pp2_ep2": {"pp": 2, "ep": 2, "pp_layers": (4, 1), "recompute": "full"},
    },
}


UNEQUAL_ALWAYS = {2: ("pp2_interleaved",), 4: ("pp2_ep2",)}


@pytest.mark.parametrize(("world_size", "names"), _with_rest(UNEQUAL_STAGES, UNEQUAL_ALWAYS))
def test_stages_of_unequal_numbers_of_layers(
    references: References, world_size: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    """Layers keep their numbers: every second one is a Mixture-of-Depths layer, whatever stage it is on."""
    _run(
        references, "moma_five_layers", tmp_path, world_size, {name: UNEQUAL_STAGES[world_size][name] for name in names}
    )


@pytest.mark.long
def test_fewer_key_value_heads_than_tensor_parallel_ranks(references: References, tmp_path: Path) -> None:
    """Ranks share the head."""
    layouts = {name: TWO_RANKS[name] for name in ("tp2_recompute",)}
    _run(references, "moma_one_kv_head", tmp_path, 2, layouts)


ANSWERS = {
    **{name: TWO_RANKS[name] for name in ("tp2_loss_chunks", "pp2_interleaved_loss_chunks", "ep2", "dp2_overlap")},
    "cp2": {"cp": 2},
}


ANSWERS_ALWAYS = ("pp2_interleaved_loss_chunks", "ep2", "cp2")


@pytest.mark.parametrize(
    ("model", "names"),
    [
        pytest.param("moma_depth_joint", ANSWERS_ALWAYS, id="moma_depth_joint", marks=pytest.mark.long),
        pytest.param(
            "moma_depth_joint",
            tuple(name for name in ANSWERS if name not in ANSWERS_ALWAYS),
            id="moma_depth_joint-rest",
            marks=pytest.mark.exhaustive,
        ),
        *(pytest.param(one, tuple(ANSWERS), id=one, marks=pytest.mark.exhaustive) for one in ("moma_actual", "moe")),
    ],
)
def test_a_loss_on_answers_only(references: References, model: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """Ranks, micro-batches and chunks have different numbers of trained labels, some none."""
    layouts = {name: ANSWERS[name] for name in names}
    _run(references, model, tmp_path, 2, layouts, reserved=True, data={"document_multiple": 4}, micro_batch_size=1)


MASKED = {
    **{name: TWO_RANKS[name] for name in ("dp2", "tp2_loss_chunks", "pp2_interleaved", "ep2")},
    "cp2": {"cp": 2},
}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("moma_depth_joint", marks=pytest.mark.long),
        *(pytest.param(one, marks=pytest.mark.exhaustive) for one in ("mot", "moe_token_choice")),
    ],
)
def test_documents_with_holes(references: References, model: str, tmp_path: Path) -> None:
    """Causal masking: holes are no labels, parts of images too."""
    layouts = {name: own for name, own in MASKED.items() if name != "ep2" or MODELS[model]["kind"] != "dense"}
    objective = {"cm3_rate": 0.5, "image_spans": "partial"}
    _run(references, model, tmp_path, 2, layouts, reserved=True, objective=objective, data={"document_multiple": 4})


LAYOUTS = {2: TWO_RANKS, 4: FOUR_RANKS}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("world_size", "model"),
    [(size, model) for size in LAYOUTS for model in MODELS if _chosen(model, LAYOUTS[size], size, rest=True)],
)
def test_every_model_under_every_layout(references: References, model: str, world_size: int, tmp_path: Path) -> None:
    _run(references, model, tmp_path, world_size, _chosen(model, LAYOUTS[world_size], world_size, rest=True))


@pytest.mark.parametrize(
    ("absent", "names"),
    [
        pytest.param("image", ("tp2", "ep2", "pp2_recompute"), id="image", marks=pytest.mark.long),
        pytest.param("image", ("pp2", "dp2_overlap"), id="image-rest", marks=pytest.mark.exhaustive),
        pytest.param(
            "text", ("tp2", "pp2", "ep2", "dp2_overlap", "pp2_recompute"), id="text", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_modality_may_be_missing_in_a_micro_batch(
    references: References, absent: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    """Odd micro-batches lack a modality: its experts run on masked slots and every rank stays in the exchange."""
    _run(references, "moma", tmp_path, 2, {name: TWO_RANKS[name] for name in names}, absent=absent)


@pytest.mark.parametrize(
    "model",
    [
        "moma_depth",
        *(pytest.param(one, marks=pytest.mark.long) for one in ("moma_actual", "mot_4t1i")),
        pytest.param("moma_actual_micro_batch", marks=pytest.mark.exhaustive),
    ],
)
def test_a_text_only_rank_neither_hangs_nor_loses_gradients(references: References, model: str, tmp_path: Path) -> None:
    """With two micro-batches a step, the rank with odd numbers never sees an image."""
    _run(references, model, tmp_path, 2, {"ep2": TWO_RANKS["ep2"]}, absent="image", micro_batch_size=4)


@pytest.mark.exhaustive
def test_bf16_layouts_follow_one_process(references: References) -> None:
    """bf16 with fp32 main parameters: DP, EP and PP round as one process does; TP rounds partial sums to 8 bits."""
    reference = references.get(config("moma_depth", dtype="bf16"))
    # Over seeds 1234, 7, 8 and 9 EP2 ends 0.5 to 1.6e-4 away: gradients of 8 bits are summed in another order.
    bounds = {"dp2": 1e-5, "ep2": 5e-4, "pp2": 1e-5, "tp2": 5e-3}

    def steps(ranks: RankEnv) -> None:
        groups.start(ranks)
        for name, bound in bounds.items():
            found = trace(config("moma_depth", dtype="bf16", parallel=TWO_RANKS[name]), ranks)
            loss, _ = compare(reference, found)
            assert loss <= bound, f"{name}: loss differs by {loss:.2e}"
        groups.finalize()

    run_ranks(steps, world_size=2)


def test_initial_weights_do_not_depend_on_the_layout(references: References) -> None:
    """The matrix compares first steps too; here: another seed gives other weights."""
    first: Trace = references.get(config("moma"))
    other = config("moma").model_copy(update={"run": config("moma").run.model_copy(update={"seed": 7})})
    assert references.get(other).losses[0] != first.losses[0]
