"""Folders of a run's checkpoints: names, the commit by rename, the newest one, retention.

Knows paths only: no torch, no tensors. A folder `step_00000100` is whole, because it gets that name last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.errors import CheckpointError

FOLDER = "checkpoints"
INFO = "mmscale.json"
_STEP = re.compile(r"^step_(\d{8,})$")
_LEFT = re.compile(r"^(step_\d{8,})\.(tmp|old|deleted)")


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run.

    Attributes:
        root: `<run>/checkpoints`.
    """

    root: Path

    @classmethod
    def of_run(cls, run: Path) -> Store:
        """The store of a run folder."""
        return cls(run / FOLDER)

    def path(self, step: int) -> Path:
        """Where the committed checkpoint of a step stands."""
        return self.root / f"step_{step:08d}"

    def temporary(self, step: int, attempt: int) -> Path:
        """Where it is written before it is committed; a new name for every attempt."""
        return self.root / f"step_{step:08d}.tmp.{attempt}"

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending."""
        if not self.root.is_dir():
            return []
        found = [_STEP.match(entry.name) for entry in self.root.iterdir() if entry.is_dir()]
        return sorted(int(match.group(1)) for match in found if match)

    def choose(self, step: int | None = None) -> int:
        """The step to load: the one asked for, or the newest.

        Raises:
            CheckpointError: there is none.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(
                f"{self.root} has no checkpoint of step {step}",
                remedy=f"choose one of {', '.join(map(str, steps))}"
                if steps
                else "train first: `mmscale train CONFIG`",
            )
        if not steps:
            raise CheckpointError(
                f"{self.root} holds no committed checkpoint", remedy="train first: `mmscale train CONFIG`"
            )
        return step if step is not None else steps[-1]

    def begin(self, step: int, attempt: int) -> Path:
        """An empty folder to write into. One process calls it."""
        folder = self.temporary(step, attempt)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def commit(self, step: int, attempt: int, info: dict[str, Any]) -> Path:
        """Make a written folder the checkpoint of its step. One process calls it, after all ranks have written.

        Args:
            step: optimizer steps done.
            attempt: attempt that wrote it.
            info: what `info` gives back; plain JSON.
        """
        folder, final = self.temporary(step, attempt), self.path(step)
        (folder / INFO).write_text(json.dumps(info, indent=1))
        for file in (*folder.rglob("*"), folder):
            _sync(file)
        if final.exists():  # an earlier attempt reached this step too; its content is the same or older
            old = final.with_name(f"{final.name}.old.{attempt}")
            final.replace(old)
            shutil.rmtree(old)
        folder.replace(final)
        _sync(self.root)
        return final

    def info(self, step: int) -> dict[str, Any]:
        """What was given to `commit`.

        Raises:
            CheckpointError: it cannot be read.
        """
        file = self.path(step) / INFO
        try:
            content = json.loads(file.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}", remedy="choose an older checkpoint: RUN@STEP"
            ) from error
        assert isinstance(content, dict)
        return content

    def prune(self, keep: int) -> list[int]:
        """Delete all but the `keep` newest checkpoints; returns the deleted steps."""
        gone = self.steps()[:-keep]
        for step in gone:
            doomed = self.path(step).with_suffix(".deleted")
            self.path(step).replace(doomed)  # never a half-deleted folder under a committed name
            shutil.rmtree(doomed)
        return gone

    def sweep(self) -> None:
        """Delete what a killed attempt left half-written or half-deleted. One process calls it, at the start.

        A checkpoint that was moved away for its successor comes back if that never took its place.
        """
        if not self.root.is_dir():
            return
        for entry in list(self.root.iterdir()):
            left = _LEFT.match(entry.name)
            if not left or not entry.is_dir():
                continue
            if left[2] == "old" and not (self.root / left[1]).exists():
                entry.replace(self.root / left[1])
            else:
                shutil.rmtree(entry)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
