# What a person reads of a run: lines, numbers in words, the banner. Looks at text only.
"""Tests of mmscale.train.log.progress_lines."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from mmscale.config import Config
from mmscale.config.load import resolve
from mmscale.plan import plan
from mmscale.train.log.progress_lines import Progress, banner, count, line, source_shares
from mmscale.wording import duration

VALUES = {"loss": 2.34567, "loss/text": 2.0, "loss/image": 3.0, "grad_norm": 0.8125, "lr": 1e-4}
SPEED = {"tokens_per_second": 12_345.6, "step_time_s": 2.0, "mfu": 0.413}


@pytest.fixture
def config() -> Config:
    model = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 2, "seq_length": 128}
    experts = {"counts": {"text": 4, "image": 2}, "shared": 1}
    train = {"steps": 500, "global_batch_size": 16, "micro_batch_size": 2}
    return resolve({"model": {**model, "experts": experts, "depth": {}}, "data": {"path": "d"}, "train": train})


def output(*, terminal: bool) -> tuple[io.StringIO, Console]:
    file = io.StringIO()
    return file, Console(file=file, force_terminal=terminal, width=160, highlight=False)


def test_line() -> None:
    assert line(90, 1000, VALUES | SPEED) == (
        "step   90/1000  loss 2.3457 (text 2.0000, image 3.0000)  grad 0.812  lr 1.00e-04  "
        "12.3k tokens/s  MFU 41.3%  left 30m20s"
    )
    assert line(1000, 1000, SPEED) == "step 1000/1000  12.3k tokens/s  MFU 41.3%"  # nothing is left
    assert line(1, 10, {"loss": float("nan")}) == "step  1/10  loss nan"


def test_tokens_without_an_expert_stand_in_the_line_and_are_noted_once() -> None:
    shares = {"experts/text/unrouted_fraction": 0.31, "experts/image/unrouted_fraction": 0.452}
    assert line(1, 10, {"loss": 1.0} | shares) == "step  1/10  loss 1.0000  unrouted text 31%, image 45%"
    file, console = output(terminal=False)
    with Progress(10, console=console) as progress:
        progress.update(1, {"loss": 1.0, "experts/image/unrouted_fraction": 0.45})
        progress.update(2, {"loss": 1.0} | shares)
        progress.update(3, {"loss": 1.0} | shares)
    lines = file.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[2] == (
        "note: step 2: experts take no part in 45% of the tokens of image (mean over layers): see docs/routing.md, "
        "model.experts.choice and model.experts.capacity"
    )


def test_log_file_gets_one_line_per_logged_step() -> None:
    file, console = output(terminal=False)
    with Progress(10, console=console) as progress:
        progress.step(1)
        progress.update(2, {"loss": 1.0})
        progress.say("saved [step 2]")  # brackets are text
    assert file.getvalue() == "step  2/10  loss 1.0000\nsaved [step 2]\n"


def test_terminal_gets_a_bar_that_goes_and_lines_that_stay() -> None:
    file, console = output(terminal=True)
    with Progress(10, console=console) as progress:
        progress.update(4, VALUES)
        progress.say("saved")
        progress.step(5)
    text = file.getvalue()
    assert "━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌╌ step  4/10  loss 2.3457" in text or "━━━━━━━━━━╌╌╌╌╌╌╌╌╌╌ step  5/10" in text
    assert "saved" in text
    assert text.endswith("\x1b[2K")  # the bar's line is erased


def test_other_ranks_are_silent() -> None:
    for terminal in (False, True):
        file, console = output(terminal=terminal)
        with Progress(10, enabled=False, console=console) as progress:
            progress.step(1)
            progress.update(2, VALUES)
            progress.say("saved")
        assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (812, "812"),
        (0.5, "0.5"),
        (12_345, "12.3k"),
        (999_999, "1M"),
        (7_320_000, "7.32M"),
        (1.41e9, "1.41B"),
        (2e12, "2T"),
        (float("nan"), "nan"),
    ],
)
def test_count(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (190, "3m10s"), (18_120, "5h02m"), (183_600, "2d03h"), (float("inf"), "?")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_banner(config: Config) -> None:
    text = banner(
        config,
        world_size=4,
        device="NVIDIA H100 80GB HBM3",
        plan=plan(config),
        share={"text": 0.25, "image": 0.75},
        capacities={"text": 0.3, "image": 0.7},
        sources={"data/first": 0.75, "data/second": 0.25},
        attempt=2,
        start_step=100,
    )
    rows = dict(row.split("  ", 1) for row in text.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["run"] == "runs/default, attempt 2, resumes after step 100 of 500"
    assert rows["model"] == "moma, 4 layers x 64, experts 4 text + 2 image + 1 shared, depth every 2 layers at 25%"
    assert re.fullmatch(r"\S+ total, \S+ active, \S+ for text alone, \S+ for image alone", rows["parameters"])
    assert rows["layout"] == "4 ranks: tp 1, pp 1, cp 1, ep 1, dp 4, bf16, on NVIDIA H100 80GB HBM3"
    assert rows["step"] == "2.05k tokens = 16 sequences x 128; 2 micro-batches of 2 per replica"
    assert rows["data"] == "text 25.0%, image 75.0%"
    assert rows["experts"] == "slots for text 30.0%, image 70.0% of the tokens (model.experts.share)"
    assert rows["sources"] == "data/first 75.0%, data/second 25.0%"


def test_shares_of_sources(config: Config) -> None:
    blend = [{"path": "a", "weight": 3.0}, {"path": "b", "weight": 1.0}, {"path": "c", "weight": 0.0}]
    data = config.data.model_validate({"blend": blend})
    assert source_shares(config.model_copy(update={"data": data})) == {"a": 0.75, "b": 0.25}


def test_banner_without_plan_and_data(config: Config) -> None:
    text = banner(config, world_size=1, device="cpu")
    assert f"{config.run.dir}/{config.run.name}, attempt 1, 500 steps" in text
    stage = Path("runs") / "tiny" / "sft"  # a stage is a run by itself
    assert f"{stage}, attempt 1" in banner(config, world_size=1, device="cpu", folder=stage)
    assert "1 rank: " in text
    assert "parameters" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_copy_gets_what_stays_and_every_logged_step(terminal: bool) -> None:
    _, console = output(terminal=terminal)
    copied: list[str] = []
    with Progress(10, console=console, copy=copied.append) as progress:
        progress.say("first")
        progress.step(1)
        progress.update(2, {"loss": 1.0})
    assert copied == ["first", "step  2/10  loss 1.0000"]
    with Progress(10, enabled=False, copy=copied.append) as silent:
        silent.say("of another rank")
    assert len(copied) == 2
