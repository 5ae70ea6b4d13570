"""The matrix of going on, in another layout and through a launch; `make test-all` has it.

Each cell is right, refused in words, or asks for `--yes`, as test_going_on.py has it for one process.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.going_on import CELLS, SUBJECTS, Courses
from tests.end_to_end.running import Ended, assert_says, mmscale

EXHAUSTIVE = pytest.mark.exhaustive
# Layouts at the resume of a run of one process: ranks, settings.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp": (2, ()),
    "tp": (2, ("parallel.tp=2",)),
    "pp": (2, ("parallel.pp=2",)),
    "ep": (2, ("parallel.ep=2",)),
}
# One micro-batch of four sequences is the whole batch.
NOT_SHARED_OUT = {("batch", "dp"), ("batch", "ep")}


@EXHAUSTIVE
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_another_layout_goes_on(subject: str, name: str, config: Path, course: Courses, tmp_path: Path) -> None:
    """With the number of one process, or it is refused in words."""
    one = course(subject, name)

    def act(nproc: int, *settings: str) -> Callable[..., Ended]:
        ep = () if "parallel.ep=2" in settings else ("parallel.ep=1",)
        return lambda *more: mmscale("train", config, *ep, *settings, *more, nproc=nproc)

    alone = one.act(tmp_path / "alone", act(1))
    for layout, (nproc, settings) in LAYOUTS.items():
        place = tmp_path / layout
        if (name, layout) in NOT_SHARED_OUT:
            shutil.copytree(one.exported / one.subject.source, place / "tiny")
            ended = act(nproc, *settings)(*one.settings(place / "tiny"), "--yes")
            assert_says(ended, status=2, cause="global_batch_size", remedy="multiple|divisible|raise|use")
            continue
        ended = one.act(place, act(nproc, *settings))
        assert (ended is None) == (alone is None)
        if ended is not None:
            assert one.loss(place) == pytest.approx(one.loss(tmp_path / "alone"), rel=1e-5), layout


@EXHAUSTIVE
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_launch_goes_on(subject: str, name: str, config: Path, course: Courses, tmp_path: Path) -> None:
    """Refused before anything is written; else it takes the step that `train` takes."""
    one = course(subject, name)
    alone = one.act(tmp_path / "alone", lambda *more: mmscale("train", config, "parallel.ep=1", *more))

    def launch(*more: str) -> Ended:
        folder = tmp_path / "launched" / "tiny" / one.subject.folder / "launch"
        dry = mmscale("launch", config, "--cluster", "local", "parallel.ep=1", *more, "--dry-run")
        assert not folder.exists()
        ended = mmscale("launch", config, "--cluster", "local", "parallel.ep=1", *more, timeout_s=400)
        assert folder.exists() == (ended.status == 0) and dry.status == ended.status
        if ended.status:
            assert dry.err == ended.err
        return ended

    ended = one.act(tmp_path / "launched", launch)
    assert (ended is None) == (alone is None)
    if ended is not None:
        assert one.loss(tmp_path / "launched") == one.loss(tmp_path / "alone")
