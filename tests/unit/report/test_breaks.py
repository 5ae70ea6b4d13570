"""Curves do not join losses of other data, batches or sequences; the place is marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.goodput import goodput
from mmscale.config.changes import changes
from mmscale.config.load import resolve
from mmscale.data.prepared.tasks import replaced
from mmscale.report import figures, page, pictures
from mmscale.report.breaks import Cut, cuts_of
from mmscale.report.downsample import Downsampler
from mmscale.runs.breaks import Break, break_of
from mmscale.runs.events import read_events
from mmscale.runs.extents import Extent, as_field, extents_before, other_parts
from mmscale.train.log.metrics_log import MetricsLog
from tests.unit.report.test_page import data_of

ACCURACIES = {"eval/accuracy/which", "eval/causal/accuracy/which"}
MODEL = {"kind": "dense", "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
# What a user changes, and whether losses of training and of held-out data are broken by it.
CHANGED: dict[str, tuple[bool, bool]] = {
    "data.path=other": (True, True),
    "data.validation={web: x}": (False, False),
    "data.document_multiple=4": (True, True),
    "train.global_batch_size=16": (True, True),
    "train.micro_batch_size=2": (True, True),
    "train.eval_batches=3": (False, True),
    "model.seq_length=64": (True, True),
    "train.modality_weights={text: 2}": (True, False),
    "train.z_loss=0": (True, False),
    "optim.lr=1e-3": (False, False),
    "train.steps=7": (False, False),
    "train.eval_every=7": (False, False),
    "parallel.tp=1": (False, False),
    "checkpoint.keep_best=eval/loss": (False, False),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_change_of_settings_breaks_what_it_should(change: str) -> None:
    """The lines are those that a resume prints."""
    base = {"model": MODEL | {"seq_length": 32}, "data": {"path": "d"}}
    before, after = resolve(base, ["train.eval_every=5"]), resolve(base, ["train.eval_every=5", change])
    found = break_of([str(one) for one in changes(before.model_dump(mode="json"), after)])
    assert (found.breaks("loss/text"), found.breaks("eval/loss")) == CHANGED[change]


@pytest.mark.parametrize("spans", [("whole", "none"), ("partial", "whole")])
@pytest.mark.parametrize("before", [0.0, 0.5])
@pytest.mark.parametrize("after", [0.0, 0.5])
def test_spans_of_documents_that_are_not_masked(before: float, after: float, spans: tuple[str, str]) -> None:
    """They have no effect while nothing is masked, which the line says."""
    base = {"model": MODEL | {"seq_length": 32}, "data": {"path": "d"}, "vocab": {"reserved": True}}
    rates = [f"objective.cm3_rate={rate}" for rate in (before, after)]
    old, new = (resolve(base, [rate, f"objective.image_spans={one}"]) for rate, one in zip(rates, spans, strict=True))
    lines = [str(one) for one in changes(old.model_dump(mode="json"), new)]
    assert any("image_spans" in line for line in lines)
    assert any(line.endswith("without effect while objective.cm3_rate is 0") for line in lines) == (after == 0)
    found = break_of(lines)
    assert found.breaks("loss/text") == bool(before or after) and not found.breaks("eval/loss")


def _lines(events: list[dict[str, Any]]) -> str:
    """The content of events.jsonl."""
    return "".join(json.dumps({"time": 0.0, **event}) + "\n" for event in events)


# How much of each set two attempts read, and the sets of which they read other batches.
PARTS: dict[str, tuple[dict[str, Extent], dict[str, Extent], set[str]]] = {
    "all whole": ({"": Extent(3, 3), "web": Extent(2, 2)}, {"": Extent(3, 3), "web": Extent(2, 2)}, set()),
    "one in part": ({"": Extent(3, 9), "web": Extent(2, 2)}, {"": Extent(5, 9), "web": Extent(2, 2)}, {""}),
    "from a part to the whole": (
        {"": Extent(3, 3), "web": Extent(1, 2)},
        {"": Extent(3, 3), "web": Extent(2, 2)},
        {"web"},
    ),
    "a new set": ({"": Extent(3, 3)}, {"": Extent(3, 3), "web": Extent(1, 2)}, set()),
    "unknown": ({}, {"": Extent(3, 3), "web": Extent(1, 2)}, {"", "web"}),
}


@pytest.mark.parametrize("between", [False, True], ids=["next", "after an attempt that was rolled back"])
@pytest.mark.parametrize("parts", PARTS)
def test_another_number_of_batches_breaks_sets_of_which_others_are_read(
    parts: str, between: bool, tmp_path: Path
) -> None:
    """Not sets that are read whole before and after, and not accuracies: all questions are asked."""
    before, now, broken = PARTS[parts]
    resume: dict[str, Any] = {"event": "resume", "attempt": 3, "step": 20, "changed": ["train.eval_batches: 3 -> 5"]}
    events: list[dict[str, Any]] = [{"event": "start", "attempt": 1, "step": 0, **as_field(before)}]
    if between:  # its steps are done again
        events.append(
            {"event": "resume", "attempt": 2, "step": 30, **as_field({"": Extent(1, 9), "web": Extent(1, 2)})}
        )
    events.append(resume | as_field(now))
    cuts = cuts_of(tmp_path, events)
    keys = {"": "eval/causal/loss/text", "web": "eval/validation/web/loss"}
    assert {name for name, key in keys.items() if any(cut.breaks(key) for cut in cuts)} == broken
    assert len(cuts) == bool(broken) and not any(cut.breaks("eval/accuracy/which") for cut in cuts)
    (tmp_path / "events.jsonl").write_text(_lines(events[:-1]))
    known = other_parts(extents_before(read_events(tmp_path), 20), now)
    assert (set(now) if known is None else known) == broken  # what the trainer finds


@pytest.mark.parametrize(("line", "training", "held_out"), [
    ("data: d holds other documents", True, True),
    ("data: d is left out", True, True),
    ("data: d is new", True, True),
    ("data: share of d: 0.5 -> 0.9", True, False),
    ("data: d -> e, the same documents", False, False),
    ("data: another order, now e, d", False, False),
    ("objective.cm3_rate: 0.5 -> 0.0", True, False),
    ("data.validation.web holds other documents: its losses do not go on from earlier ones", False, False),
])  # fmt: skip
def test_a_change_of_documents_breaks_what_it_should(line: str, training: bool, held_out: bool) -> None:
    found = break_of([line])
    assert (found.breaks("loss/text"), found.breaks("eval/causal/loss")) == (training, held_out)
    assert found.breaks("eval/source/d/loss") == held_out
    assert break_of([]) == Break()


# Changes, and which of KEYS are broken.
KEYS = ("eval/loss", "eval/validation/web/loss/text", "eval/validation/books/causal/accuracy/which")
OF_SETS: dict[str, tuple[bool, bool, bool]] = {
    'data.validation.web: (none) -> "x"': (False, True, False),
    "data.validation.web holds other documents: its losses are not comparable with earlier ones": (False, True, False),
    'data.validation: {"web": "x"} -> {}': (False, True, True),
    "data: d is new": (True, False, False),
    "train.eval_batches: 2 -> 3": (True, True, False),
    "task which has other questions": (False, False, True),
}


@pytest.mark.parametrize("line", OF_SETS)
def test_a_change_of_one_held_out_set_breaks_its_own_figures(line: str) -> None:
    assert tuple(break_of([line]).breaks(key) for key in KEYS) == OF_SETS[line]
    everything = break_of([line, "model.seq_length: 1 -> 2"])
    assert all(everything.breaks(key) for key in KEYS)


def make_run(folder: Path, *, changed: list[str], resumed: int = 20, steps: int = 40) -> Path:
    events: list[dict[str, Any]] = [{"time": 0.0, "attempt": 1, "event": "start", "step": 0}]
    for attempt, first, last in ((1, 1, resumed), (2, resumed + 1, steps)):
        log = MetricsLog(folder, attempt=attempt)
        for step in range(first, last + 1):
            log.write(step, {"loss": 1.0 / step, "loss/text": 1.0 / step, "lr": 1.0, "time": float(step)})
            if step % 5 == 0:
                accuracies = {"eval/accuracy/which": 0.5, "eval/causal/accuracy/which": 0.5}
                log.write(step, {"eval/loss": 2.0, "eval/loss/text": 2.0 + attempt} | accuracies)
        log.close()
        events.append({"time": float(last), "attempt": attempt, "event": "stop", "step": last})
    events[2:2] = [{"time": resumed + 0.5, "attempt": 2, "event": "resume", "step": resumed, "changed": changed}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.yaml").write_text("train: {steps: 40}\n")
    return folder


@pytest.mark.parametrize(("line", "broken"), [
    ("data.blend: x -> y", {"loss/text", "eval/loss/text", *ACCURACIES}),
    ("train.eval_batches: 2 -> 3", {"eval/loss/text"}),
    (*replaced([{"name": "which", "identity": "a"}], [{"name": "which", "identity": "b"}]), ACCURACIES),
    ("data: share of d: 0.5 -> 0.9", {"loss/text"}),
    ("optim.lr: 1 -> 2", set()),
    ("learning rate: 1e-05 -> 0.001 at step 21 (x 100)", {"lr"}),
])  # fmt: skip
def test_the_page_breaks_these_curves_and_no_other(tmp_path: Path, line: str, broken: set[str]) -> None:
    runs = page.read_runs([make_run(tmp_path / "run", changed=[line])], goodput=goodput)
    assert [cut.step for cut in runs[0].cuts] == ([20] if broken else [])
    drawn = page.curves(runs)
    gaps = {key: curve.gaps.tolist() for (_, key), curve in drawn.found.items()}
    assert {key for key, places in gaps.items() if places} - {"loss", "eval/loss"} == broken
    if "loss/text" in broken:
        assert gaps["loss/text"] == [20]  # the row of step 21
    if "eval/loss/text" in broken:
        assert gaps["eval/loss/text"] == [4]
    page.write_page(runs, tmp_path / "report.html", drawn=drawn)
    lines = [line for chart in data_of((tmp_path / "report.html").read_text())["charts"] for line in chart["lines"]]
    assert {line["key"] for line in lines if line["cuts"] == [0]} - {"loss", "eval/loss"} == broken
    assert ('"gaps":[20]' in (tmp_path / "report.html").read_text()) is bool({"loss/text", "lr"} & broken)
    assert pictures.write_pictures(runs, tmp_path / "report.html", drawn=drawn)
    figures.loss_curves([tmp_path / "run"], tmp_path / "curves.png")


@pytest.mark.parametrize("number", [1, 2])
def test_labels_of_several_runs_name_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """On the page, in its PNGs, and in the figure of losses."""
    folders = [make_run(tmp_path / name, changed=["data.path: x -> y"]) for name in ("first", "second")[:number]]
    wanted = ["changed: data"] if number == 1 else ["first changed: data", "second changed: data"]
    runs = page.read_runs(folders, goodput=goodput)
    assert [cut.text for run in runs for cut in run.cuts] == wanted
    labels: list[str] = []
    for module in (figures, pictures):
        monkeypatch.setattr(module, "mark_cuts", lambda _, cuts: labels.extend(text for _, text in cuts))
    figures.loss_curves(folders, tmp_path / "curves.png")
    assert labels == wanted
    labels.clear()
    pictures.write_pictures(runs, tmp_path / "report.html")
    assert set(labels) == set(wanted)


@pytest.mark.parametrize("again", ["", "interrupted twice", "made by an attempt without changes"])
@pytest.mark.parametrize(("line", "training", "held_out"), [
    ("data.path: x -> y", True, True),
    ('data.validation.web: "a" -> "b"', False, True),
    ("train.modality_weights: {} -> {text: 2}", True, False),
    ("learning rate: 1e-05 -> 0.001 at step 21 (x 100)", False, False),
])  # fmt: skip
def test_an_evaluation_that_was_postponed_is_of_the_attempt_that_made_it(
    line: str, training: bool, held_out: bool, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop request interrupted the evaluation of step 20, and the next attempt made it with other settings."""
    short = {"event": "evaluation_cut_short", "attempt": 1, "step": 20}
    events: list[dict[str, Any]] = [{"event": "start", "attempt": 1, "step": 0}, short]
    if again:
        events.append({"event": "resume", "attempt": 2, "step": 20, "changed": []})
        events += [short | {"attempt": 2}] if again == "interrupted twice" else []
    last = 3 if again else 2
    events.append({"event": "resume", "attempt": last, "step": 20, "changed": [line]})
    log = MetricsLog(tmp_path, attempt=1)
    key = "eval/validation/web/loss"
    for step in range(1, 31):
        if step == 21:
            log.close()
            log = MetricsLog(tmp_path, attempt=last)
            log.write(20, {key: 1.0})  # postponed
        log.write(step, {"loss": 1.0, "lr": 1.0})
        if step % 5 == 0 and step != 20:
            log.write(step, {key: 1.0})
    log.close()
    (tmp_path / "events.jsonl").write_text(_lines(events))
    (run,) = page.read_runs([tmp_path], goodput=goodput)
    drawn = page.curves([run])
    gaps = {name: drawn.found[0, name].gaps.tolist() for name in ("loss", "lr", key) if (0, name) in drawn.found}
    own = key if "validation" in line or not held_out else None
    before = 4 if again.startswith("made") else 3  # of the values at 5, 10, 15, 20, 25 and 30
    if own is not None:
        assert gaps[key] == ([before] if held_out else [])
    assert gaps["loss"] == ([20] if training else []) and gaps["lr"] == ([20] if line.startswith("learning") else [])
    assert max((cut.step for cut in run.cuts if cut.breaks("eval/loss")), default=0) == (
        0 if "validation" in line or not held_out else 20 if before == 4 else 19
    )
    marked: list[tuple[float, str]] = []
    plain = pictures.mark_cuts
    monkeypatch.setattr(pictures, "mark_cuts", lambda axes, cuts: (marked.extend(cuts), plain(axes, cuts)))
    pictures.write_pictures([run], tmp_path / "r.html", drawn=drawn)
    assert {step for step, _ in marked} <= {19, 20}


def test_steps_that_are_done_again_leave_no_break(tmp_path: Path) -> None:
    """The run went back before the change, and is trained with the old settings from there on."""

    def resume(step: int, *lines: str) -> dict[str, Any]:
        return {"event": "resume", "step": step, "changed": list(lines)}

    events = [resume(30, "data.path: a -> b"), resume(10, "train.global_batch_size: 8 -> 4")]
    assert cuts_of(tmp_path, events) == [Cut(10, "changed: batch", Break(("batch",), training=True, held_out=True))]
    assert cuts_of(tmp_path, [resume(0, "data.path: a -> b")]) == []


def test_runs_of_earlier_versions_have_their_changes_in_their_configurations(tmp_path: Path) -> None:
    for attempt, path in ((1, "a"), (2, "b")):
        (tmp_path / f"config.{attempt}.yaml").write_text(f"data: {{path: {path}}}\n")
    (cut,) = cuts_of(tmp_path, [{"event": "resume", "step": 8, "attempt": 2}])
    assert (cut.step, cut.text) == (8, "changed: data")


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 50), st.lists(st.integers(0, 420), max_size=4))
def test_no_point_of_a_curve_is_of_both_sides(rows: int, points: int, breaks: list[int]) -> None:
    steps = np.arange(1.0, rows + 1)
    curve = Downsampler({"step": steps}, points=points).curve(steps, breaks=tuple(sorted(breaks)))
    assert curve is not None
    for after in breaks:
        assert not ((curve.low <= after) & (curve.high > after)).any()
    inside = sorted({after for after in breaks if 0 < after < rows})
    assert len(curve.gaps) == len(inside) and len(curve.pieces()) == len(inside) + 1
    assert [curve.low[place] for place in curve.gaps] == [after + 1 for after in inside]
    assert sum(piece.stop - piece.start for piece in curve.pieces()) == len(curve.mean)
    assert np.isnan(curve.with_gaps(curve.mean)).sum() == len(inside)
