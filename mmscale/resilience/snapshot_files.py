"""Files of the memory tier: a rank's folder in shared memory, its two slots, and the marker that commits a slot.

    /dev/shm/mmscale-<32 random hexadecimal digits>/      0700
        image.0   parity.0   commit.0                     0600; slot 0: the state, parity of others' states, marker
        image.1   parity.1   commit.1                     slot 1
        guard.sock   guard.log                            the guard of the folder

A slot without its marker is incomplete. The marker is written last, by rename, and is deleted first. No torch: the
guard reads and writes these files too. state_image.py defines the content of an image.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
import secrets
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from mmscale import bounded
from mmscale.runtime.atomic_files import write_atomic

ROOT = Path("/dev/shm")  # noqa: S108  memory, and it outlives a process; folders in it are private and have random names
SLOTS = (0, 1)
SOCKET, LOG = "guard.sock", "guard.log"
FORMAT = 1
_NAME = re.compile(r"^mmscale-[0-9a-f]{32}$")
_HASHED_AT_ONCE = 16 << 20


class UnusableError(Exception):
    """A file of the memory tier is invalid; the text gives the reason."""


@dataclass(frozen=True)
class Marker:
    """The content of a committed slot, and the data that its group needs to rebuild any one member.

    Attributes:
        generation: random name of the set of guards that wrote it; unique for each attempt.
        attempt: attempt of the run.
        serial: counts the snapshots of a generation; the highest is the newest, also after a roll-back.
        step: optimizer steps done.
        rank: owner of the state.
        members: ranks of the parity group, in member order.
        lengths: bytes of each member's image.
        digests: xxh3_128 of each member's image.
        parity_digest: xxh3_128 of this member's parity.
    """

    generation: str
    attempt: int
    serial: int
    step: int
    rank: int
    members: tuple[int, ...]
    lengths: tuple[int, ...]
    digests: tuple[str, ...]
    parity_digest: str

    def text(self) -> str:
        """As JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def parse(cls, text: str) -> Marker:
        """Back from `text()`.

        Raises:
            UnusableError: it is no marker, or one of another version.
        """
        try:
            content: dict[str, Any] = bounded.parse_json(text)
            if content.pop("format") != FORMAT:
                raise UnusableError("a commit marker of another version")
            for name in ("members", "lengths", "digests"):
                content[name] = tuple(content[name])
            marker = cls(**content)
        except bounded.BAD_CONTENT:
            raise UnusableError("a commit marker that is not readable") from None
        whole = all(isinstance(value, int) for value in (*marker.members, *marker.lengths, marker.step, marker.serial))
        if not whole or not len(marker.members) == len(marker.lengths) == len(marker.digests):
            raise UnusableError("a commit marker that is not readable")
        if marker.rank not in marker.members:
            raise UnusableError("a commit marker of another rank")
        return marker


# --- folders --------------------------------------------------------------------------------------------------------


def create_folder(root: Path = ROOT) -> Path:
    """A new private folder with an unguessable name."""
    folder = root / f"mmscale-{secrets.token_hex(16)}"
    folder.mkdir(mode=0o700)
    return folder


def existing_folder(name: str, root: Path = ROOT) -> Path | None:
    """The folder of this name, if it exists on this machine and no other user could have written into it."""
    folder = root / name
    try:
        found = folder.lstat()
    except OSError:  # also if another process has just removed it
        return None
    private = found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077
    return folder if _NAME.match(name) and stat.S_ISDIR(found.st_mode) and private else None


def remove_folder(folder: Path) -> None:
    """Free its memory. Two processes may do it at the same time."""
    shutil.rmtree(folder, ignore_errors=True)


def image_file(folder: Path, slot: int) -> Path:
    """The state in a slot."""
    return folder / f"image.{slot}"


def parity_file(folder: Path, slot: int) -> Path:
    """The parity of other members' states in a slot."""
    return folder / f"parity.{slot}"


# --- files ----------------------------------------------------------------------------------------------------------


def free_bytes(root: Path = ROOT) -> tuple[int, int]:
    """Free and all bytes of the file system."""
    usage = os.statvfs(root)
    return usage.f_bavail * usage.f_frsize, usage.f_blocks * usage.f_frsize


def allocate(file: Path, size: int) -> None:
    """Create a file of this size with allocated pages.

    Writing to a sparse file on a full tmpfs would end the process with SIGBUS in the middle of a copy; fallocate
    reports the lack of space before.

    Raises:
        OSError: there is no space (ENOSPC).
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(descriptor, size)
        if size:
            os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def map_file(file: Path, *, writable: bool = False) -> mmap.mmap:
    """A file's bytes in memory: shared if `writable`, otherwise writes stay private.

    Raises:
        UnusableError: it is missing or empty.
    """
    populate = mmap.MAP_POPULATE if writable else 0  # page faults one by one would halve the speed of the first copy
    try:
        descriptor = os.open(file, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW)
    except OSError as error:
        raise UnusableError(f"{file.name}: {error.strerror}") from None
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            raise UnusableError(f"{file.name} is empty")
        flags = mmap.MAP_SHARED | populate if writable else mmap.MAP_PRIVATE
        return mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)


def digest(content: Any) -> str:
    """xxh3_128 of a buffer.

    It detects every accident at the speed of memory; it is no protection against an attacker.
    """
    hashed = xxhash.xxh3_128()
    with memoryview(content) as view, view.cast("B") as octets:
        for begin in range(0, len(octets), _HASHED_AT_ONCE):  # in parts: other threads of the guard run in between
            with octets[begin : begin + _HASHED_AT_ONCE] as part:
                hashed.update(part)
    return hashed.hexdigest()


def file_digest(file: Path, size: int) -> str:
    """Digest of a file, which must have this size.

    Raises:
        UnusableError: it has not, or is missing.
    """
    if size == 0 and not file.exists():
        return digest(b"")
    with contextlib.closing(map_file(file)) as content:
        if len(content) != size:
            raise UnusableError(f"{file.name} has {len(content)} bytes instead of {size}")
        return digest(content)


# --- markers --------------------------------------------------------------------------------------------------------


def commit(folder: Path, slot: int, marker: Marker) -> None:
    """Mark a slot as complete, after everything else."""
    write_atomic(folder / f"commit.{slot}", marker.text(), mode=0o600, durable=False)


def uncommit(folder: Path, slot: int) -> None:
    """Mark a slot as incomplete, before any part of it is overwritten."""
    (folder / f"commit.{slot}").unlink(missing_ok=True)


def committed(folder: Path) -> tuple[dict[int, Marker], list[str]]:
    """Markers by slot, and the problems of the other slots."""
    markers, problems = {}, []
    for slot in SLOTS:
        try:
            markers[slot] = Marker.parse((folder / f"commit.{slot}").read_text(encoding="utf-8"))
        except OSError as error:
            if error.errno != errno.ENOENT:
                problems.append(f"slot {slot}: {error.strerror}")
            elif image_file(folder, slot).exists():
                problems.append(f"slot {slot} holds a torn snapshot")
        except (UnusableError, ValueError) as error:
            problems.append(f"slot {slot} has {error}")
    return markers, problems
