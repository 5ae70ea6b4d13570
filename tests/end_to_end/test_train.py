"""`mmscale train` from end to end: what it writes, how it goes on after a stop, a kill, and more steps.

One run is trained in one go. Another loses a rank to SIGKILL, is stopped by SIGTERM, and ends with the same numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mmscale.report.layers import layers_of
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from mmscale.runtime import activity
from tests.end_to_end import running
from tests.end_to_end.conftest import STEPS
from tests.end_to_end.running import Ended, assert_says, mmscale, start, undocumented, warnings_in

# mfu is missing on purpose: nobody knows a CPU's peak. save_stall_s is there where there was a save.
KEYS = {
    *("step", "attempt", "time", "flops", "tokens", "tokens/text", "tokens/image"),
    *("loss", "loss/text", "loss/image", "z_loss"),
    *("grad_norm", "lr", "step_time_s", "data_wait_s", "tokens_per_second", "model_tflops_per_rank", "output_norm"),
    *("experts/text/tokens_per_expert_cv", "experts/image/tokens_per_expert_cv"),
    *("experts/text/gate_mass_cv", "experts/image/gate_mass_cv"),
    *("experts/text/unrouted_fraction", "experts/image/unrouted_fraction"),
    *("depth/selected_fraction/text", "depth/selected_fraction/image"),
}
# What must be the same however often a run was interrupted; the rest are times and numbers of attempts.
EXACT = ("tokens", "loss", "loss/text", "loss/image", "z_loss", "grad_norm", "lr", "eval/loss", "output_norm")


@dataclass(frozen=True)
class Run:
    """A finished run and what its last attempt printed."""

    folder: Path
    ended: Ended

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)

    def events(self, attempt: int | None = None) -> list[str]:
        return [e["event"] for e in read_events(self.folder) if attempt is None or e["attempt"] == attempt]


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two ranks without any interruption."""
    runs = tmp_path_factory.mktemp("whole")
    # Steps of milliseconds: asynchronous saves would be left out now and then, and the list of checkpoints be another.
    ended = mmscale(
        "train", config, f"run.dir={runs}", "log.tensorboard=true", "checkpoint.asynchronous=false", nproc=2
    )
    return Run(runs / "tiny", ended)


@dataclass(frozen=True)
class Interrupted:
    """A run in three attempts of the real launcher."""

    folder: Path
    killed: Ended
    left_behind: list[int]
    committed_when_killed: list[str]
    stopped: Ended
    finished: Ended


@pytest.fixture(scope="module")
def interrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """Rank 1 killed after the first checkpoint; started again and stopped; started again to its end."""
    runs = tmp_path_factory.mktemp("interrupted")
    folder = runs / "tiny"
    command = ("train", config, f"run.dir={runs}", "--nproc", "2")

    def at_step(step: int, attempt: int) -> bool:
        lines = read_metrics(folder)
        return bool(lines) and lines[-1]["step"] >= step and lines[-1]["attempt"] == attempt

    first = start(*command)
    first.until(lambda: at_step(13, 1) and (folder / "checkpoints" / "step_00000010").exists())
    os.kill(first.rank(1), signal.SIGKILL)
    killed = first.end()
    left_behind = first.left_behind()
    committed = sorted(entry.name for entry in (folder / "checkpoints").glob("step_*") if "." not in entry.name)

    second = start(*command)
    second.until(lambda: at_step(22, 2))
    second.process.send_signal(signal.SIGTERM)
    stopped = second.end()

    finished = start(*command).end()
    return Interrupted(folder, killed, left_behind, committed, stopped, finished)


# --- a run in one go ------------------------------------------------------------------------------------------------


def test_it_finishes_and_the_run_folder_is_as_documented(whole: Run) -> None:
    assert whole.ended.status == 0, whole.ended
    names = {entry.name for entry in whole.folder.iterdir()}
    assert {"config.yaml", "config.1.yaml", "metrics.jsonl", "events.jsonl", "environment.json", "checkpoints"} <= names
    assert (whole.folder / "config.yaml").read_text() == (whole.folder / "config.1.yaml").read_text()
    assert not list(whole.folder.rglob("*.tmp*"))
    saved = sorted(entry.name for entry in (whole.folder / "checkpoints").iterdir())
    assert saved == ["latest", *(f"step_{step:08d}" for step in range(10, STEPS + 1, 10))]


def test_metrics_have_the_documented_keys_on_every_step(whole: Run) -> None:
    lines = whole.metrics()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not undocumented(lines)
    for line in lines:
        assert set(line) >= KEYS, KEYS - set(line)
        assert all(isinstance(value, int | float) for value in line.values()), line
        assert "mfu" not in line
    assert lines[10]["save_stall_s"] > 0  # counted to the step after the save, when it is known
    assert lines[-1]["flops"] == pytest.approx(lines[-1]["tokens"] * lines[0]["flops"] / lines[0]["tokens"])
    assert [line["step"] for line in layers_of(whole.folder)] == [1, *range(5, STEPS + 1, 5)]
    for layer in layers_of(whole.folder)[-1]["layers"].values():
        assert set(layer) >= {"experts", "output_norm"}
    assert list(layers_of(whole.folder)[-1]["layers"]) == [str(number) for number in range(2)]
    assert lines[-1]["tokens"] == lines[-1]["tokens/text"] + lines[-1]["tokens/image"]
    assert lines[0]["depth/selected_fraction/text"] + lines[0]["depth/selected_fraction/image"] > 0


def test_the_model_learns_and_is_evaluated(whole: Run) -> None:
    lines = whole.metrics()
    assert lines[0]["loss"] == pytest.approx(6.25, abs=0.2)  # ln(512): it knows nothing yet
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.0
    evaluated = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert evaluated.keys() == {30, STEPS}
    assert evaluated[STEPS] < evaluated[30]
    assert {"eval/loss/text", "eval/loss/image"} <= set(lines[-1])


def test_events_tell_the_story(whole: Run) -> None:
    saves = ["save_begin", "save_committed"] * (STEPS // 10)
    told = [name for name in whole.events(1) if name != "data_verified"]  # in the background, whenever it is done
    assert told == ["start", *saves, "finish"]
    assert all({"time", "attempt", "event"} <= set(event) for event in read_events(whole.folder))


def test_tensorboard_events_are_written_when_asked(whole: Run, interrupted: Interrupted) -> None:
    (file,) = (whole.folder / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"loss/image" in content and b"eval/loss" in content
    assert not (interrupted.folder / "tensorboard").exists()


def test_the_saved_configuration_trains_the_same_run(whole: Run) -> None:
    saved = yaml.safe_load((whole.folder / "config.yaml").read_text())
    assert saved["model"]["experts"]["share"] != "auto"  # as resolved from the data
    assert mmscale("config", "check", whole.folder / "config.yaml", "--json").status == 0


def test_a_second_start_says_that_it_is_done(whole: Run, config: Path) -> None:
    before = (whole.folder / "metrics.jsonl").read_bytes()
    ended = mmscale("train", config, f"run.dir={whole.folder.parent}", nproc=2)
    assert ended.status == 0
    assert f"is done: {STEPS} of {STEPS} steps" in ended.err and "train.steps" in ended.err
    assert (whole.folder / "metrics.jsonl").read_bytes() == before


def test_more_steps_and_other_ranks_go_on(whole: Run, config: Path, tmp_path: Path) -> None:
    """From a checkpoint of two ranks one process repeats the last ten steps, then adds two."""
    shutil.copytree(whole.folder / "checkpoints" / "step_00000050", tmp_path / "tiny/checkpoints/step_00000050")
    ended = mmscale("train", config, f"run.dir={tmp_path}", "parallel.ep=1", "--json")
    assert ended.status == 0, ended
    assert json.loads(ended.out)["last"]["step"] == STEPS
    again = {line["step"]: line for line in read_metrics(tmp_path / "tiny")}
    assert again.keys() == set(range(51, STEPS + 1))
    for line in whole.metrics()[50:]:
        assert again[line["step"]]["tokens"] == line["tokens"]
        assert again[line["step"]]["loss"] == pytest.approx(line["loss"], abs=1e-5)  # another batch differs by 1e-2
    more = ("train", config, f"run.dir={tmp_path}", "parallel.ep=1", f"train.steps={STEPS + 2}")
    asked = mmscale(*more)
    assert_says(asked, status=2, cause=r"learning rate would jump .*3\.36e-06 -> 9\.79e-06", remedy="optim.restart=60")
    ended = mmscale(*more, "--yes")
    assert ended.status == 0 and f"resumes after step {STEPS} of {STEPS + 2}" in ended.err
    assert read_metrics(tmp_path / "tiny")[-1]["step"] == STEPS + 2
    assert next(e["event"] for e in read_events(tmp_path / "tiny") if e["attempt"] == 2) == "resume"


def test_eval_of_a_run(whole: Run, digits: Path) -> None:
    """One process, weights only, gives what training measured after its last step."""
    ended = mmscale("eval", whole.folder, "--data", digits, "--batches", "2", "--json")
    assert ended.status == 0, ended
    result = json.loads(ended.out)
    assert result["loss"] == pytest.approx(whole.metrics()[-1]["eval/loss"], abs=1e-5)
    assert result["routing"] == "batch"


def test_sample_draws_pictures_that_a_seed_repeats(whole: Run, tmp_path: Path) -> None:
    """Names the routing, writes every picture in the data set's size, and the same ones for the same seed."""
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    prompts = ("--prompt", "draw a seven", "--prompt", "draw a two", "--count", "2", "--json")
    for out, seed in ((first, "1"), (again, "1"), (other, "2")):
        ended = mmscale("sample", whole.folder, *prompts, "--seed", seed, "--out", out)
        assert ended.status == 0, ended
    result = json.loads(ended.out)
    assert result["routing"] == "batch" and len(result["images"]) == 4
    pictures = {out: [file.read_bytes() for file in sorted(out.glob("0*.png"))] for out in (first, again, other)}
    assert pictures[first] == pictures[again] != pictures[other]
    assert {Image.open(file).size for file in first.glob("0*.png")} == {(8, 8)}
    assert Image.open(first / "samples.png").width > 100


def test_a_prompt_that_does_not_fit_is_refused(whole: Run, tmp_path: Path) -> None:
    ended = mmscale("sample", whole.folder, "--prompt", "draw " * 50, "--out", tmp_path / "none")
    assert_says(ended, status=3, cause="a sequence has 64", remedy="shorten the prompt")
    assert not (tmp_path / "none").exists()


def test_verify_layout_prints_equal(config: Path) -> None:
    ended = mmscale("verify-layout", config, "parallel.ep=2", "precision.dtype=bf16", nproc=2)
    assert ended.status == 0, ended
    assert "choices that differ" in ended.out and "(tolerance 2%)" in ended.out
    assert "equal to one process" in ended.out and "NOT" not in ended.out
    assert "verdict" not in ended.others  # said once


def test_logs_print_what_rank_0_printed(whole: Run) -> None:
    """Rank 0 of a local run prints at the terminal; `mmscale logs` finds the same lines."""
    assert mmscale("logs", whole.folder).out == whole.ended.err


# --- a run that was interrupted -------------------------------------------------------------------------------------


def test_a_killed_rank_is_named_and_leaves_nobody_behind(interrupted: Interrupted) -> None:
    ended = interrupted.killed
    assert ended.status not in (0, 2, 3, 4, 5, 74, 75)
    assert "error: rank 1 of 2 was ended by SIGKILL (9); the other ranks were ended" in ended.err
    assert interrupted.left_behind == []
    assert interrupted.committed_when_killed[0] == "step_00000010"


def test_the_start_after_a_kill_goes_on_from_the_last_checkpoint(interrupted: Interrupted) -> None:
    (resumed,) = (e for e in read_events(interrupted.folder) if e["attempt"] == 2 and e["event"] == "resume")
    newest = int(interrupted.committed_when_killed[-1].removeprefix("step_"))
    assert resumed["step"] == newest < STEPS
    assert f"resumes after step {newest}" in interrupted.stopped.err


def test_sigterm_saves_and_says_so(interrupted: Interrupted) -> None:
    assert interrupted.stopped.status == 75, interrupted.stopped
    assert "stopped on request after step" in interrupted.stopped.err
    events = [e for e in read_events(interrupted.folder) if e["attempt"] == 2]
    assert [e["event"] for e in events[-3:]] == ["save_begin", "save_committed", "stop"]
    assert 22 <= events[-1]["step"] < STEPS
    assert events[-2]["step"] == events[-1]["step"]


def test_an_interrupted_run_ends_with_the_same_numbers(interrupted: Interrupted, whole: Run) -> None:
    """Exactly: the same ranks sum in the same order, and no batch is left out or read twice."""
    assert interrupted.finished.status == 0, interrupted.finished
    lines, expected = read_metrics(interrupted.folder), whole.metrics()
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert {line["attempt"] for line in lines} == {1, 2, 3}
    for line, other in zip(lines, expected, strict=True):
        assert {key: line.get(key) for key in EXACT} == {key: other.get(key) for key in EXACT}, line["step"]


def test_the_terminal_shows_no_warnings_of_libraries(interrupted: Interrupted) -> None:
    """A train, a save, an evaluation, a stop: nothing but our own lines. Rank 1's log is checked too."""
    logs = [file.read_text() for file in (interrupted.folder / "logs").rglob("rank_1.log")]
    assert len(logs) == 3
    for text in (interrupted.finished.err, interrupted.finished.out, interrupted.stopped.err, logs[-1], logs[-2]):
        assert warnings_in(text) == []
    first = interrupted.finished.err.splitlines()[0]
    assert first.startswith("run "), first


def test_logs_print_what_rank_0_printed_in_each_attempt(interrupted: Interrupted) -> None:
    for attempt, ended in ((2, interrupted.stopped), (3, interrupted.finished)):
        assert mmscale("logs", interrupted.folder, "--attempt", str(attempt)).out == ended.err
    assert mmscale("logs", interrupted.folder, "--rank", "1").status == 0


def test_lines_about_the_start_end_with_the_first_logged_step(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "FIRST_LINE", 0.01)
    monkeypatch.setattr(activity, "LINE_EVERY", 0.01)
    monkeypatch.setattr(running, "spoken", lambda text: text)  # which leaves these lines out
    ended = mmscale("train", config, f"run.dir={tmp_path}", "train.steps=6", "log.every=1", nproc=2)
    assert ended.status == 0, ended
    before, first, after = ended.err.partition("step 1/6")
    assert first
    assert "taking the first step" in before
    assert "taking the first step" not in after
