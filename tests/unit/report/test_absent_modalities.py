"""Expert load of a step whose micro-batches lack a modality says so, on the page and in its PNG."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from launch.goodput import goodput
from mmscale.report import page, pictures
from mmscale.train.log.metrics_log import MetricsLog
from tests.unit.report.test_page import layers, written
from tests.unit.report.test_page_in_a_browser import chromium, opened

__all__ = ["chromium"]
SAID = "The micro-batches of step 20 have no tokens of audio."


def run_of(folder: Path, *, last: bool) -> Path:
    """Audio is in the first record of layers, and in the last one if `last`."""
    log = MetricsLog(folder, attempt=1)
    for step in (10, 20):
        record = layers()
        if step == 10 or last:
            record["1"]["experts"]["audio"] = {"audio": record["1"]["experts"]["text"]["text"]}
        log.write(step, {"loss": 1.0, "loss/text": 1.0, "loss/audio": 1.0})
        log.write_layers(step, record)
    log.close()
    return folder


@pytest.mark.parametrize("last", [False, True])
def test_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(pictures, "save_figure", lambda figure, file: drawn.update({file.name: figure}))
    pictures.write_pictures(page.read_runs([run_of(tmp_path / "run", last=last)], goodput=goodput), tmp_path / "r.html")
    assert drawn["r_experts.png"].get_supxlabel() == ("" if last else SAID)


@pytest.mark.parametrize("last", [False, True])
def test_on_the_page(chromium: str, tmp_path: Path, last: bool) -> None:
    file = tmp_path / "report.html"
    file.write_text(written([run_of(tmp_path / "run", last=last)], file))
    (panel,) = re.findall(r'id="chart-experts".*?</section>', opened(chromium, file).stdout, re.DOTALL)
    assert (SAID in panel) is not last
