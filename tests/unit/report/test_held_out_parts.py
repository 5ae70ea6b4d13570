"""Numbers of a part of a held-out set say so: page, figures, comparison and model card, of one run and of several."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints_tools.huggingface.card import losses_table
from mmscale.report import figures, page
from mmscale.report.compare import compare
from mmscale.report.compare_view import render
from mmscale.report.facts import losses, results
from mmscale.report.held_out_parts import HeldOutParts
from mmscale.report.history import read
from mmscale.runs.events import EventLog, read_events
from mmscale.runs.extents import Extent, as_field, extents_in
from mmscale.train.log.metrics_log import MetricsLog
from tests.unit.report.test_stage_losses import STEPS, Way, add_stage, config_of, run_of

PART = Extent(2, 24)
WHOLE = Extent(7, 7)


def run_with(folder: Path, extent: Extent | None, *, width: int = 8) -> Path:
    """A run whose first attempt read so much of its held-out documents; None: an older version."""
    run = run_of(folder, Way())
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("ffn_hidden_size: 8", f"ffn_hidden_size: {width}"))
    EventLog(run, 1).add("start", step=0, **({} if extent is None else as_field({"": extent})))
    return run


def page_of(runs: list[Path], out: Path) -> tuple[str, dict[str, str]]:
    """The page, and the notes of its charts by name."""
    found = page.read_runs(runs, goodput=lambda *_, **__: (None, {}))
    drawn = page.curves(found)
    page.write_page(found, out, drawn=drawn)
    return out.read_text(), {chart.name: chart.note for chart in drawn.charts}


@pytest.mark.parametrize("extent", [PART, WHOLE, None], ids=["part", "whole", "unknown"])
def test_one_run(tmp_path: Path, extent: Extent | None) -> None:
    run = run_with(tmp_path / "run", extent)
    text, notes = page_of([run], tmp_path / "page.html")
    said = "first 2 of 24 batches"
    if extent != PART:
        assert said not in text and "all 7 batches" not in text
        return
    parts = HeldOutParts.of_run(run, read_events(run))
    assert f"held out (batch routing), {said}" in losses(read(run), parts=parts)
    assert f"<th>held out (batch routing), {said}</th>" in text  # the table
    assert f"<span>best loss, held out (batch routing), at step 40, {said}</span>" in text  # the box
    assert notes["loss"].endswith(f"Held-out values are of the {said}.")  # the chart's subtitle, here and in its PNG
    assert "Held-out" not in notes["lr"]


def test_runs_that_read_different_parts_are_all_named(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / "base", WHOLE, width=16), run_with(tmp_path / "moma", PART)]
    text, notes = page_of(runs, tmp_path / "page.html")
    assert "<td>2.0250, all 7 batches</td><td>2.0250, first 2 of 24 batches</td>" in text
    assert notes["loss"].endswith("Held-out values: base, all 7 batches; moma, first 2 of 24 batches.")
    found = compare(runs[0], runs[1:])
    assert "base: held-out losses are of all 7 batches" in found.notes
    assert "moma: held-out losses are of the first 2 of 24 batches" in render(found)
    whole = [runs[0], run_with(tmp_path / "other", WHOLE)]
    assert "batches" not in page_of(whole, tmp_path / "whole.html")[1]["loss"].replace("Training batches", "")
    assert not any("all 7" in note for note in compare(whole[0], whole[1:]).notes)


@pytest.mark.parametrize("extents", [(PART,), (WHOLE,), (PART, WHOLE)], ids=["part", "whole", "both"])
def test_the_legend_of_the_figure_of_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extents: tuple[Extent, ...]
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, _: drawn.extend(figure.axes[0].get_legend_handles_labels()[1])
    )
    figures.loss_curves([run_with(tmp_path / str(n), one) for n, one in enumerate(extents)], tmp_path / "x.png")
    shown = [label.partition("(batch routing)")[2] for label in drawn if "held out" in label]
    assert shown == [f", {one.words}" if PART in extents else "" for one in extents]


def test_a_value_has_the_part_of_the_attempt_that_measured_it(tmp_path: Path) -> None:
    """The newest attempt reads all, but has not evaluated yet; the stage's numbers are of its own evaluation."""
    run = run_with(tmp_path / "run", PART)
    EventLog(run, 2).add("resume", step=STEPS, **as_field({"": WHOLE}))
    add_stage(run, main_step=STEPS)
    EventLog(run / "auxiliary", 1).add("start", step=0, **as_field({"": Extent(3, 9)}))
    found = results(read(run), parts=HeldOutParts.of_run(run, read_events(run)))
    assert found["loss per token, held out (batch routing)"] == "2.0250, first 2 of 24 batches"
    stage = found["loss per token, held out (causal routing, auxiliary stage)"]
    assert stage == "1.7500, first 3 of 9 batches"
    rows = [line.strip("| ").split(" | ") for line in losses_table(config_of(Way()), run, STEPS).splitlines()]
    data = {(row[0], row[1]) for row in rows if row[0].startswith("loss per token")}
    assert data == {
        ("loss per token, batch routing", "held-out split, first 2 of 24 batches"),
        ("loss per token, causal routing", "held-out split, first 3 of 9 batches"),
        ("loss per token, causal routing", "validation web"),
    }


def test_a_curve_has_the_parts_of_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the subtitle of the chart, and in the legend of the figure of losses."""
    run = run_with(tmp_path / "run", PART)
    log = MetricsLog(run, attempt=2)
    log.write(STEPS + 10, {"loss": 2.0, "loss/text": 2.0, "loss/image": 2.0})
    log.write(STEPS + 10, {f"eval/{key}": 2.0 for key in ("loss", "loss/text", "loss/image")})
    log.close()
    EventLog(run, 2).add("resume", step=STEPS, **as_field({"": Extent(2, 7)}))
    said = f"first 2 of 24 batches up to step {STEPS}, then {{}}first 2 of 7 batches"
    notes = page_of([run], tmp_path / "page.html")[1]
    assert notes["loss"].endswith(f"Held-out values are of the {said.format('the ')}.")
    drawn: list[str] = []
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, _: drawn.extend(figure.axes[0].get_legend_handles_labels()[1])
    )
    figures.loss_curves([run], tmp_path / "x.png")
    assert [label for label in drawn if label.endswith(f"(batch routing), {said.format('')}")]


@pytest.mark.parametrize(
    "content", [None, 3, [], {"": 3}, {"": {"batches": 1}}, {"": {"batches": "x", "available": 2}}]
)
def test_other_content_of_the_field_is_ignored(content: object) -> None:
    assert not any(extents_in([{"event": "start", "attempt": 1, "extents": content}]).values())


def test_the_event_gives_back_what_was_written() -> None:
    kept = {"": PART, "web": WHOLE}
    assert extents_in([{"event": "start", "attempt": 1, **as_field(kept)}]) == {1: kept}
    assert as_field({}) == {}
