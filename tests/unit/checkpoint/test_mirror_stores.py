"""Stores of mirrors: which can be used, bounded bandwidth, secrets, and which checkpoints are outdated."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.checkpoint.mirror import remote as remote_module
from mmscale.checkpoint.mirror.generation import MirroredStep, outdated
from mmscale.checkpoint.mirror.reasons import without_secrets
from mmscale.checkpoint.mirror.remote import Pace, Remote
from mmscale.checkpoint.save_settings import Retention
from mmscale.cli import main
from mmscale.errors import ConfigError
from tests.module_time import replace_time


def test_bandwidth_is_bounded_over_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock that it waits on, so that no test measures time."""
    now, slept = [0.0], []
    replace_time(monkeypatch, remote_module, monotonic=lambda: now[0], sleep=slept.append)
    pace = Pace(1000.0)
    for _ in range(5):
        pace.wait(500)
    assert slept == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])


def test_outdated_keeps_one_at_least() -> None:
    there = [MirroredStep(1, 100, "a" * 16), MirroredStep(1, 200, "b" * 16)]
    assert outdated(there, local=[], retention=Retention(1), best=None) == there[:1]
    assert MirroredStep.parse(there[0].name) == there[0] and MirroredStep.parse("auxiliary") is None


def test_of_a_permanent_step_the_newest_attempt_is_kept() -> None:
    there = [MirroredStep(attempt, step, "a" * 16) for attempt in (1, 2) for step in (1000, 1100, 1200)]
    gone = outdated(there, local=[], retention=Retention(1, keep_every=1000), best=1100)
    assert [one for one in there if one not in gone] == there[3:]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nowhere", "is no URL"),
        ("file://x/y", "named from the root"),
        ("gopher9://x/y", "knows no store"),
        ("adl://x/y", "cannot be used"),
    ],
)
def test_stores_that_cannot_be_used(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Remote(url)


@pytest.mark.parametrize("place", ["bucket/x", "bucket/x@100", "bucket", "100"])
def test_fetch_refuses_credentials_in_a_url_and_does_not_show_them(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ckpt", "fetch", f"s3://key:hunter2@{place}", str(tmp_path / "new")]) == 2
    shown = "".join(capsys.readouterr())
    assert "holds credentials" in shown and "hunter2" not in shown and not (tmp_path / "new").exists()


def test_reasons_hold_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    assert without_secrets("PermissionError: hunter2hunter2 is wrong\nmore") == "PermissionError: *** is wrong"
