"""Pictures of experts for any number of experts in each group; a group with one expert has no co-selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from launch.goodput import goodput
from mmscale.report import page, pictures
from mmscale.train.log.metrics_log import MetricsLog

COUNTS = [(1, 1, 1), (2, 2, 1), (1, 2, 3), (4, 1, 1), (2, 0, 1)]  # of text, image and audio; 0: no group


def figures_of(experts: int) -> dict[str, Any]:
    """The figures of a layer's group, as layers.jsonl has them."""
    load = torch.full((experts,), 0.5).tolist()
    pairs = {"coselection": torch.eye(experts).tolist()} if experts > 1 else {}
    return {"unrouted": 0.25, "load": load, "gate": load, **pairs}


def run_of(folder: Path, counts: tuple[int, ...]) -> Path:
    log = MetricsLog(folder, attempt=1)
    groups = {name: number for name, number in zip(("text", "image", "audio"), counts, strict=True) if number}
    for step in (10, 20):
        log.write(step, {"loss": 1.0, **{f"loss/{name}": 1.0 for name in groups}})
        experts = {name: {name: figures_of(number)} for name, number in groups.items()}
        log.write_layers(step, {str(layer): {"experts": experts, "output_norm": {"text": 1.0}} for layer in (0, 1)})
    log.close()
    return folder


@pytest.mark.parametrize("counts", COUNTS)
def test_every_picture_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...]) -> None:
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(pictures, "save_figure", lambda figure, file: drawn.update({file.name: figure}))
    runs = page.read_runs([run_of(tmp_path / "run", counts)], goodput=goodput)
    files = pictures.write_pictures(runs, tmp_path / "r.html")
    page.write_page(runs, tmp_path / "r.html")
    assert {file.name for file in files} == drawn.keys() >= {"r_experts.png", "r_layers.png"}
    assert len(drawn["r_experts.png"].axes) == sum(number > 0 for number in counts) + 1  # and the colour bar
    several = sum(number > 1 for number in counts)
    assert ("r_coselection.png" in drawn) == (several > 0)
    if several:
        assert len(drawn["r_coselection.png"].axes) == 2 * several + 1
