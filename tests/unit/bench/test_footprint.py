"""What the plan says about memory, against the tensors of real training steps on this machine's CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmscale.bench import footprint
from mmscale.config import Config
from mmscale.config.load import resolve
from mmscale.errors import UsageError
from mmscale.plan.activations import Kernels
from mmscale.runtime import groups
from tests.support import Ranks, run_ranks

# What the issue asks for. Seen: 2 % for a step, 1 % for everything, 6 % for the step of the first model recomputed.
TOLERANCE = 0.15

_FEED_FORWARD = {"recompute": "selective", "recompute_modules": ["mlp"]}
_EXPERTS = {"counts": {"text": 4, "image": 2}, "share": {"text": 0.75, "image": 0.25}}
_MODELS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "moma": {"kind": "moma", "experts": _EXPERTS, "norm": "post"},
    "moma_shared_depth": {
        "kind": "moma",
        "experts": _EXPERTS | {"shared": 1},
        "norm": "post_per_expert",
        "depth": {"every": 2, "capacity": 0.25},
    },
}


def _config(model: str, dtype: str, recompute: str) -> Config:
    shape = {
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 344,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 128,
    }
    return resolve(
        {
            "vocab": {"modalities": [{"name": "text", "size": 1024}, {"name": "image", "size": 512}]},
            "model": shape | _MODELS[model],
            "train": {"micro_batch_size": 2, "global_batch_size": 2},
            "parallel": {"recompute": recompute} if recompute != "mlp" else _FEED_FORWARD,
            "precision": {"dtype": dtype},
        },
        (),
    )


_CASES = [
    ("dense", "fp32", "none"),
    ("dense", "bf16", "selective"),
    ("moma", "bf16", "none"),
    ("moma", "fp32", "full"),
    ("moma", "bf16", "mlp"),
    ("moma_shared_depth", "bf16", "none"),
    ("moma_shared_depth", "bf16", "full"),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Rows of `footprint.compare` for every case, from one process."""
    file: Path = tmp_path_factory.mktemp("footprint") / "rows.json"

    def measure(ranks: Ranks) -> None:
        groups.start(ranks)
        found: dict[str, Any] = {}
        for case in _CASES:
            config = _config(*case)
            groups.initialize_layout(tp=1, pp=1, vpp=None, ep=1, seed=1)
            found["-".join(case)] = footprint.compare(config, footprint.measure(config), kernels=Kernels.HOST)
            groups.destroy_layout()
        groups.finalize()
        spread = _config("moma", "fp32", "none")
        spread = spread.model_copy(update={"parallel": spread.parallel.model_copy(update={"tp": 2, "ep": 2})})
        result = footprint.run(spread)
        found["run"] = [[name, row["planned"], row["found"]] for name, row in result["rows"].items()]
        file.write_text(json.dumps(found | {"text": footprint.render(result)}))

    run_ranks(measure, world_size=1)
    rows: dict[str, Any] = json.loads(file.read_text())
    return rows


@pytest.mark.parametrize("case", _CASES, ids="-".join)
def test_the_plan_says_what_a_step_uses(case: tuple[str, str, str], measured: dict[str, Any]) -> None:
    rows = {name: (planned, found) for name, planned, found in measured["-".join(case)]}
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


def test_it_wants_a_configuration() -> None:
    with pytest.raises(UsageError, match="bench footprint: no configuration; name one"):
        footprint.run()


def test_recompute_keeps_less(measured: dict[str, Any]) -> None:
    kept = {case: rows[3][2] for case, rows in measured.items() if case != "text"}
    assert kept["moma_shared_depth-bf16-full"] < kept["moma_shared_depth-bf16-none"] / 2
