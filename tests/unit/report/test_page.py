# The page tells what happened to a run, says what is wrong with its files, and works in a real browser without network.
"""Tests of mmscale.report's page, pictures, timeline and facts."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml

from launch.goodput import goodput
from mmscale.cli import main
from mmscale.config.load import dump, resolve
from mmscale.errors import UsageError
from mmscale.report import comparison_section, page, pictures
from mmscale.report.accuracy_charts import Guessing, guessing_of
from mmscale.report.downsample import Downsampler
from mmscale.report.facts import losses, results
from mmscale.train.log.metrics_log import MetricsLog

VOCABULARY = "vocab:\n  modalities:\n  - {name: text, size: 384}\n  - {name: image, size: %d}\n"


def make_run(folder: Path, *, steps: int = 30, image_size: int = 128, resumed_at: int | None = None) -> Path:
    """A run with everything a report shows; with `resumed_at`, killed at its last step and gone on from there."""
    events: list[dict[str, Any]] = [{"time": 1000.0, "attempt": 1, "event": "start", "step": 0, "world_size": 2}]
    now = 1000.0
    first = 1
    for attempt in (1, 2) if resumed_at is not None else (1,):
        log = MetricsLog(folder, attempt=attempt)
        for step in range(first, steps + 1):
            now += 2.0
            log.write(step, figures(step, now))
            if step % 10 == 0:
                log.write(step, {"eval/loss": 2.5, "eval/loss/text": 1.5, "eval/causal/loss/text": 1.625})
                log.write_layers(step, layers())
                events.append({"time": now, "attempt": attempt, "event": "save_committed", "step": step})
        log.close()
        if attempt == 1 and resumed_at is not None:
            now += 60.0
            events.append({"time": now, "attempt": 2, "event": "resume", "step": resumed_at})
            first = resumed_at + 1
    events.append({"time": now, "attempt": events[-1]["attempt"], "event": "finish", "step": steps})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.yaml").write_text(VOCABULARY % image_size + f"train: {{steps: {steps}}}\n")
    (folder / "environment.json").write_text(json.dumps({"mmscale": "0.1", "hosts": ["n<1>"]}))
    return folder


def with_a_task(run: Path) -> Path:
    """The run with accuracies of a task; other questions, with fewer choices, were asked from the second attempt on."""
    log = MetricsLog(run, attempt=2)
    for step, accuracy in ((10, 0.125), (20, 0.25), (30, 0.5)):
        log.write(step, {"eval/accuracy/which": accuracy, "eval/causal/accuracy/which": 0.375})
    log.close()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] in ("start", "resume"):
            event["guessing"] = {"which": 0.1 if event["event"] == "start" else 0.25}
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def figures(step: int, now: float) -> dict[str, float]:
    return {
        "loss": 3.0 / step,
        "loss/text": 2.0 / step,
        "loss/image": 4.0 / step,
        "z_loss": 40.0,
        "grad_norm": math.inf if step == 2 else 1.0 + step % 3,
        "lr": 1e-4,
        "output_norm": 10.0,
        "time": now,
        "tokens": 1000 * step,
        "flops": 1e12 * step,
        "step_time_s": 2.0,
        "data_wait_s": 0.01,
        "tokens_per_second": 500.0,
        "anomalies": step // 10,
        "anomalies/spike": 0,
        "experts/text/unrouted_fraction": 0.25,
        "depth/selected_fraction/text": 0.5,
    }


def layers() -> dict[str, Any]:
    taken = {"unrouted": 0.25, "load": [0.25, 0.5], "gate": [0.5, 0.75], "coselection": [[1.0, 0.125], [0.0625, 1.0]]}
    some = {"experts": {"text": {"text": taken}}, "output_norm": {"text": 3.0, "image": "inf"}, "depth": {"text": 0.5}}
    return {"1": some, "2": {"output_norm": {"text": 4.0}}}


def written(runs: list[Path], out: Path) -> str:
    page.write_page(page.read_runs(runs, goodput=goodput), out)
    return out.read_text()


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def line_of(text: str, chart: str, key: str, run: int = 0) -> dict[str, Any]:
    charts = {one["name"]: one for one in data_of(text)["charts"]}
    (line,) = [line for line in charts[chart]["lines"] if (line["key"], line["run"]) == (key, run)]
    return line | {"x": data_of(text)["runs"][run]["groups"][line["group"]]}


def test_one_run(tmp_path: Path) -> None:
    text = written([make_run(tmp_path / "a<b")], tmp_path / "report.html")
    assert "a&lt;b" in text and "a<b" not in text
    assert not re.search(r"(src|href)=\"?https?:", text)
    text_loss = line_of(text, "loss", "loss/text")
    assert text_loss["mean"][:2] == [2, 1] and "low" not in text_loss
    assert text_loss["x"]["tokens"][:2] == [1000, 2000] and text_loss["x"]["flops"][1] == 2e12
    assert text_loss["x"]["hours"][1] == pytest.approx(4 / 3600)
    assert line_of(text, "loss", "eval/causal/loss/text")["x"]["step"] == [10, 20, 30]
    assert line_of(text, "other_anomalies", "anomalies")["mean"][9] == 1  # what no other chart shows
    assert "other_anomalies_spike" not in {chart["name"] for chart in data_of(text)["charts"]}  # never changed
    norm = line_of(text, "grad_norm", "grad_norm")
    assert norm["mean"][1] is None and norm["broken"] == [1]
    assert "values that are not finite, marked at the top of their charts: grad_norm (1)" in text
    assert data_of(text)["runs"][0]["layers"][0]["layers"]["1"]["experts"]["text"]["text"]["load"] == [0.25, 0.5]


def test_the_accuracy_of_guessing_is_in_its_chart_and_card(tmp_path: Path) -> None:
    """By step: what was guessed before other questions came holds until they did; runs with the same value share it."""
    run, other = (with_a_task(make_run(tmp_path / name, resumed_at=20)) for name in "ab")
    (found,) = page.read_runs([run], goodput=goodput)
    assert guessing_of(found.events) == {"which": [Guessing(0.1, 0, 20), Guessing(0.25, 20, None)]}
    text = written([run], tmp_path / "one.html")
    assert levels_of(text) == [(0.1, 0, 20, "guessing"), (0.25, 20, None, "guessing")]
    for number, routing in (("50.0%", "batch"), ("37.5%", "causal")):
        what = f"accuracy of which, held out ({routing} routing)"
        assert f"<b>{number}</b><span>{what}, guessing 25.0%</span>" in text
    assert len(levels_of(written([run, other], tmp_path / "both.html"))) == 2
    events = [event | ({"guessing": {"which": 0.5}} if "guessing" in event else {}) for event in found.events]
    (other / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    labels = [level[3] for level in levels_of(written([run, other], tmp_path / "both.html"))]
    assert labels == ["a, guessing", "a, guessing", "b, guessing"]


def levels_of(text: str) -> list[tuple[float, int, int | None, str]]:
    (chart,) = [one for one in data_of(text)["charts"] if one["name"] == "accuracy_which"]
    return [(one["value"], one["first"], one["last"], one["label"]) for one in chart["levels"]]


def test_steps_that_are_repeated_leave_no_guessing() -> None:
    begun = [("start", 0, 0.1), ("resume", 50, 0.2), ("resume", 30, None), ("resume", 40, 0.1), ("resume", 45, 0.1)]
    events = [
        {"event": name, "step": step} | ({"guessing": {"which": value}} if value is not None else {})
        for name, step, value in begun
    ]
    assert guessing_of(events) == {"which": [Guessing(0.1, 0, 30), Guessing(0.1, 40, None)]}
    assert guessing_of([{"event": "start", "step": 0}, {"event": "resume", "step": None, "guessing": 3}]) == {}


def test_several_runs_have_a_colour_each(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=20)]
    text = written(runs, tmp_path / "report.html")
    assert line_of(text, "loss_text", "loss/text", run=1)["colour"] == 1
    assert "<tr><th>train.steps</th><td>30</td><td>20</td></tr>" in text
    assert "different vocabularies" not in text
    assert "<tr><th>last step</th><td>30</td><td>20</td></tr>" in text


def test_runs_of_different_vocabularies(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", image_size=512)]
    text = written(runs, tmp_path / "report.html")
    assert "cannot be compared: a has text 384, image 128; b has text 384, image 512" in text


def test_a_run_that_was_killed_and_went_on(tmp_path: Path) -> None:
    (run,) = page.read_runs([make_run(tmp_path / "run", resumed_at=20)], goodput=goodput)
    spans = [(one.kind, one.attempt, round((one.end - one.begin) * 3600)) for one in run.timeline.spans]
    assert spans == [("steps", 1, 40), ("lost", 1, 20), ("steps", 2, 20)]
    (death,) = [one for one in run.timeline.events if not one.routine]
    assert (death.event, death.attempt, death.step, round(death.hours * 3600)) == ("died", 1, 30, 60)
    assert run.timeline.seconds == {
        "start_up": 0, "steps": 60, "save_stall": 0, "evaluation": 0, "lost": 20, "other": 0, "waiting": 60,
    }  # fmt: skip
    assert run.timeline.goodput == pytest.approx(60 / 80)
    facts = results(run.history, timeline=run.timeline, events=run.events)
    assert (facts["goodput"], facts["attempts"]) == ("75.0%", "2")
    assert losses(run.history)["held out (causal routing)"] == {"loss per text token": "1.6250"}


def test_a_stop_on_request_loses_nothing_and_is_routine(tmp_path: Path) -> None:
    """Saved after step 24, which was not logged: the attempt's line of step 20 is its last one."""
    run = make_run(tmp_path / "run", steps=20)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()][:-1]
    now = events[-1]["time"]
    events += [
        {"time": now + 8, "attempt": 1, "event": "save_begin", "step": 24},
        {"time": now + 10, "attempt": 1, "event": "save_committed", "step": 24},
        {"time": now + 10, "attempt": 1, "event": "stop", "step": 24, "signal": "SIGINT", "save_stall_s": 2.0},
        {"time": now + 15, "attempt": 2, "event": "resume", "step": 24},
        {"time": now + 15, "attempt": 2, "event": "data_verified"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (found,) = page.read_runs([run], goodput=goodput)
    spans = [(one.kind, one.attempt, round((one.end - one.begin) * 3600)) for one in found.timeline.spans]
    assert spans == [("steps", 1, 50)]
    seconds = found.timeline.seconds
    assert (seconds["steps"], seconds["save_stall"], seconds["lost"]) == (48, 2, 0)
    assert all(one.routine for one in found.timeline.events)
    assert "not routine" not in written([run], tmp_path / "report.html")


def test_the_start_of_a_local_process_is_known(tmp_path: Path) -> None:
    """Without a launcher the start event has the time of its process: start-up is drawn, and hours begin there."""
    run = make_run(tmp_path / "run", steps=20)
    lines = (run / "events.jsonl").read_text().splitlines()
    (place,) = [n for n, line in enumerate(lines) if json.loads(line)["event"] == "start"]
    start = json.loads(lines[place])
    lines[place] = json.dumps(start | {"since": start["time"] - 9.0})
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    (found,) = page.read_runs([run], goodput=goodput)
    assert found.timeline.measured_start
    assert found.timeline.seconds["start_up"] == pytest.approx(9.0)
    assert next((one.kind, one.begin) for one in found.timeline.spans) == ("start_up", 0.0)
    assert min(found.axes["hours"]) >= 9.0 / 3600
    assert all("since" not in one.text for one in found.timeline.events)


@pytest.mark.parametrize("steps", [20, 3000])  # more lines are condensed
@pytest.mark.parametrize("ended", [True, False])
def test_the_time_before_the_first_step_is_start_up(ended: bool, steps: int, tmp_path: Path) -> None:
    """The first step began 7 s after the event of the start."""
    run = make_run(tmp_path / "run", steps=steps)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    events[0] |= {"time": 993.0, "since": 990.0}
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events[: None if ended else -1]))
    (found,) = page.read_runs([run], goodput=goodput)
    assert found.timeline.seconds["start_up"] == pytest.approx(10.0)
    assert found.timeline.seconds["steps"] == pytest.approx(2.0 * steps)
    spans = [(one.kind, round((one.end - one.begin) * 3600)) for one in found.timeline.spans]
    assert spans == [("start_up", 10), ("steps", 2 * steps)]


def test_an_attempt_without_a_logged_step_is_drawn_as_start_up(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    times = [(900.0, {"event": "start", "step": 0}), (960.0, {"event": "data_verified"})]
    (run / "events.jsonl").write_text("".join(json.dumps({"time": t, "attempt": 1} | one) + "\n" for t, one in times))
    (run / "metrics.jsonl").write_text("")
    (found,) = page.read_runs([run], goodput=goodput)
    assert (found.timeline.goodput, found.timeline.seconds["start_up"]) == (0.0, 60.0)
    assert [one.kind for one in found.timeline.spans] == ["start_up"]


def test_a_killed_attempt_changes_no_sum(tmp_path: Path) -> None:
    """Many lines are condensed before the arithmetic sees them, and it finds what it finds in all of them."""
    make_run(tmp_path / "run", steps=3000, resumed_at=1777)
    (run,) = page.read_runs([tmp_path / "run"], goodput=goodput)
    assert (run.timeline.seconds["steps"], run.timeline.seconds["lost"]) == pytest.approx((6000, 2 * (3000 - 1777)))


def test_an_empty_run_has_a_page_that_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    assert "metrics.jsonl is empty, so there are no curves" in written([run], tmp_path / "report.html")
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").write_text("{broken: [")
    (run / "environment.json").write_text("{")
    text = written([run], tmp_path / "report.html")
    assert "metrics.jsonl is missing" in text and "not readable" in text
    (run / "metrics.jsonl").write_text('{"step": 1, "attempt": 1, "loss": "nan"}\n{"step": 2, "los')
    text = written([run], tmp_path / "report.html")
    assert "1 line of metrics.jsonl could not be read" in text and "not finite" in text


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no metrics.jsonl, events.jsonl or config.yaml, so it is no run folder"):
        page.read_runs([tmp_path], goodput=goodput)


def test_pictures(tmp_path: Path) -> None:
    found = page.read_runs([make_run(tmp_path / "run", resumed_at=20)], goodput=goodput)
    files = pictures.write_pictures(found, tmp_path / "r.html")
    names = [
        "loss",
        "optimization",
        "throughput",
        "routing",
        "other_figures",
        "experts",
        "coselection",
        "layers",
        "timeline",
    ]
    assert [file.name for file in files] == [f"r_{name}.png" for name in names]
    for file in files:
        with PIL.Image.open(file) as image:
            assert len(image.convert("L").getcolors() or range(256)) > 20  # something is drawn


def test_many_tokens_without_an_expert_are_noted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    noted = "run: at the last logged step, experts take no part in 52% of the tokens of image"
    text = written([run], tmp_path / "report.html")
    assert results(page.read_runs([run], goodput=goodput)[0].history)["tokens of text that no expert took"] == "25.0%"
    assert noted not in text
    log = MetricsLog(run, attempt=1)
    log.write(31, {"loss": 1.0, "experts/image/unrouted_fraction": 0.52})
    log.close()
    assert noted in written([run], tmp_path / "report.html")


def test_records_of_layers_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    (run / "layers.jsonl").write_text('{"step": 1, "attempt": 1, "layers": {"1": {}}}\n')
    found = page.read_runs([run], goodput=goodput)
    assert len(found[0].layers) == 1
    monkeypatch.setattr(pictures, "save_figure", lambda figure, file: None)
    names = [file.name for file in pictures.write_pictures(found, tmp_path / "r.html")]
    assert "r_loss.png" in names and not any("layers" in name for name in names)


def test_a_report_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense run beside a sparse one: both are compared too, and every figure is drawn on the page and as a PNG."""
    runs = [make_run(tmp_path / "dense"), make_run(tmp_path / "sparse")]
    for run, kind in zip(runs, ("dense", "moma"), strict=True):
        sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 64}
        experts = {"experts": {"counts": {"text": 2, "image": 2}}} if kind == "moma" else {}
        rest = {"data": {"path": "data/none"}, "optim": {"schedule": "constant"}}
        settings = {"model": {"kind": kind} | sizes | experts} | rest
        (run / "config.yaml").write_text(dump(resolve(yaml.safe_load(VOCABULARY % 128) | settings)))
    opened: Counter[str] = Counter()
    shortened: list[int] = []

    def counted_open(path: Path, *arguments: Any, **options: Any) -> Any:
        opened[f"{path.parent.name}/{path.name}"] += 1
        return plain_open(path, *arguments, **options)

    def counted_curve(sampler: Downsampler, column: Any, **options: Any) -> Any:
        shortened.append(id(column))
        return plain_curve(sampler, column, **options)

    plain_open, plain_curve = Path.open, Downsampler.curve
    monkeypatch.setattr(Path, "open", counted_open)
    monkeypatch.setattr(Downsampler, "curve", counted_curve)
    monkeypatch.setattr(pictures, "save_figure", lambda figure, file: None)
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "data:image/png;base64," in text  # the comparison is there
    lines = sum(len(chart["lines"]) for chart in data_of(text)["charts"])
    assert len(shortened) == len(set(shortened)) == lines
    for run in ("dense", "sparse"):
        assert opened[f"{run}/metrics.jsonl"] == opened[f"{run}/events.jsonl"] == 1
        # As it was written, for the page, and as a configuration with its rules, for FLOPs.
        assert opened[f"{run}/config.yaml"] <= 2


def test_equal_loss_section(tmp_path: Path) -> None:
    """Runs that cannot be compared say why; the page is there all the same."""
    runs = [make_run(tmp_path / "dense"), make_run(tmp_path / "sparse")]
    for run, kind in zip(runs, ("dense", "moma"), strict=True):
        with (run / "config.yaml").open("a") as file:
            file.write(f"model: {{kind: {kind}}}\n")
    found = page.read_runs(runs, goodput=goodput)
    section = comparison_section.comparison_section(runs[0], found)
    assert comparison_section.baseline_of(found) == runs[0]
    assert comparison_section.baseline_of(found[:1]) is None
    page.write_page(found, tmp_path / "r.html", sections={"Equal loss": section})
    text = (tmp_path / "r.html").read_text()
    assert '<h2 id="equal-loss">Equal loss</h2>' in text and "config.yaml" in section and "<table>" not in section
