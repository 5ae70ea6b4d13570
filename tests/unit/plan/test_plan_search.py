"""The search over layouts: what is tried, what is refused and why, in which order, and how fast."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmscale.config import Config
from mmscale.config.load import load, resolve
from mmscale.config.rules import violations
from mmscale.errors import UsageError
from mmscale.plan import plan, render, search
from mmscale.plan.layouts import usable_bytes
from mmscale.plan.search import is_own
from mmscale.tables.gpus import DEFAULT, GPUS
from tests.bounded_work import bounded_work

PAPER = Path(__file__).parents[3] / "configs" / "moma_1b4_4t4i.yaml"


def config(*overrides: str, **model: Any) -> Config:
    shape = {
        "kind": "moma",
        "num_layers": 8,
        "hidden_size": 1024,
        "ffn_hidden_size": 2816,
        "num_attention_heads": 8,
        "seq_length": 2048,
        "experts": {"counts": {"text": 4, "image": 4}, "share": {"text": 0.5, "image": 0.5}},
    }
    return resolve({"model": shape | model, "train": {"global_batch_size": 64}}, overrides)


def _grid(gpus: int) -> Iterator[tuple[int, int]]:
    for tp in range(1, gpus + 1):
        for pp in range(1, gpus + 1):
            if gpus % (tp * pp) == 0:
                yield tp, pp


def test_every_tensor_and_pipeline_size_that_the_rules_allow_is_found() -> None:
    gpus = 8
    found = {(layout.config.parallel.tp, layout.config.parallel.pp) for layout in search(config(), gpus).layouts}
    allowed = {
        (tp, pp)
        for tp, pp in _grid(gpus)
        if not violations(config(f"parallel.tp={tp}", f"parallel.pp={pp}"), world_size=gpus)
    }
    assert found == allowed
    assert len(allowed) > 5


def test_counts_add_up() -> None:
    found = search(config(), 8, gpu_memory=4)
    fitting = sum(layout.fits is True for layout in found.layouts)
    assert found.tried == fitting + sum(rejected.count for rejected in found.rejected.values())


def test_what_fits_fits_and_only_then_stops_recomputing() -> None:
    settings = config("train.micro_batch_size=4")
    found = search(settings, 8, gpu_memory=12)
    assert {layout.config.parallel.recompute for layout in found.layouts} > {"none"}
    for layout in found.layouts:
        assert (layout.memory.total <= usable_bytes(12)) is layout.fits
    memory = found.rejected["memory"]
    assert memory.cause.startswith("needs ")
    assert "usable are 10.8" in memory.cause


def test_where_nothing_fits_the_nearest_are_shown() -> None:
    found = search(config(), 4, gpu_memory=0.5)
    assert 0 < len(found.layouts) <= 6
    assert {layout.fits for layout in found.layouts} == {False}
    least = min(layout.memory.total for layout in found.layouts)
    assert "does not fit" in found.layouts[0].reasons[0]
    summary = plan(config(), gpus=4, gpu_memory=0.5)
    assert summary["layouts_possible"] == 0
    assert least > usable_bytes(0.5)


def test_causes_that_differ_in_numbers_are_one_rule() -> None:
    found = search(config(ffn_hidden_size=2815), 8)
    (odd,) = (entry for rule, entry in found.rejected.items() if "ffn_hidden_size" in rule)
    assert odd.cause == "model.ffn_hidden_size = 2815 is not divisible by parallel.tp = 2"
    assert odd.example["tp"] == 2
    assert odd.count > 10


def test_other_micro_batches_are_another_model_where_experts_choose_within_them() -> None:
    reasons = {
        scope: [
            reason
            for layout in search(config(f"model.experts.scope={scope}"), 4).layouts
            for reason in layout.reasons
            if "experts choose among" in reason
        ]
        for scope in ("sequence", "micro_batch")
    }
    assert reasons["sequence"] == []
    assert "experts choose among 2 sequences, not 1" in reasons["micro_batch"]


def test_the_own_layout_is_among_them_or_said_to_be_refused() -> None:
    own = config("parallel.tp=2", "parallel.recompute=full", "train.micro_batch_size=2")
    layouts = search(own, 8, gpu_memory=80).layouts
    assert sum(is_own(layout, own) for layout in layouts) == 1
    summary = plan(config("parallel.tp=8", "parallel.pp=2"), gpus=8)
    assert "does not divide the 8 ranks" in summary["own_layout_refused"]
    assert "own layout is refused" in render(summary)


def test_gpu_gives_its_memory() -> None:
    assert plan(config(), gpus=2, gpu="h200")["gpu_memory_gib"] == 140.4
    assert plan(config(), gpus=2, gpu="h200", gpu_memory=40)["gpu_memory_gib"] == 40
    assert plan(config())["gpu_memory_gib"] is None  # the configuration's own layout, wherever it runs
    with pytest.raises(UsageError):
        plan(config(), gpus=2, gpu="tpu")


def test_where_no_gpu_is_named_layouts_fit_the_one_that_times_are_of() -> None:
    """Without a limit the fastest layouts would be those that need the most memory."""
    summary = plan(load(PAPER), gpus=8)
    assert summary["gpu_memory_gib"] == GPUS[DEFAULT].memory
    assert summary["layouts"] == plan(load(PAPER), gpus=8, gpu=DEFAULT)["layouts"]
    assert 0 < summary["layouts_possible"] < summary["layouts_tried"]
    assert summary["layouts"][0]["memory"]["total_gib"] < GPUS[DEFAULT].memory


def test_the_papers_model_on_64_devices() -> None:
    settings = load(PAPER, ["model.ffn_hidden_size=5461"])  # the paper's width, which tensor parallelism cannot halve
    with bounded_work():
        summary = plan(settings, gpus=64, gpu_memory=80, gpu="h100")
    assert summary["layouts_tried"] > 1000
    assert summary["layouts_possible"] > 50
    best = summary["layouts"][0]
    assert best["fits"] is True
    assert 0.2 < best["mfu"] < 0.6
    text = render(summary, width=160)
    for words in ("H100 SXM", "step, ", "sent per rank", "rejected, by first failing rule", "ffn_hidden_size = 5461"):
        assert words in text


def test_the_recipe_says_what_the_plan_says() -> None:
    said = re.search(r"([\d.]+) GiB a rank, ([\d.]+) s a step", PAPER.read_text(encoding="utf-8"))
    assert said is not None
    (own,) = (entry for entry in plan(load(PAPER), gpus=64, gpu_memory=80, gpu="h100")["layouts"] if entry["current"])
    assert own["fits"] is True
    assert float(said[1]) == round(own["memory"]["total_gib"], 1)
    assert float(said[2]) == round(own["cost"]["total"], 2)


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys; from mmscale.cli import app; "
        f"app(['plan', '{PAPER}', '--gpus', '16', '--gpu', 'h100', '--json'], standalone_mode=False); "
        "assert not {'torch', 'megatron', 'numpy'} & set(sys.modules), 'too much imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["layouts"][0]["communication_bytes"]["grad_reduce"] > 0
    assert {"step_law", "rejected", "refused", "assumptions", "gpu", "cluster"} <= set(found)


def test_an_unknown_gpu_is_a_usage_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmscale", "plan", str(PAPER), "--gpus", "8", "--gpu", "v100"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 2
    assert "--gpu v100: no figures of it" in done.stderr
    assert "fix: use one of h100, h200, b200, gb200, a100" in done.stderr


def test_long_sequences_are_planned_with_context_parallelism() -> None:
    found = plan(load(PAPER, ["model.seq_length=32768", "train.micro_batch_size=1"]), gpus=8, gpu="h100")
    split = [entry for entry in found["layouts"] if entry["cp"] > 1 and entry["fits"]]
    assert {entry["cp"] for entry in split} == {2, 4, 8}
    for entry in split:
        assert any(reason.startswith("needs data.document_multiple=") for reason in entry["reasons"])
        assert entry["communication_bytes"]["cp"] > 0 and entry["time_s"]["cp"] > 0
    assert " cp " in re.sub("[┃│]", " ", render(found))
    short = plan(load(PAPER), gpus=8, gpu="h100")
    assert all(entry["cp"] == 1 for entry in short["layouts"])
