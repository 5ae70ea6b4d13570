"""Folders of a run's checkpoints: names, commit by rename, the newest checkpoint, retention.

It handles paths only: no torch, no tensors. A folder gets its name `step_00000100` last, when it is complete;
integrity.py checks whether it is still intact.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.checkpoint import integrity, publish
from mmscale.checkpoint.save_settings import BestCheckpoint
from mmscale.errors import CheckpointError
from mmscale.runtime import fail_points
from mmscale.runtime.atomic_files import TEMPORARY, fsync, write_atomic

FOLDER = "checkpoints"
INFO = "mmscale.json"
LATEST = "latest"
ARRAYS = "tensors"  # folder of the arrays in an archive
EVENTS = "events.jsonl"  # the run's log of events; runs/events.py writes it
SCRATCH = "from_scratch"  # the event after which earlier saves no longer count
BEST = "best"  # in INFO: metric, step and value of the best checkpoint when this one was written
INFO_FORMAT = 2  # 1 had no manifest
_VERIFIED = 2  # number of verified checkpoints that retention always keeps
_STEP = re.compile(r"^step_(\d{8,})$")
_BAD = re.compile(r"^step_\d{8,}\.bad(\.\d+)?$")
_LEFT = re.compile(r"^(step_\d{8,})\.(tmp|old|deleted)")


def is_archive(path: Path) -> bool:
    """Whether a folder looks like an archive; archive.py checks it."""
    return (path / ARRAYS).is_dir() or (path / integrity.MANIFEST).is_file()


def info_text(info: dict[str, Any]) -> str:
    """The content of INFO, from plain JSON."""
    return json.dumps({"format": INFO_FORMAT, **info}, indent=1)


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run.

    Attributes:
        root: `<run>/checkpoints`.
        check: called after every sub-step of a commit; an exception there ends the commit.
    """

    root: Path
    check: Callable[[], None] | None = None

    def passed(self, place: str) -> None:
        """A sub-step of a commit is done: a fail point, then `check`."""
        fail_points.reached(place)
        if self.check is not None:
            self.check()

    @classmethod
    def of_run(cls, run: Path) -> Store:
        """The store of a run folder."""
        return cls(run / FOLDER)

    def path(self, step: int) -> Path:
        """The folder of the committed checkpoint of a step."""
        return self.root / f"step_{step:08d}"

    def temporary(self, step: int, attempt: int, number: int = 0) -> Path:
        """The folder in which it is written before the commit; a new name for every attempt and every save."""
        name = f"step_{step:08d}.tmp.{attempt}"
        return self.root / (f"{name}.{number}" if number else name)

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending."""
        if not self.root.is_dir():
            return []
        found = [_STEP.match(entry.name) for entry in self.root.iterdir() if entry.is_dir()]
        return sorted(int(match.group(1)) for match in found if match)

    def choose(self, step: int | None = None) -> int:
        """The step to load: the requested one, or the newest.

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
        self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder = self.temporary(step, attempt)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o755)
        return folder

    def commit(self, manifest: integrity.CheckpointManifest, *, number: int = 0) -> Path:
        """Make a written folder the checkpoint of its step. One process calls it, after all ranks have written.

        If it is killed at any point, either the previous checkpoint or the new one exists after a `sweep`.

        Args:
            manifest: the files of the folder, as written.
            number: of the save in its attempt.
        """
        step, attempt = manifest.step, manifest.attempt
        folder, final = self.temporary(step, attempt, number), self.path(step)
        # An earlier attempt may have reached this step too.
        old = final.with_name(f"{final.name}.old.{attempt}")
        publish.commit(folder, final, manifest, replaced=old, passed=self.passed)
        self.point_to_newest()
        self.passed("latest")
        return final

    def point_to_newest(self) -> None:
        """Write the newest checkpoint's name into `latest`, a hint that is never used to choose a checkpoint."""
        steps, file = self.steps(), self.root / LATEST
        if not steps:
            file.unlink(missing_ok=True)
            return
        wanted = f"{self.path(steps[-1]).name}\n"
        try:
            if not file.is_symlink() and file.read_text(encoding="utf-8") == wanted:
                return
        except (OSError, ValueError):
            pass
        write_atomic(file, wanted)

    def quarantine(self, step: int) -> Path:
        """Rename a damaged checkpoint to `.bad`, for inspection. mmscale never deletes it."""
        target, number = self.path(step).with_suffix(".bad"), 1
        while target.exists():
            number += 1
            target = self.path(step).with_suffix(f".bad.{number}")
        self.path(step).replace(target)
        fsync(self.root)
        self.point_to_newest()
        return target

    def quarantined(self) -> list[str]:
        """Names of the checkpoints renamed to `.bad`."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir() if _BAD.match(entry.name))

    def restore_bad(self, name: str) -> int:
        """Rename a `.bad` folder back; the caller has verified it.

        Raises:
            CheckpointError: there is a checkpoint of that step.
        """
        step = int(name.partition(".")[0].removeprefix("step_"))
        if self.path(step).exists():
            raise CheckpointError(
                f"{self.path(step)} is there, so {name} cannot take its place",
                remedy="rename one of the two by hand if you want the other",
            )
        (self.root / name).replace(self.path(step))
        fsync(self.root)
        self.point_to_newest()
        return step

    def lost(self) -> str:
        """Evidence that checkpoints existed although there are none now; "" if there is none."""
        if self.root.is_symlink() and not self.root.exists():
            return f"{self.root} is a link to {self.root.readlink()}, which is not there"
        entries = self.root.iterdir() if self.root.is_dir() else ()
        if any((left := _LEFT.match(entry.name)) and left[2] == "old" for entry in entries):
            return ""  # a commit was interrupted: `sweep` restores it
        if (self.root / LATEST).is_file():
            return f"{self.root / LATEST} names {(self.root / LATEST).read_text(errors='replace').strip()[:40]!r}"
        saved = None
        events = self.root.parent / EVENTS
        for line in events.read_text(encoding="utf-8", errors="replace").splitlines() if events.is_file() else ():
            if f'"{SCRATCH}"' in line:
                saved = None
            elif '"save_committed"' in line:
                saved = line
        found = re.search(r'"step": *(\d+)', saved) if saved else None
        return f"{events} says that step {found[1] if found else '?'} was saved" if saved else ""

    def newest(self) -> int | None:
        """The newest committed step; None if there has never been one.

        Raises:
            CheckpointError: there were checkpoints, and all of them are damaged or gone.
        """
        steps, bad = self.steps(), self.quarantined()
        if not steps and bad:
            raise CheckpointError(
                f"no checkpoint in {self.root} is whole; damaged ones are kept as {', '.join(bad)}",
                remedy="restore one from a copy, or remove these folders to start from scratch; if the storage was at "
                "fault, `mmscale ckpt restore-bad` reads them once more",
            )
        if not steps and (why := self.lost()):
            raise CheckpointError(
                f"{self.root} holds no checkpoint, but {why}",
                remedy="mount or restore that folder, or start again from step 0: `mmscale train` or "
                "`mmscale launch` with --from-scratch",
            )
        return steps[-1] if steps else None

    def info(self, step: int) -> dict[str, Any]:
        """The metadata of a checkpoint, from its INFO.

        Raises:
            CheckpointError: it cannot be read.
        """
        file = self.path(step) / INFO
        try:
            return bounded.read_object(file)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}", remedy="choose an older checkpoint: RUN@STEP"
            ) from error

    def best(self) -> int | None:
        """The step of the best checkpoint by `checkpoint.keep_best`, as stored in the newest one; None: unknown."""
        named = self.named_best()
        return None if named is None else named.step

    def named_best(self) -> BestCheckpoint | None:
        """The best checkpoint according to the newest one, if it still exists."""
        steps = self.steps()
        try:
            found = self.info(steps[-1])[BEST] if steps else None
            best = (
                None
                if found is None
                else BestCheckpoint(str(found["metric"]), int(found["step"]), float(found["value"]))
            )
        except (CheckpointError, *bounded.BAD_CONTENT):
            return None
        return best if best is not None and best.step in steps else None

    def promises_manifest(self, step: int) -> bool:
        """Whether a checkpoint was written with a manifest. If it has none now it is damaged, and not just old."""
        try:
            return int(self.info(step).get("format", 1)) >= INFO_FORMAT
        except (CheckpointError, *bounded.BAD_CONTENT):
            return True

    def prune(
        self,
        keep: int,
        *,
        permanent: Callable[[int], bool] = lambda step: False,
        verified: Collection[int] = (),
        spared: Collection[int] = (),
    ) -> list[int]:
        """Delete old checkpoints; returns the deleted steps.

        Args:
            keep: number of newest ones to keep.
            permanent: whether the checkpoint of a step is always kept.
            verified: steps of verified checkpoints. The two newest of them are kept, and nothing is deleted while there
                are fewer.
            spared: further steps to keep.
        """
        steps = self.steps()
        whole = [step for step in steps if step in verified]
        if len(whole) < _VERIFIED:
            return []
        kept = {*spared, *steps[-keep:], *whole[-_VERIFIED:], *filter(permanent, steps)}
        gone = [step for step in steps if step not in kept]
        for step in gone:
            doomed = self.path(step).with_suffix(".deleted")
            with contextlib.suppress(FileNotFoundError):  # `mmscale ckpt prune` and the run may delete at the same time
                self.path(step).replace(doomed)  # a committed name must never refer to a half-deleted folder
                shutil.rmtree(doomed)
        return gone

    def sweep(self) -> None:
        """Delete half-written and half-deleted folders of a killed attempt. One process calls it, at the start.

        A checkpoint that was moved away for its replacement is restored if the replacement was never committed.
        """
        if not self.root.is_dir():
            return
        for file in self.root.glob(f"*{LATEST}.*{TEMPORARY}"):
            file.unlink(missing_ok=True)
        for entry in list(self.root.iterdir()):
            left = _LEFT.match(entry.name)
            if not left or not entry.is_dir():
                continue
            if left[2] == "old" and not (self.root / left[1]).exists():
                entry.replace(self.root / left[1])
            else:
                shutil.rmtree(entry)
