"""A routing mode is named where something routes, and nowhere else: terminal, page, charts, figures and model card.

What decides is `model.routes` of the run's configurations.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools.huggingface.card import losses_table
from mmscale.config import Config
from mmscale.config.load import dump, resolve
from mmscale.report import figures, page
from mmscale.report.facts import losses, results
from mmscale.report.history import read
from mmscale.runs.held_out import HeldOut
from mmscale.runs.routes import routes
from mmscale.tables.routings import measured_routings
from mmscale.train.hooks import held_out_line
from mmscale.train.log.metrics_log import MetricsLog
from tests.unit.report.test_lines_apart import FIGURES

COUNTS = {"counts": {"text": 2, "image": 2}}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"ffn_hidden_size": 16},
    "untied": {"untie": ["attention", "ffn", "norms"]},
    "token_choice": {"kind": "moma", "experts": {**COUNTS, "token_choice": {}}},
    "limited_token_choice": {"kind": "moma", "experts": {**COUNTS, "token_choice": {"capacity_factor": 1.0}}},
    "moma": {"kind": "moma", "experts": COUNTS},
    "depth": {"depth": {}},
    "token_choice_depth": {"kind": "moma", "experts": {**COUNTS, "token_choice": {}}, "depth": {}},
    "joint": {"kind": "moma", "experts": COUNTS, "auxiliary": {"mode": "joint"}},
}
SETS = ("", "source/a", "web")
STEPS = (10, 20)
SAYS = ("batch routing", "how experts were chosen")


def config_of(model: str) -> Config:
    sizes = {"kind": "dense", "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 8, "num_attention_heads": 1}
    given = {"model": {**sizes, "seq_length": 8, **MODELS[model]}, "data": {"path": "d"}, "train": {"steps": STEPS[-1]}}
    return resolve(given)


def run_of(folder: Path, model: str) -> Path:
    """A run that has measured every figure of some sets under the routing modes that it would measure."""
    folder.mkdir()
    config = config_of(model)
    (folder / "config.yaml").write_text(dump(config))
    log = MetricsLog(folder, attempt=1)
    modes = [routing.value for routing in measured_routings(config.model)]
    for step in STEPS:
        log.write(step, {"loss": 2.0, "loss/text": 2.0, "loss/image": 2.0, "lr": 1e-3})
        named = itertools.product(FIGURES, modes, SETS)
        log.write(step, {HeldOut(figure, mode, name).key: 1.0 for figure, mode, name in named})
    log.close()
    return folder


def page_of(runs: list[Path], out: Path) -> str:
    """The page: tables, cards, and the labels and notes of all charts, which its PNGs have too."""
    page.write_page(page.read_runs(runs, goodput=lambda *_, **__: (None, {})), out)
    return out.read_text()


@pytest.mark.parametrize("model", MODELS)
def test_a_run(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = config_of(model), run_of(tmp_path / "run", model)
    routed = config.model.routes
    assert read(run).routes is routes(run) is routed
    text = page_of([run], tmp_path / "page.html")
    assert all((words in text) is routed for words in SAYS)
    assert ("routing)" in text) is routed

    history = read(run)
    kinds = ["held out (batch routing)"] if routed else ["held out"]
    assert set(kinds) <= losses(history).keys()
    names = [f"{measure}, {kinds[0]}" for measure in ("loss per token", "best loss", "loss per text token")]
    assert set(names) <= results(history).keys()
    shown: list[str] = []
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, _: shown.extend(figure.axes[0].get_legend_handles_labels()[1])
    )
    figures.loss_curves([run], tmp_path / "x.png")
    assert f"text, {kinds[0]}" in shown
    assert ("batch routing" in losses_table(config, run, STEPS[-1])) is routed


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SETS)
def test_the_line_of_an_evaluation(model: str, name: str) -> None:
    routed = config_of(model).model.routes
    line = held_out_line(HeldOut("loss", name=name), {"loss": 1.5}, routed=routed)
    data = {"": "held-out", "source/a": "source a", "web": "validation web"}[name]
    assert line == (f"{data} (batch routing)  loss 1.5000" if routed else f"{data}  loss 1.5000")


@pytest.mark.parametrize("other", ["dense", "moma"])
def test_a_row_of_several_runs_is_named_once(tmp_path: Path, other: str) -> None:
    """As in `compare`: rows name the routing if one of the runs routes, lines of charts if their own run does."""
    runs = [run_of(tmp_path / "first", "dense"), run_of(tmp_path / "second", other)]
    text = page_of(runs, tmp_path / "page.html")
    routed = other == "moma"
    assert all((words in text) is routed for words in SAYS)
    row = "loss per token, held out (batch routing)" if routed else "loss per token, held out"
    assert f"<th>{row}</th><td>1.0000</td><td>1.0000</td>" in text
    assert "first, held out" in text and "first, held out (" not in text
    assert ("second, held out (batch routing)" in text) is routed
    assert '"label":"first"' in text  # a task's accuracy: the run alone


def test_attempts(tmp_path: Path) -> None:
    """One attempt that routes is enough, and a run without a configuration that can be read may route."""
    run = run_of(tmp_path / "run", "dense")
    (run / "config.1.yaml").write_text(dump(config_of("moma")))
    assert routes(run)
    (run / "config.1.yaml").write_text(dump(config_of("dense")))
    assert not routes(run)
    for file in run.glob("config*.yaml"):
        file.write_text("model: 3\n")
    assert routes(run)
    (run / "config.1.yaml").write_text(dump(config_of("dense")))
    assert not routes(run)
    assert routes(tmp_path / "none")
