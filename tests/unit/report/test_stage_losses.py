"""Causal numbers stand beside the others, whichever way a run came to its causal routers: page, comparison and card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools.huggingface.card import losses_table
from mmscale.checkpoint.layout import Store
from mmscale.config import Config
from mmscale.config.load import dump, resolve
from mmscale.report.charts import charts_of
from mmscale.report.compare import compare
from mmscale.report.facts import losses, notes, results
from mmscale.report.history import read
from mmscale.runs.held_out import AUXILIARY, HeldOut
from mmscale.train.log.metrics_log import MetricsLog
from mmscale.train.stages.origin import main_origin
from mmscale.train.stages.stage_report import report_of

STEPS = 40
STAGE = {"batch": 1.5, "causal": 1.75}


@dataclass(frozen=True)
class Way:
    """How a run came to causal numbers: routings measured while it trained, and whether its stage has ended."""

    along: tuple[str, ...] = ()
    stage: bool = False
    depth: bool = False

    def __str__(self) -> str:
        return "+".join([*self.along, *(["stage"] if self.stage else []), *(["depth"] if self.depth else [])]) or "none"


WAYS = [
    Way(along, stage, depth)
    for along in ((), ("causal",), ("threshold",), ("causal", "threshold"))
    for stage in (False, True)
    for depth in (False, True)
]


def config_of(way: Way) -> Config:
    model: dict[str, Any] = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
    experts = {"counts": {"text": 2, "image": 2}, "threshold_decay": 0.9 if "threshold" in way.along else 0.0}
    model |= {"seq_length": 8, "experts": experts}
    model |= {"depth": {}} if way.depth else {}
    model |= {"auxiliary": {"mode": "joint"}} if "causal" in way.along else {}
    return resolve({"model": model, "data": {"path": "d"}, "train": {"steps": STEPS}})


def run_of(folder: Path, way: Way, *, base: float = 2.0) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config_of(way)))
    log = MetricsLog(folder, attempt=1)
    for step in range(1, STEPS + 1):
        log.write(
            step, {"loss": base + 1 / step, "loss/text": base + 1 / step, "step_time_s": 1.0, "tokens": 8.0 * step}
        )
        if step % 10 == 0:
            for routing in ("batch", *way.along):
                worse = 0.0 if routing == "batch" else 0.5
                values = {"loss": base + worse + 1 / step, "loss/text": base + worse + 1 / step}
                log.write(step, {HeldOut(figure, routing).key: value for figure, value in values.items()})
    log.close()
    if way.stage:
        add_stage(folder, main_step=STEPS)
    return folder


def add_stage(folder: Path, *, main_step: int, **more: Any) -> None:
    (folder / "auxiliary").mkdir(exist_ok=True)
    sets = {routing: {"loss": value, "loss/text": value, "z_loss": 9.0} for routing, value in STAGE.items()}
    content = {"main_step": main_step, "step": 5, "routers": [], "held_out": sets, "validation": {"web": sets}, **more}
    (folder / "auxiliary" / "report.json").write_text(json.dumps(content))


def test_losses_on_other_data_stand_beside_no_others(tmp_path: Path) -> None:
    """A stage that was started with --yes on another data set: its numbers are said to be left out, not mixed in."""
    run = run_of(tmp_path / "run", Way())
    add_stage(run, main_step=STEPS, other_data=["data/other"])
    assert not any("causal" in name for name in losses(read(run)))
    said = notes({"run": run}, {"run": read(run)}, {"run": {}})
    assert any("measured on other data (data/other) and are not shown here" in note for note in said)
    table = losses_table(config_of(Way()), run, STEPS)
    assert "causal routing |" not in table and "measured on other data (data/other)" in table
    add_stage(run, main_step=STEPS, other_data=[])
    assert any("causal" in name for name in losses(read(run)))
    assert "other data" not in losses_table(config_of(Way()), run, STEPS)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_has_its_rows(tmp_path: Path, way: Way) -> None:
    run = run_of(tmp_path / "run", way)
    wanted = {f"held out ({routing} routing)" for routing in ("batch", *way.along)}
    wanted |= {"held out (causal routing, auxiliary stage)"} if way.stage else set()
    history = read(run)
    assert wanted == {kind for kind in losses(history) if kind.startswith("held out")}
    assert all(any(kind in name for name in results(history)) for kind in wanted)
    (chart,) = [chart for chart in charts_of({"run": history}) if chart.name == "loss"]
    assert wanted == {line.label.partition(", ")[2] for line in chart.lines if line.points}

    table = losses_table(config_of(way), run, STEPS)
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| loss")]
    rows = {(measured, data): value for measured, data, value, _ in cells}
    routings = {measured.partition(", ")[2].removesuffix(" routing") for measured, _ in rows}
    assert routings == {"batch", *way.along, *(["causal"] if way.stage else [])}
    if way.stage:  # the stage's routers are exported, also where a joint run has some of its own
        causal = "loss per token, causal routing"
        assert rows[causal, "held-out split"] == rows[causal, "validation web"] == "1.7500"
    assert rows["loss per token, batch routing", "held-out split"] == "2.0250"

    base = run_of(tmp_path / "base", Way(along=way.along), base=1.9)
    config = base / "config.yaml"
    config.write_text(config.read_text().replace("ffn_hidden_size: 8", "ffn_hidden_size: 16"))
    said = [note for note in compare(base, [run]).notes if "after the auxiliary stage" in note]
    note = f"held-out loss 1.7500 under causal routing after the auxiliary stage of step {STEPS} ({run})"
    assert said == ([f"run: {note}: one measurement, so there is no ratio"] if way.stage else [])


def test_a_run_that_trained_on_says_of_which_step_the_stage_is(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", Way())
    add_stage(run, main_step=33)  # not a step that was evaluated
    history = read(run)
    assert losses(history)["held out (causal routing, auxiliary stage), step 33"]["loss per token"] == "1.7500"
    assert len(history) == STEPS and history.attempt == 1
    assert "causal" not in losses_table(config_of(Way()), run, STEPS).split("\n\n")[0]
    row = "| loss per token, causal routing | held-out split | 1.7500 | 33 |"
    assert row in losses_table(config_of(Way()), run, 33)


def test_a_stage_of_another_checkpoint_counts_for_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", Way())
    folder = Store.of_run(run).path(STEPS)
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text("one")
    add_stage(run, **main_origin(Store.of_run(run), STEPS))
    assert report_of(run) is not None
    (folder / "MANIFEST.json").write_text("another training reached the same step")
    assert report_of(run) is None
    assert not any("stage" in kind for kind in losses(read(run)))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"main_step": "x"}', '{"main_step": 1, "held_out": [1]}'])
def test_a_damaged_report_is_none(tmp_path: Path, content: str) -> None:
    run = run_of(tmp_path / "run", Way())
    (run / "auxiliary").mkdir()
    (run / "auxiliary" / "report.json").write_text(content)
    assert report_of(run) is None and len(read(run)) == STEPS


def test_the_stages_own_page_has_both_routings(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", Way(stage=True))
    log = MetricsLog(run / "auxiliary", attempt=1)
    log.write(5, {"loss": 0.5})
    log.close()
    assert {"held out (batch routing)", "held out (causal routing)"} <= losses(read(run / "auxiliary")).keys()


def test_keys_of_a_stage_say_what_they_are_about() -> None:
    for name in ("", "web", AUXILIARY):
        measured = HeldOut("loss/text", "causal", name, AUXILIARY)
        assert HeldOut.of(measured.key) == measured
        assert HeldOut.of(HeldOut("loss", name=name).key) == HeldOut("loss", name=name)
