"""How far two layouts are apart, step by step: rounding, until two tokens are so close that the other one is chosen.

docs/resume.md states the bounds.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.model import routing
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import mmscale

STEPS = 24
ROUNDING = 5e-7  # of the loss, relative, while all choices are the same; 1.4e-7 seen in 85 steps
FLIPPED = 1e-3  # likewise, from the first step on in which the layouts choose different tokens
_SIZE = 8  # bytes of a digest


def record(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have forked ranks write down what each choice of a router was, in order."""
    best = routing._best

    def recorded(ranked: Tensor, count: int) -> Tensor:
        chosen = best(ranked, count)
        if not torch.is_grad_enabled():  # an evaluation
            return chosen
        with (folder / os.environ.get("RANK", "0")).open("ab") as file:
            # As sets: of equals the order decides nothing.
            file.write(hashlib.blake2b(chosen.sort(dim=0).values.numpy().tobytes(), digest_size=_SIZE).digest())
        return chosen

    monkeypatch.setattr(routing, "_best", recorded)


def choices(folder: Path, ranks: int) -> list[list[bytes]]:
    """The choices of every step, sorted: which rank has which micro-batch does not matter."""
    found: list[list[bytes]] = [[] for _ in range(STEPS)]
    for rank in range(ranks):
        content = (folder / str(rank)).read_bytes()
        digests = [content[place : place + _SIZE] for place in range(0, len(content), _SIZE)]
        each, rest = divmod(len(digests), STEPS)
        assert each and not rest
        for step in range(STEPS):
            found[step] += digests[step * each : (step + 1) * each]
    return [sorted(step) for step in found]


def test_layouts_part_where_a_choice_is_another(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[int, list[dict[str, Any]]] = {}
    chosen: dict[int, list[list[bytes]]] = {}
    for ranks in (1, 2):
        folder = tmp_path / f"choices{ranks}"
        folder.mkdir()
        with monkeypatch.context() as patch:
            record(patch, folder)
            settings = [f"run.dir={tmp_path / str(ranks)}", f"train.steps={STEPS}", f"parallel.ep={ranks}"]
            settings += ["train.eval_every=0", "train.dry_run=false", "checkpoint.every=0"]
            ended = mmscale("train", config, *settings, nproc=ranks)
        assert ended.status == 0, ended
        rows[ranks] = [row for row in read_metrics(tmp_path / str(ranks) / "tiny") if "loss" in row]
        chosen[ranks] = choices(folder, ranks)
    flipped = False
    for step in range(STEPS):
        apart = abs(rows[1][step]["loss"] / rows[2][step]["loss"] - 1)
        differs = len(set(chosen[1][step]) ^ set(chosen[2][step])) // 2
        flipped |= bool(differs)
        assert apart < (FLIPPED if flipped else ROUNDING), (step + 1, apart, differs)
        assert apart < 10 * ROUNDING or differs, (step + 1, apart)
