# The two logs of a run, what reading them back makes of torn, repeated and odd lines, and the throughput clock.
"""Tests of mmscale.train.log.metrics_log and mmscale.runs, mmscale.train.throughput and mmscale.runtime.environment."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import mmscale
from mmscale.report.layers import layers_of
from mmscale.runs.attempts import next_attempt
from mmscale.runs.events import EventLog, read_events
from mmscale.runs.metrics import read_metrics
from mmscale.runtime import environment
from mmscale.runtime.environment import environment_of_run, environment_text
from mmscale.train import throughput
from mmscale.train.log.metrics_log import MetricsLog
from mmscale.train.throughput import Throughput, peak_tflops
from tests.module_time import replace_time


def lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_one_object_per_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run", attempt=3)
    log.write(10, {"loss": 2.5, "tokens": 4096, "mfu": None})
    assert json.loads(lines(tmp_path / "run")[0]) == {"step": 10, "attempt": 3, "loss": 2.5, "tokens": 4096}
    assert '"tokens": 4096' in lines(tmp_path / "run")[0]  # a count stays a whole number


def test_not_finite_is_a_word_in_the_file_and_a_float_again(tmp_path: Path) -> None:
    MetricsLog(tmp_path, attempt=1).write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    raw = json.loads(lines(tmp_path)[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (raw["a"], raw["b"], raw["c"]) == ("nan", "inf", "-inf")
    record = read_metrics(tmp_path)[0]
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_scalars_of_numpy_and_torch(tmp_path: Path) -> None:
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    MetricsLog(tmp_path, attempt=1).write(1, {"a": numpy.int64(3), "b": numpy.float32(0.5), "c": torch.tensor(0.25)})
    assert read_metrics(tmp_path) == [{"step": 1, "attempt": 1, "a": 3, "b": 0.5, "c": 0.25}]


def test_latest_attempt_of_a_step_counts(tmp_path: Path) -> None:
    first, second = MetricsLog(tmp_path, attempt=1), MetricsLog(tmp_path, attempt=2)
    for step in (10, 20, 30):
        first.write(step, {"loss": 1.0, "save_stall_s": 3.0})
    second.write(20, {"loss": 0.5})
    assert read_metrics(tmp_path) == [
        {"step": 10, "attempt": 1, "loss": 1.0, "save_stall_s": 3.0},
        {"step": 20, "attempt": 2, "loss": 0.5},
        {"step": 30, "attempt": 1, "loss": 1.0, "save_stall_s": 3.0},
    ]
    first.write(20, {"loss": 9.0})  # a process of the first attempt that outlived it
    assert read_metrics(tmp_path)[1]["loss"] == 0.5


def test_latest_roll_back_of_an_attempt_counts(tmp_path: Path) -> None:
    """Step 30 is done again within the attempt, and once more in another one, which beats any roll-back."""
    log = MetricsLog(tmp_path, attempt=1)
    for step in (10, 20, 30):
        log.write(step, {"loss": 1.0})
    log.write(30, {"eval/loss": 1.5})
    log.rolled_back(1)
    log.write(30, {"eval/loss": 2.5})
    log.write(30, {"loss": 2.0})
    assert read_metrics(tmp_path) == [
        {"step": 10, "attempt": 1, "loss": 1.0},
        {"step": 20, "attempt": 1, "loss": 1.0},
        {"step": 30, "attempt": 1, "rollback": 1, "loss": 2.0, "eval/loss": 2.5},
    ]
    MetricsLog(tmp_path, attempt=2).write(30, {"loss": 3.0})
    assert read_metrics(tmp_path)[-1] == {"step": 30, "attempt": 2, "loss": 3.0}


def test_held_out_line_joins_its_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, attempt=1)
    log.write(10, {"eval/loss/text": 2.0})
    log.write(10, {"loss": 1.0})
    MetricsLog(tmp_path, attempt=2).write(10, {"eval/loss/image": 3.0})  # resumed at 10 only to evaluate
    assert read_metrics(tmp_path) == [
        {"step": 10, "attempt": 2, "eval/loss/text": 2.0, "loss": 1.0, "eval/loss/image": 3.0}
    ]


def test_torn_last_line_is_left_out_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    MetricsLog(tmp_path, attempt=1).write(10, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "attem')
    assert [record["step"] for record in read_metrics(tmp_path)] == [10]
    MetricsLog(tmp_path, attempt=2).write(20, {"loss": 0.5})
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 0.5]


def test_nothing_written_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == []
    assert read_events(tmp_path / "none") == []


def test_events_and_attempts(tmp_path: Path) -> None:
    assert next_attempt(tmp_path) == 1
    log = EventLog(tmp_path, 1)
    log.add("start", step=0)
    log.add("fault", rank=3, loss=math.nan, folder=tmp_path)
    start, fault = read_events(tmp_path)
    assert (start["event"], start["attempt"], start["step"]) == ("start", 1, 0)
    assert start["time"] > 1.7e9
    assert (fault["rank"], fault["loss"], fault["folder"]) == (3, "nan", str(tmp_path))
    assert next_attempt(tmp_path) == 2
    (tmp_path / "config.7.yaml").touch()  # an attempt that died before its first event
    assert next_attempt(tmp_path) == 8


def test_layers_of_a_step_that_was_done_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, attempt=1)
    assert not (tmp_path / "layers.jsonl").exists()
    log.write_layers(10, {"1": {"output_norm": {"text": 1.0}}})
    log.write_layers(20, {"1": {"output_norm": {"text": 2.0}}})
    log.rolled_back(1)
    log.write_layers(20, {"1": {"output_norm": {"text": 3.0}}})
    with (tmp_path / "layers.jsonl").open("a") as file:
        file.write('{"step": 30, "lay')
    assert [(line["step"], line["layers"]["1"]["output_norm"]["text"]) for line in layers_of(tmp_path)] == [
        (10, 1.0),
        (20, 3.0),
    ]


# --- environment.json -----------------------------------------------------------------------------------------------


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_devices", lambda: ["H100"])
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "secret-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-2")
    text = environment_text(environment_of_run(attempt=2))
    content = json.loads(text)
    assert content["mmscale"] == mmscale.__version__
    assert content["packages"]["numpy"]
    assert content["variables"]["NCCL_DEBUG"] == "INFO"
    assert (content["devices"], content["attempt"]) == (["H100"], 2)
    assert content["hosts"]
    assert "secret" not in json.dumps(content["variables"])


def test_hosts_of_a_slurm_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    assert environment_of_run()["hosts"] == ["n1", "n2"]


def test_git_state_of_a_package_that_no_checkout_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.mmscale, "__file__", str(tmp_path / "mmscale" / "__init__.py"))
    (tmp_path / "mmscale").mkdir()
    assert environment.git_state() is None


# --- throughput -----------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    replace_time(monkeypatch, throughput, perf_counter=clock)
    meter = Throughput(flops_per_token=6e9, world_size=2, peak_tflops=300.0)
    for _ in range(2):
        with meter.measure("data_wait_s"):
            clock.time += 0.5
        clock.time += 1.5
        meter.step(100_000)
    with meter.measure("save_stall_s"):
        clock.time += 10.0
    values = meter.read()
    assert values == pytest.approx(
        {
            "step_time_s": 2.0,
            "data_wait_s": 0.5,
            "tokens_per_second": 50_000.0,
            "model_tflops_per_rank": 150.0,
            "mfu": 0.5,
            "save_stall_s": 10.0,
        }
    )
    assert meter.read() == {}


def test_throughput_leaves_out_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    replace_time(monkeypatch, throughput, perf_counter=clock)
    meter = Throughput()
    clock.time += 1.0
    meter.step(10)
    assert meter.read() == {"step_time_s": 1.0, "tokens_per_second": 10.0}
    with meter.measure("save_stall_s"):
        clock.time += 2.0
    assert meter.read() == {"save_stall_s": 2.0}


def test_throughput_of_an_end_between_logged_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 4 s and 2 s, a save within, and waiting after them, which belongs to no step."""
    clock = Clock()
    replace_time(monkeypatch, throughput, perf_counter=clock)
    meter = Throughput()
    assert meter.unread() == {}
    clock.time += 4.0
    meter.step(10)
    with meter.measure("save_stall_s"):
        clock.time += 5.0
    clock.time += 2.0
    meter.step(10)
    with meter.measure("save_stall_s"):
        clock.time += 1.0
    clock.time += 30.0
    assert meter.unread() == {"step_time_s": 3.0, "save_stall_s": 6.0}


def test_throughput_counts_a_pause_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    replace_time(monkeypatch, throughput, perf_counter=clock)
    meter = Throughput()

    def save() -> None:
        with meter.measure("save_stall_s"):
            clock.time += 2.0
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        save()
    assert meter.read() == {"save_stall_s": 2.0}


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "bf16", 835.0),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("AMD EPYC 7763", "bf16", None),
    ],
)
def test_peak_is_known_or_none(name: str, dtype: str, peak: float | None) -> None:
    assert peak_tflops(name, dtype) == peak
