"""Brings a mirror up to date with the committed checkpoints of a run: uploads missing ones, deletes old ones.

Every call starts from the content of the run's folder and of the mirror, so it may be killed at any point and called
again. Files are hashed while they are read; the manifest, which makes a generation complete, is written last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from mmscale.checkpoint import integrity
from mmscale.checkpoint.integrity import MANIFEST, SIGNATURE, CheckpointManifest, DamagedError, FileRecord
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.mirror.generation import MirroredStep, outdated
from mmscale.checkpoint.mirror.remote import CHUNK, Remote
from mmscale.checkpoint.save_settings import Retention
from mmscale.errors import CheckpointError
from mmscale.runtime import fail_points


@dataclass(frozen=True)
class Uploaded:
    """One checkpoint that is complete in the mirror now.

    Attributes:
        step: of the checkpoint.
        name: of its folder in the mirror.
        bytes: sent.
        seconds: taken.
    """

    step: int
    name: str
    bytes: int
    seconds: float


def wanted_steps(store: Store, retention: Retention) -> list[int]:
    """Steps of the checkpoints of a run that its mirror should have, the newest first."""
    steps, best = store.steps(), store.best()
    newest = steps[-retention.keep :]
    return [step for step in reversed(steps) if step in newest or retention.keeps(step) or step == best]


def generation_of(store: Store, step: int) -> MirroredStep | None:
    """The generation of a checkpoint of a run; None: it has no readable manifest."""
    manifest = _manifest_of(store, step)
    return None if manifest is None else MirroredStep.of(manifest)


def _manifest_of(store: Store, step: int) -> CheckpointManifest | None:
    try:
        return integrity.read_manifest(store.path(step))
    except (DamagedError, CheckpointError):
        return None


@dataclass
class Uploader:
    """Uploads the checkpoints of one run's stage. One process at a time.

    Attributes:
        store: the checkpoints.
        remote: the mirror's folder.
        retention: which checkpoints the mirror keeps.
        streams: files that are sent at the same time.
        refused: damaged checkpoints, by their name and with the reason; they are not tried again.
    """

    store: Store
    remote: Remote
    retention: Retention
    streams: int = 4
    refused: dict[str, str] = field(default_factory=dict)

    def bring_up_to_date(self, on_upload: Callable[[Uploaded], None]) -> None:
        """Upload every checkpoint that the mirror should have, the newest first, then delete old generations.

        Args:
            on_upload: called with every checkpoint after its manifest is written.

        Raises:
            Exception: of the store or the disk; what was completed before is kept.
        """
        while (step := self._next()) is not None:
            done = self._upload(step)
            if done is not None:
                on_upload(done)
        self._delete_old()

    def missing_steps(self) -> list[int]:
        """Steps that the mirror should have and lacks, the newest first."""
        complete = self._complete()
        return [step for step in self._wanted() if (one := self._local(step)) is not None and one not in complete]

    def _next(self) -> int | None:
        """The newest missing step; determined again after each upload, because the run saves at the same time."""
        return next(iter(self.missing_steps()), None)

    def _wanted(self) -> list[int]:
        return wanted_steps(self.store, self.retention)

    def _local(self, step: int) -> MirroredStep | None:
        """The generation of a checkpoint of the run; None: it has no manifest, or was refused."""
        found = generation_of(self.store, step)
        return None if found is None or found.name in self.refused else found

    def _manifest(self, step: int) -> CheckpointManifest | None:
        return _manifest_of(self.store, step)

    def _complete(self) -> set[MirroredStep]:
        return {one for one, is_complete in self._generations().items() if is_complete}

    def _generations(self) -> dict[MirroredStep, bool]:
        """Generations in the mirror, and whether each is complete. Raises if the store fails."""
        found = [one for name in self.remote.folders() if (one := MirroredStep.parse(name)) is not None]
        return {one: self.remote.is_complete(one.name) for one in found}

    def _upload(self, step: int) -> Uploaded | None:
        """Upload a checkpoint. None: it was deleted or replaced in the meantime, or is damaged."""
        began, folder, manifest = time.monotonic(), self.store.path(step), self._manifest(step)
        if manifest is None:
            return None
        name = MirroredStep.of(manifest).name
        there = self.remote.sizes(name)
        missing = {file: record for file, record in manifest.files.items() if there.get(file) != record.size}
        try:
            self._send_all(folder, name, missing)
            self._send_signature(folder, name)
            there = self.remote.sizes(name)
            if wrong := [file for file, record in manifest.files.items() if there.get(file) != record.size]:
                raise OSError(f"{self.remote.url}/{name}/{wrong[0]} has {there.get(wrong[0])} bytes in the store")
            fail_points.reached("files")
        except (FileNotFoundError, DamagedError) as error:
            if self._manifest(step) != manifest:
                return None  # the run keeps its newest checkpoints only, or has written this step again
            if isinstance(error, FileNotFoundError):
                raise
            self.refused[name] = str(error)
            return None
        self.remote.write_text(f"{name}/{MANIFEST}", manifest.text())
        fail_points.reached("manifest")
        sent = sum(record.size for record in missing.values())
        return Uploaded(step, name, sent, time.monotonic() - began)

    def _send_all(self, folder: Path, name: str, files: dict[str, FileRecord]) -> None:
        with ThreadPoolExecutor(self.streams, thread_name_prefix="mirror") as pool:
            largest_first = sorted(files, key=lambda file: -files[file].size)
            tasks = [pool.submit(self._send, folder, name, file, files[file]) for file in largest_first]
            done, waiting = wait(tasks, return_when=FIRST_EXCEPTION)
            for task in waiting:
                task.cancel()
            for task in done:
                task.result()

    def _send(self, folder: Path, name: str, file: str, record: FileRecord) -> None:
        """Send one file.

        Raises:
            DamagedError: its content is not what was written at the save.
        """
        state, size = xxhash.xxh3_128(), 0
        with (folder / file).open("rb", buffering=0) as source, self.remote.writing(f"{name}/{file}") as target:
            while chunk := source.read(CHUNK):
                state.update(chunk)
                size += len(chunk)
                target.write(chunk)
            if FileRecord(size, state.hexdigest()) != record:
                raise DamagedError(f"{folder / file} has another content than what was written")
        fail_points.reached("file")

    def _send_signature(self, folder: Path, name: str) -> None:
        file = folder / SIGNATURE
        if file.is_file():
            self.remote.write_text(f"{name}/{SIGNATURE}", file.read_text(encoding="utf-8"))

    def _delete_old(self) -> None:
        """Delete generations that are not kept any more, and parts of uploads that will not be completed."""
        there, best = self._generations(), self.store.best()
        complete = {one for one, is_complete in there.items() if is_complete}
        local = [one for step in self.store.steps() if (one := self._local(step)) is not None]
        names = {one.name for one in outdated(complete, local=local, retention=self.retention, best=best)}
        names |= {one.name for one in there if one not in complete and one not in local}
        for name in sorted(names):
            self.remote.remove(name)
            fail_points.reached("delete")
