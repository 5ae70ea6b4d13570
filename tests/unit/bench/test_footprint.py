"""What the plan says about memory, against the tensors of real training steps on this machine's CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmscale.bench import footprint, footprint_cases
from mmscale.bench.footprint_cases import case, cases
from mmscale.config import Config
from mmscale.config.experts.schema import TokenChoiceConfig
from mmscale.errors import UsageError
from mmscale.plan.activations import Kernels
from mmscale.runtime import groups
from tests.support import Ranks, run_ranks

# What is wanted of a plan. `mmscale bench footprint --cases` shows what it is: 2 % for a step, 7 % recomputed in full.
TOLERANCE = 0.15

_CASES = [
    ("dense", "bf16", "selective"),
    ("moma_shared_depth", "bf16", "none"),
    ("moma_shared_depth", "bf16", "full"),
    ("moma", "bf16", "loss"),
    ("mot", "fp32", "none"),
]
_MORE_CASES = [  # in `make test-long`
    ("dense", "fp32", "none"),
    ("moma", "bf16", "none"),
    ("moma", "fp32", "full"),
    ("moma", "bf16", "mlp"),
    ("dense", "fp32", "logits"),
    ("moma", "bf16", "logits"),
    ("dense", "fp32", "loss"),
    ("moma_depth", "bf16", "none", "actual"),
    ("moma", "bf16", "none", "tokens choose"),
    ("mot", "bf16", "full"),
    ("moma", "bf16", "none", "ungated"),
    ("moma_shared_depth", "fp32", "none", "ungated"),
]


def _config(model: str, dtype: str, recompute: str, capacity: str = "nominal") -> Config:
    config = case(model, dtype, recompute)
    changed: dict[str, Any] = {"capacity": capacity}
    if capacity == "ungated":
        changed = {"counts": {"text": 4, "image": 1}, "ungated": ("image",)}
    if capacity == "tokens choose":  # the slots are known before only with a limit
        changed = {"token_choice": TokenChoiceConfig(top_k=2, capacity_factor=1.0)}
    experts = config.model.experts.model_copy(update=changed)
    return config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})


def _compared(named_cases: list[tuple[str, ...]]) -> dict[str, Any]:
    """Rows of `footprint.compare` for some cases."""
    found: dict[str, Any] = {}
    for named in named_cases:
        config = _config(*named)
        groups.initialize_layout(tp=1, pp=1, vpp=None, ep=1, seed=1)
        found["-".join(named)] = footprint.compare(config, footprint.measure(config), kernels=Kernels.HOST)
        groups.destroy_layout()
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cases of `make test` and the benchmark's own results, from one process."""
    file: Path = tmp_path_factory.mktemp("footprint") / "rows.json"

    def measure(ranks: Ranks) -> None:
        groups.start(ranks)
        found = _compared(_CASES)
        groups.finalize()
        spread = case("moma", "fp32", "none")
        spread = spread.model_copy(update={"parallel": spread.parallel.model_copy(update={"tp": 2, "ep": 2})})
        result = footprint.run(spread)
        found["run"] = [[name, row["planned"], row["found"]] for name, row in result["rows"].items()]
        with pytest.MonkeyPatch.context() as patch:  # two of them, to save time
            few = [(name, config) for name, config in cases() if name.startswith("dense bf16") and "=64" in name]
            patch.setattr(footprint_cases, "cases", lambda: iter(few))
            several = footprint.run(cases=True)
        texts = {"text": footprint.render(result), "several": several, "table": footprint.render(several)}
        file.write_text(json.dumps(found | texts))

    run_ranks(measure, world_size=1)
    rows: dict[str, Any] = json.loads(file.read_text())
    return rows


@pytest.mark.parametrize("named", _CASES, ids="-".join)
def test_the_plan_says_what_a_step_uses(named: tuple[str, ...], measured: dict[str, Any]) -> None:
    _assert_planned(measured["-".join(named)])


@pytest.fixture(scope="module")
def more_measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file: Path = tmp_path_factory.mktemp("footprint") / "more.json"

    def measure(ranks: Ranks) -> None:
        groups.start(ranks)
        file.write_text(json.dumps(_compared(_MORE_CASES)))
        groups.finalize()

    run_ranks(measure, world_size=1)
    rows: dict[str, Any] = json.loads(file.read_text())
    return rows


@pytest.mark.long
@pytest.mark.parametrize("named", _MORE_CASES, ids="-".join)
def test_the_plan_says_what_a_step_of_more_models_uses(named: tuple[str, ...], more_measured: dict[str, Any]) -> None:
    _assert_planned(more_measured["-".join(named)])


def _assert_planned(compared: list[tuple[str, float, float]]) -> None:
    """Rows of `footprint.compare`: name, planned bytes, found bytes."""
    rows = {name: (planned, found) for name, planned, found in compared}
    assert min(found for _, found in rows.values()) > 0
    for name in ("parameters", "gradients", "optimizer"):  # buffers are padded to a multiple of 64 elements
        planned, found = rows[name]
        assert planned <= found <= planned + 4096, f"{name}: {planned} planned, {found} found"
    for name in ("kept for backward", "step", "total"):
        planned, found = rows[name]
        assert planned == pytest.approx(found, rel=TOLERANCE), f"{name}: {planned / found:.3f} of what was found"


def test_the_benchmark_runs_any_layout_on_one_process(measured: dict[str, Any]) -> None:
    rows = {name: (planned, found) for name, planned, found in measured["run"]}
    assert rows["total"][0] == pytest.approx(rows["total"][1], rel=TOLERANCE)
    head, *lines = measured["text"].splitlines()
    assert head.split()[:2] == ["host", "planned"]
    assert [line.split("  ")[0] for line in lines] == list(rows)
    assert all(0.85 < float(line.split()[-1]) < 1.15 for line in lines)


def test_cases_are_summed_up_by_their_extremes(measured: dict[str, Any]) -> None:
    several, table = measured["several"], measured["table"].splitlines()
    assert list(several["cases"]) == ["dense bf16 recompute=none width=64", "dense bf16 recompute=full width=64"]
    for name, ratio in several["ratios"].items():
        ratios = [rows[name]["planned"] / rows[name]["found"] for rows in several["cases"].values()]
        assert ratio == {"min": min(ratios), "max": max(ratios)}
        assert f"{name:<20} {min(ratios):.3f} to {max(ratios):.3f}" in table
    assert table[1].startswith("dense bf16 recompute=none width=64 ")
    assert len(dict(cases())) == 50


def test_it_wants_a_configuration_or_cases() -> None:
    with pytest.raises(UsageError, match="bench footprint: no configuration; name one"):
        footprint.run()
    with pytest.raises(UsageError, match="bench footprint: a configuration and --cases"):
        footprint.run(case("dense", "fp32", "none"), cases=True)


def test_recompute_keeps_less(measured: dict[str, Any]) -> None:
    kept = {name: measured["-".join(("moma_shared_depth", "bf16", name))][3][2] for name in ("none", "full")}
    assert kept["full"] < kept["none"] / 2
