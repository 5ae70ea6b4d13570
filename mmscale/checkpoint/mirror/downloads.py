"""Fetches a checkpoint from a mirror into a run folder: hashed while it is written, then committed as usual."""

from __future__ import annotations

import contextlib
import errno
import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import xxhash

from mmscale.checkpoint import integrity, publish, signing
from mmscale.checkpoint.integrity import MANIFEST, SIGNATURE, CheckpointManifest, DamagedError, FileRecord
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.mirror.generation import MirroredStep
from mmscale.checkpoint.mirror.reasons import without_secrets
from mmscale.checkpoint.mirror.remote import Remote
from mmscale.errors import CheckpointError, ConfigError

_TRIES = 5
_FIRST_PAUSE_S = 1.0
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_OLDER = "fetch an older one: URL@STEP; with a step that is not there, those that are there are named"
T = TypeVar("T")


@dataclass(frozen=True)
class Fetched:
    """A checkpoint that was fetched.

    Attributes:
        step: of it.
        path: its folder.
        name: of its folder in the mirror.
        bytes: of its files.
        files: number of them.
    """

    step: int
    path: Path
    name: str
    bytes: int
    files: int


def connect(url: str) -> Remote:
    """Open the folder of a mirror; some stores connect here.

    Raises:
        CheckpointError: the store cannot be reached.
        ConfigError: there is no such kind of store.
    """
    return _with_retries(functools.partial(Remote, url), what=url)


def generations(remote: Remote) -> list[MirroredStep]:
    """Complete checkpoints of a mirror, the newest last.

    Raises:
        CheckpointError: the store fails to list which ones are complete.
    """

    def is_complete(name: str) -> bool:
        look = functools.partial(remote.is_complete, name)
        return _with_retries(look, what=f"{remote.url}/{name}")

    names = _with_retries(remote.folders, what=remote.url)
    found = [one for name in names if (one := MirroredStep.parse(name)) is not None]
    return sorted(one for one in found if is_complete(one.name))


def choose(remote: Remote, step: int | None) -> MirroredStep:
    """The newest complete checkpoint of a mirror, or the newest one of a step.

    Raises:
        CheckpointError: there is none, or the store fails.
    """
    there = generations(remote)
    wanted = [one for one in there if step in (None, one.step)]
    if wanted:
        return wanted[-1]
    steps = ", ".join(str(one.step) for one in there)
    raise CheckpointError(
        f"{remote.url} holds no complete checkpoint" + ("" if step is None else f" of step {step}"),
        remedy=f"choose one of {steps}: URL@STEP"
        if there
        else "name the folder of a run: the value of "
        "checkpoint.mirror, a slash and the run's name; and check credentials and endpoint",
    )


def fetch(
    remote: Remote,
    step: int | None,
    store: Store,
    *,
    signers: Path | None = None,
) -> Fetched:
    """Make a mirrored checkpoint a checkpoint of a run. It gets its name when it is complete.

    Args:
        remote: the mirror.
        step: of the checkpoint; None: the newest complete one.
        store: of the run that gets it.
        signers: file of allowed signers, one of whom must have signed it; None: no signature is required.

    Raises:
        CheckpointError: there is none, it is damaged or not signed, or nothing can be written.
    """
    chosen = choose(remote, step)
    manifest = _manifest(remote, chosen)
    final = store.path(manifest.step)
    size = sum(record.size for record in manifest.files.values())
    fetched = Fetched(manifest.step, final, chosen.name, size, len(manifest.files))
    if final.exists():
        with contextlib.suppress(DamagedError):
            if integrity.read_manifest(final) == manifest and not integrity.verify(final, step=manifest.step):
                return fetched  # by an earlier call
    publish.refuse_existing(final)
    with publish.writing(store.root):
        folder = store.begin(manifest.step, manifest.attempt)
        try:
            for name, record in manifest.files.items():
                _with_retries(
                    functools.partial(_fetch, remote, chosen.name, folder, name, record),
                    what=f"{remote.url}/{chosen.name}/{name}",
                )
            _fetch_signature(remote, chosen, folder, manifest, signers)
            store.commit(manifest)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return fetched


def _manifest(remote: Remote, chosen: MirroredStep) -> CheckpointManifest:
    read = functools.partial(remote.read_text, f"{chosen.name}/{MANIFEST}")
    text = _with_retries(read, what=f"{remote.url}/{chosen.name}")
    try:
        manifest = integrity.parse_manifest(text, where=f"{remote.url}/{chosen.name}/{MANIFEST}")
    except DamagedError as error:
        raise _damaged(remote, chosen, str(error)) from None
    if MirroredStep.of(manifest) != chosen:
        raise _damaged(remote, chosen, f"{MANIFEST} belongs to {MirroredStep.of(manifest).name}")
    if outside := [name for name in manifest.files if not _is_inside(name)]:
        raise _damaged(remote, chosen, f"{MANIFEST} names {outside[0]!r}, which is not inside the folder")
    return manifest


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    own = name in (MANIFEST, SIGNATURE)
    return name == str(path) and not path.is_absolute() and ".." not in path.parts and "\0" not in name and not own


def _damaged(remote: Remote, chosen: MirroredStep, why: str) -> CheckpointError:
    return CheckpointError(f"{remote.url}/{chosen.name} is damaged: {why}", remedy=_OLDER)


def _fetch(remote: Remote, generation: str, folder: Path, name: str, record: FileRecord) -> None:
    """Write one file.

    Raises:
        DamagedError: the store returns another content.
    """
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    state, size = xxhash.xxh3_128(), 0
    try:
        chunks = remote.chunks(f"{generation}/{name}")
        with target.open("wb") as file:
            for chunk in chunks:
                state.update(chunk)
                size += len(chunk)
                if size > record.size:
                    break
                file.write(chunk)
    except FileNotFoundError:
        raise DamagedError(f"{name} is missing") from None
    if FileRecord(size, state.hexdigest()) != record:
        raise DamagedError(f"{name} has another content than what was written")


def _fetch_signature(
    remote: Remote,
    chosen: MirroredStep,
    folder: Path,
    manifest: CheckpointManifest,
    signers: Path | None,
) -> None:
    (folder / MANIFEST).write_text(manifest.text(), encoding="utf-8")

    def read() -> str | None:
        try:
            return remote.read_text(f"{chosen.name}/{SIGNATURE}")
        except (FileNotFoundError, ValueError):
            return None

    text = _with_retries(read, what=f"{remote.url}/{chosen.name}/{SIGNATURE}")
    if text is not None:
        (folder / SIGNATURE).write_text(text, encoding="utf-8")
    if signers is None:
        return
    _, problem = signing.signer(folder, signers)
    if problem:
        raise CheckpointError(f"{remote.url}/{chosen.name}: {problem}", remedy="fetch one that an allowed key signed")


def _with_retries(read: Callable[[], T], *, what: str) -> T:
    """The result of a read, which is retried if the store fails or returns other bytes than were written.

    Raises:
        CheckpointError: it failed every time.
        OSError: this host cannot write.
    """
    for number in range(_TRIES):
        try:
            return read()
        except ConfigError:
            raise
        except Exception as error:  # stores raise all kinds of errors
            if isinstance(error, OSError) and error.errno in _LOCAL:
                raise
            if number == _TRIES - 1:
                damaged = isinstance(error, DamagedError)
                said = (
                    f"is damaged: {error}"
                    if damaged
                    else f"cannot be read: {without_secrets(f'{type(error).__name__}: {error}')}"
                )
                raise CheckpointError(
                    f"{what} {said}", remedy=_OLDER if damaged else "check network, credentials and endpoint"
                ) from None
        time.sleep(_FIRST_PAUSE_S * 2**number)
    raise AssertionError
