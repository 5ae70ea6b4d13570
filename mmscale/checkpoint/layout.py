"""Folders of a run's checkpoints: names, the commit by rename, the newest one, retention.

Knows paths only: no torch, no tensors. A folder `step_00000100` was whole when it got that name, which it gets last;
whether it still is, integrity.py says.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.checkpoint import integrity
from mmscale.errors import CheckpointError

FOLDER = "checkpoints"
INFO = "mmscale.json"
LATEST = "latest"
ARRAYS = "tensors"  # the folder in an archive that holds its arrays
EVENTS = "events.jsonl"  # of the run; train/metrics.py writes it
SCRATCH = "from_scratch"  # the event after which older saves do not count
INFO_FORMAT = 2  # 1 had no manifest
_VERIFIED = 2  # checkpoints known to be whole that retention never goes below
_STEP = re.compile(r"^step_(\d{8,})$")
_BAD = re.compile(r"^step_\d{8,}\.bad(\.\d+)?$")
_LEFT = re.compile(r"^(step_\d{8,})\.(tmp|old|deleted)")


def _nothing(stage: str) -> None:
    """The usual `on_stage`."""


def is_archive(path: Path) -> bool:
    """Whether a folder claims to be an archive; whether it is a whole one, archive.py says."""
    return (path / ARRAYS).is_dir() or (path / integrity.MANIFEST).is_file()


def info_text(info: dict[str, Any]) -> str:
    """The content of INFO, from plain JSON."""
    return json.dumps({"format": INFO_FORMAT, **info}, indent=1)


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run.

    Attributes:
        root: `<run>/checkpoints`.
        on_stage: told the name of every sub-step of a commit after it; tests end the process there.
    """

    root: Path
    on_stage: Callable[[str], None] = _nothing

    @classmethod
    def of_run(cls, run: Path) -> Store:
        """The store of a run folder."""
        return cls(run / FOLDER)

    def path(self, step: int) -> Path:
        """Where the committed checkpoint of a step stands."""
        return self.root / f"step_{step:08d}"

    def temporary(self, step: int, attempt: int, number: int = 0) -> Path:
        """Where it is written before it is committed; a new name for every attempt, and for every save in it."""
        name = f"step_{step:08d}.tmp.{attempt}"
        return self.root / (f"{name}.{number}" if number else name)

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
        self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder = self.temporary(step, attempt)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o755)
        return folder

    def write_info(self, step: int, attempt: int, info: dict[str, Any]) -> None:
        """Put what `info` gives back, plain JSON, into a folder that is being written. One process calls it."""
        (self.temporary(step, attempt) / INFO).write_text(info_text(info), encoding="utf-8")

    def commit(self, manifest: integrity.Manifest, *, number: int = 0) -> Path:
        """Make a written folder the checkpoint of its step. One process calls it, after all ranks have written.

        Killed anywhere in between, it leaves the checkpoint that was there before or the new one, after a `sweep`.

        Args:
            manifest: what the folder consists of, as it was written.
            number: of the save in its attempt.
        """
        step, attempt = manifest.step, manifest.attempt
        folder, final = self.temporary(step, attempt, number), self.path(step)
        (folder / integrity.MANIFEST).write_text(manifest.text(), encoding="utf-8")
        self.on_stage("manifest")
        for file in (*folder.rglob("*"), folder):
            file.chmod(stat.S_IMODE(file.stat().st_mode) & ~stat.S_IWOTH)
            integrity.fsync(file)
        self.on_stage("fsync")
        old = final.with_name(f"{final.name}.old.{attempt}")
        if final.exists():  # an earlier attempt reached this step too
            final.replace(old)
            self.on_stage("move")
        folder.replace(final)
        integrity.fsync(self.root)
        self.on_stage("rename")
        if old.exists():
            shutil.rmtree(old)
        self.point_to_newest()
        self.on_stage("latest")
        return final

    def point_to_newest(self) -> None:
        """Write the newest checkpoint's name into `latest`: a hint for people and scripts, which nothing here reads."""
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
        temporary = self.root / f"{LATEST}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.write_text(wanted, encoding="utf-8")
        integrity.fsync(temporary)
        temporary.replace(file)
        integrity.fsync(self.root)

    def condemn(self, step: int) -> Path:
        """Take a damaged checkpoint out of the way, for inspection: nothing here deletes it."""
        target, number = self.path(step).with_suffix(".bad"), 1
        while target.exists():
            number += 1
            target = self.path(step).with_suffix(f".bad.{number}")
        self.path(step).replace(target)
        integrity.fsync(self.root)
        self.point_to_newest()
        return target

    def condemned(self) -> list[str]:
        """Names of the folders that `condemn` left."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir() if _BAD.match(entry.name))

    def restore_bad(self, name: str) -> int:
        """Give a folder that `condemn` left its name back; whether it is whole, the caller has found out.

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
        integrity.fsync(self.root)
        self.point_to_newest()
        return step

    def lost(self) -> str:
        """What says that there were checkpoints, where there are none now; "" if nothing does."""
        if self.root.is_symlink() and not self.root.exists():
            return f"{self.root} is a link to {self.root.readlink()}, which is not there"
        entries = self.root.iterdir() if self.root.is_dir() else ()
        if any((left := _LEFT.match(entry.name)) and left[2] == "old" for entry in entries):
            return ""  # a commit was interrupted: `sweep` brings it back
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
        """The newest committed step; None where there never was one.

        Raises:
            CheckpointError: there were checkpoints, and all of them turned out to be damaged, or are gone.
        """
        steps, bad = self.steps(), self.condemned()
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
        """What was given to `write_info`.

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

    def promises_manifest(self, step: int) -> bool:
        """Whether a checkpoint was written with a manifest: without one it is damaged then, and not just old."""
        try:
            return int(self.info(step).get("format", 1)) >= INFO_FORMAT
        except (CheckpointError, *bounded.BAD_CONTENT):
            return True

    def prune(self, keep: int, *, every: int = 0, verified: Collection[int] = ()) -> list[int]:
        """Delete old checkpoints; returns the deleted steps.

        Args:
            keep: newest ones that stay.
            every: steps divisible by it stay for ever; 0: none do.
            verified: steps known to be whole. The two newest of them stay, and nothing goes while there are fewer.
        """
        steps = self.steps()
        whole = [step for step in steps if step in verified]
        if len(whole) < _VERIFIED:
            return []
        kept = {*steps[-keep:], *whole[-_VERIFIED:], *(step for step in steps if every and step % every == 0)}
        gone = [step for step in steps if step not in kept]
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
