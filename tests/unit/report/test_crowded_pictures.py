"""In PNGs every text is inside the picture and apart from others, however many curves and breaks a chart has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from launch.goodput import goodput
from mmscale.report import figures, page, pictures
from mmscale.train.log.metrics_log import MetricsLog
from tests.unit.report.test_page import VOCABULARY

SETS = ("", "source/plots/", "source/glyphs of a long name/", "validation/mine/")
FIGURES = {"loss/text": 2.0, "loss/image": 1.0, "bits_per_byte/text": 3.0, "conditional_loss/text_given_image": 1.5}
CHANGES = ["data.path: a -> b", "model.seq_length: 64 -> 128", "train.global_batch_size: 4 -> 8"]


def crowded(folder: Path, *, breaks: tuple[int, ...]) -> Path:
    """A run with a blend, a validation set and threshold routing, whose settings changed at some steps."""
    events: list[dict[str, Any]] = [{"time": 1.0, "attempt": 1, "event": "start", "step": 0, "world_size": 1}]
    for attempt, (first, last) in enumerate(zip((0, *breaks), (*breaks, 200), strict=True), start=1):
        log = MetricsLog(folder, attempt=attempt)
        for step in range(first + 10, last + 1, 10):
            log.write(
                step, {"loss": 3.0, "loss/text": 4.0 - step / 100, "loss/image": 2.0, "lr": 1e-3, "grad_norm": 1.0}
            )
            if step % 20 == 0:
                keys = [f"eval/{name}{way}{key}" for name in SETS for way in ("", "threshold/") for key in FIGURES]
                log.write(
                    step, {key: FIGURES[next(k for k in FIGURES if key.endswith(k))] - step / 400 for key in keys}
                )
        log.close()
        if last < 200:
            events.append(
                {"time": 1.0 + last, "attempt": attempt + 1, "event": "resume", "step": last, "changed": CHANGES}
            )
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.yaml").write_text(VOCABULARY % 128 + "train: {steps: 200}\n")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, instead of files."""
    found: list[Figure] = []
    for module in (pictures, figures):
        monkeypatch.setattr(module, "save_figure", lambda figure, out: found.append(figure))
    return found


def texts(figure: Figure) -> Iterator[tuple[str, Bbox]]:
    """Titles, notes, labels of breaks and entries of legends, with their places."""
    figure.canvas.draw()
    for axes in figure.axes:
        legend = axes.get_legend()
        own: list[Text] = [axes.title, axes._left_title, *axes.texts, *(legend.get_texts() if legend else ())]  # type: ignore[attr-defined]
        yield from ((one.get_text(), one.get_window_extent()) for one in own if one.get_text())


@pytest.mark.parametrize("breaks", [(), (120,), (60, 120, 140)])
@pytest.mark.parametrize("what", ["page", "curves"])
def test_texts_are_inside_and_apart(what: str, breaks: tuple[int, ...], tmp_path: Path, drawn: list[Figure]) -> None:
    run = crowded(tmp_path / "run", breaks=breaks)
    if what == "curves":
        figures.loss_curves([run], tmp_path / "curves.png")
    else:
        pictures.write_pictures(page.read_runs([run], goodput=goodput), tmp_path / "report.html")
    assert drawn
    for figure in drawn:
        found = list(texts(figure))
        whole = figure.bbox.padded(1)
        for text, box in found:
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, text
        for number, (text, box) in enumerate(found):
            assert not [other for other, own in found[number + 1 :] if box.overlaps(own)], text


def test_panels_have_most_of_their_columns(tmp_path: Path, drawn: list[Figure]) -> None:
    """And legends are below them, not on curves."""
    run = crowded(tmp_path / "run", breaks=(120,))
    pictures.write_pictures(page.read_runs([run], goodput=goodput), tmp_path / "report.html")
    loss = drawn[0]
    loss.canvas.draw()
    for axes in loss.axes:
        columns = 1 if axes is loss.axes[0] else 2
        assert axes.get_window_extent().width > 0.8 * loss.bbox.width / columns, axes.get_title(loc="left")
        legend = axes.get_legend()
        assert legend is not None and not legend.get_window_extent().overlaps(axes.get_window_extent())
