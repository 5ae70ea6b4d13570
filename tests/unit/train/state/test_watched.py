"""Held-out figures over a run: the best one, early ends, a rising loss; counted on across attempts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.checkpoint.save_settings import BestCheckpoint
from mmscale.config import Config
from mmscale.config.derived import held_out_figures
from mmscale.config.load import resolve
from mmscale.runs.held_out import HeldOut
from mmscale.tables.routings import measured_routings
from mmscale.train.stage_state import HeldOutTrend, trends_from_plain, trends_to_plain
from mmscale.train.state.watched import LOSS, RISING, Watch

MODEL = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "seq_length": 8}
OTHER = "eval/loss/image"


def config(*overrides: str, **model: Any) -> Config:
    return resolve(
        {"model": {"kind": "dense", **MODEL} | model}, ["train.steps=100", "train.eval_every=10", *overrides]
    )


@dataclass
class Run:
    """A state, and what was told."""

    step: int = 0
    watched: dict[str, HeldOutTrend] = field(default_factory=dict)
    best: BestCheckpoint | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def watch(self, settings: Config) -> Watch:
        return Watch(
            settings,
            self,
            saver=self,
            on_event=lambda event, **f: self.events.append({"event": event, **f}),
            say=self.say,
        )

    def say(self, line: str) -> None:
        self.lines.append(line)

    def evaluate(self, watch: Watch, *values: float, metric: str = LOSS) -> None:
        for value in values:
            self.step += 10
            watch.record(self.step, {metric: value})


def test_a_roll_back_goes_back_to_the_best_of_then() -> None:
    run, settings = Run(), config(f"checkpoint.keep_best={LOSS}")
    watch = run.watch(settings)
    run.evaluate(watch, 3.0)
    saved = run.step, trends_to_plain(run.watched)
    run.evaluate(watch, 1.0)
    run.step, run.watched = saved[0], trends_from_plain(saved[1])
    watch.rolled_back()
    assert run.best == BestCheckpoint(LOSS, 10, 3.0)


def test_a_roll_back_brings_no_other_quantities_back() -> None:
    """The newest checkpoint may be from before this attempt changed what is measured."""
    run, settings = Run(), config(f"checkpoint.keep_best={LOSS}")
    run.evaluate(run.watch(settings), 1.0)
    saved = run.step, trends_to_plain(run.watched)
    watch = run.watch(settings)
    watch.resume(["train.eval_batches: 2 -> 4"])
    assert run.watched == {} and run.best is None
    run.step, run.watched = saved[0], trends_from_plain(saved[1])
    watch.rolled_back()
    assert run.watched == {} and run.best is None


@pytest.mark.parametrize(("line", "forgotten"), [
    ('data.validation.web: (none) -> "x"', set()),
    ('data.validation.books: "x" -> "y"', {"eval/validation/books/loss"}),
    ("data: d is new", {LOSS}),
    ("learning rate: 1 -> 2 at step 11", set()),
    ("model.seq_length: 1 -> 2", {LOSS, "eval/validation/books/loss"}),
])  # fmt: skip
def test_only_what_a_change_concerns_is_looked_for_again(line: str, forgotten: set[str]) -> None:
    """Adding a validation set must not make the run forget its best checkpoint."""
    books = "eval/validation/books/loss"
    run, made = Run(), config(f"checkpoint.keep_best={books}", "data.validation={books: x}")
    watch = run.watch(made)
    run.step = 10
    watch.record(10, {LOSS: 1.0, books: 2.0})
    saved = trends_to_plain(run.watched)
    watch = run.watch(made)
    watch.resume([line])
    assert {LOSS, books} - run.watched.keys() == forgotten
    assert (run.best is None) == (books in forgotten)
    run.watched = trends_from_plain(saved)
    watch.rolled_back()
    assert {LOSS, books} - run.watched.keys() == forgotten


@pytest.mark.parametrize(("parts", "forgotten"), [(None, True), ({""}, True), ({"books"}, False), (set(), False)])
def test_a_set_that_is_read_as_before_keeps_its_best(parts: set[str] | None, forgotten: bool) -> None:
    """`train.eval_batches` changed; the names are of the sets of which other batches are read, None: unknown."""
    run, settings = Run(), config(f"checkpoint.keep_best={LOSS}")
    run.evaluate(run.watch(settings), 1.0)
    run.watch(settings).resume(["train.eval_batches: 2 -> 4"], parts=parts)
    assert (LOSS not in run.watched) is forgotten and (run.best is None) is forgotten


values = st.lists(st.one_of(st.floats(0, 10), st.just(math.nan), st.just(math.inf)), max_size=20)


@settings(deadline=None)
@given(values)
def test_a_course_is_what_the_list_of_values_says(found: list[float]) -> None:
    trend = HeldOutTrend()
    for number, value in enumerate(found, start=1):
        trend.add(number, value)
        trend.add(number, -1.0)  # the same step again, by another attempt
    finite = [value for value in found if math.isfinite(value)]
    assert trend.best == min(finite, default=math.inf)
    assert trend.best_step == (found.index(trend.best) + 1 if finite else 0)
    assert trend.since == len(found) - trend.best_step


@settings(deadline=None)
@given(values, st.integers(0, 20))
def test_a_checkpoint_keeps_it(found: list[float], cut: int) -> None:
    """Whatever value was the last before it was saved and loaded."""
    one, other = HeldOutTrend(), HeldOutTrend()
    for number, value in enumerate(found, start=1):
        one.add(number, value)
        if number == cut:
            other = trends_from_plain(json.loads(json.dumps(trends_to_plain({LOSS: other}))))[LOSS]
        other.add(number, value)
    assert repr(one) == repr(other)
    assert trends_from_plain(None) == {}


def test_the_best_checkpoint_is_that_of_the_chosen_figure() -> None:
    run = Run()
    watch = run.watch(config(f"checkpoint.keep_best={OTHER}"))
    run.evaluate(watch, 1.0)
    assert run.best is None
    run.evaluate(watch, 3.0, math.nan, 2.0, 2.0, 4.0, metric=OTHER)
    assert run.best == BestCheckpoint(OTHER, 40, 2.0)
    run.watch(config()).update_best()
    assert run.best is None  # not asked for any more


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_it_ends_after_so_many_evaluations_without_progress(patience: int) -> None:
    run = Run()
    settings = config(f"train.stop_when={{metric: {OTHER}, patience: {patience}}}")
    watch = run.watch(settings)
    run.evaluate(watch, 3.0, 2.0, metric=OTHER)
    for _ in range(patience):
        assert not watch.is_over() and watch.early_end() == {}
        run.evaluate(watch, 2.5, metric=OTHER)
    assert watch.is_over()
    assert watch.early_end() == {"metric": OTHER, "patience": patience, "best": 2.0, "best_step": 20}
    number = "1 evaluation" if patience == 1 else f"{patience} evaluations"
    why = f"{OTHER} was lowest at step 20 (2.0000), {number} ago"
    assert run.lines[-1] == f"ended early after step {run.step}: {why}"
    again = Run(run.step, trends_from_plain(trends_to_plain(run.watched)))
    assert again.watch(settings).is_over()
    assert again.watch(settings).describe_end(raised="train.steps") == (
        f"{run.step} of 100 steps, ended early: {why}; raise train.stop_when.patience or set train.stop_when=null "
        "to go on"
    )
    for changed in ("train.stop_when=null", f"train.stop_when={{metric: {OTHER}, patience: {patience + 1}}}"):
        assert not again.watch(config(changed)).is_over()
    assert not again.watch(config("train.stop_when={patience: 1}")).is_over()  # another figure begins anew


def test_the_last_step_is_no_early_end() -> None:
    run = Run()
    watch = run.watch(config("train.stop_when={patience: 1}"))
    run.evaluate(watch, *[1.0] * 10)
    assert watch.is_over() and watch.early_end() == {}
    assert (
        watch.describe_end(raised="train.steps")
        == "100 of 100 steps; nothing is left to train; raise train.steps to go on, e.g. train.steps=200"
    )


def test_a_rising_loss_is_noted_once_each_time_it_rises() -> None:
    run = Run()
    watch = run.watch(config())
    run.evaluate(watch, 3.0, 2.0, *(2.0 + 0.1 * number for number in range(1, RISING)))
    assert run.lines == []
    run.evaluate(watch, 2.5, 2.6, 2.7)
    assert [event["step"] for event in run.events] == [50] and run.events[0]["event"] == "held_out_rising"
    assert len(run.lines) == 1 and "lowest at step 20 (2.0000)" in run.lines[0]
    run.evaluate(watch, 1.0, 1.1, 1.2, 1.3)
    assert len(run.lines) == 2


STOP = "train.stop_when={metric: eval/loss, patience: 50}"


@pytest.mark.parametrize(("given", "advice"), [
    ([], ": see checkpoint.keep_best and train.stop_when"),
    ([f"checkpoint.keep_best={LOSS}"], "; checkpoint.keep_best keeps the best one. See train.stop_when"),
    ([f"checkpoint.keep_best={OTHER}"], "; checkpoint.keep_best keeps the best one. See train.stop_when"),
    ([STOP], ": see checkpoint.keep_best"),
    ([f"checkpoint.keep_best={LOSS}", STOP], "; checkpoint.keep_best keeps the best one"),
])  # fmt: skip
def test_a_rising_loss_advises_what_is_not_set(given: list[str], advice: str) -> None:
    run = Run()
    run.evaluate(run.watch(config(*given)), 2.0, *(2.0 + 0.1 * number for number in range(1, RISING + 1)))
    (line,) = run.lines
    assert line.endswith(f"The run may overfit its data{advice}")


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("thresholds", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_what_can_be_watched_is_what_is_measured(joint: bool, thresholds: bool, dense: bool) -> None:
    if dense and (joint or thresholds):
        return
    model: dict[str, Any] = {"kind": "dense"}
    if not dense:
        experts = {"counts": {"text": 1, "image": 1}, "threshold_decay": 0.9 if thresholds else 0.0}
        model = {"kind": "moma", "experts": experts, "auxiliary": {"mode": "joint" if joint else "off"}}
    settings = config("data.validation={web: x}", **model)
    wanted = {
        HeldOut(figure, routing.value, name).key
        for routing in measured_routings(settings.model)
        for name in ("", "web")
        for figure in ("loss", "loss/text", "loss/image")
    }
    assert set(held_out_figures(settings)) == wanted
