"""A run's checkpoints and its mirror in another folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.checkpoint import publish
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.mirror import downloads
from mmscale.checkpoint.mirror.remote import Remote
from mmscale.runtime import atomic_files


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.of_run(tmp_path / "runs" / "one")


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(f"file://{tmp_path}/mirror/one")


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fsync, which takes seconds on a loaded disk: kills here are of processes, not of machines. Short pauses."""
    for module in (publish, atomic_files):
        monkeypatch.setattr(module, "fsync", lambda path: None)
    monkeypatch.setattr(downloads, "_FIRST_PAUSE_S", 0.001)
