"""Sends the tensors of several ranks of one node into one file (`checkpoint.writers`).

The first rank of a group writes the file and hashes it as one stream. The others send it their bytes through a socket
of the node, one rank after the other, and receive their offsets in the file. This module handles bytes only; write.py
defines their content, saving.py the schedule.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import secrets
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmscale import bounded
from mmscale.errors import SaveError
from mmscale.runtime.groups import gathered

# Prefix of the reason of a rank that failed only because another one did.
ELSEWHERE = "another rank's part failed: "
_ORIGIN = re.compile(re.escape(ELSEWHERE) + r"rank (\d+): (.+)", re.DOTALL)
# Length of the next piece; 0 ends a part, a negative number is the length of a message about a failure.
_LENGTH = struct.Struct("<q")
_NUMBERS = struct.Struct("<i")
_CHUNK = 4 << 20
_BUFFER = 1 << 20


def origin(reason: str) -> tuple[int, str] | None:
    """The rank that failed first and its reason, from the message of a rank that failed as a result; None: unknown."""
    found = _ORIGIN.fullmatch(reason)
    return (origin(found[2]) or (int(found[1]), found[2])) if found else None


@dataclass(frozen=True)
class Group:
    """Ranks of one node that share one file for their tensors.

    Attributes:
        ranks: ascending; the first one writes.
        address: name of their sockets, which only processes on this node can reach.
    """

    ranks: tuple[int, ...]
    address: str

    @property
    def first(self) -> int:
        """The rank that writes."""
        return self.ranks[0]


def agree(writers: int) -> Group | None:
    """The group of this rank; None if it writes its own files. A collective.

    Args:
        writers: groups on each node; 0: every rank writes its own files.
    """
    if writers == 0:
        return None
    rank = torch.distributed.get_rank()
    found = gathered((_node(), secrets.token_hex(8)))
    here = [other for other, (node, _) in enumerate(found) if node == found[rank][0]]
    (ranks,) = (part for part in split(here, writers) if rank in part)
    return Group(ranks, f"\0mmscale-save-{found[ranks[0]][1]}") if len(ranks) > 1 else None


def split(ranks: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """Divides ranks into so many parts of neighbours of nearly equal size; fewer parts if there are fewer ranks."""
    parts = min(parts, len(ranks))
    ends = [len(ranks) * part // parts for part in range(parts + 1)]
    return [tuple(ranks[begin:end]) for begin, end in itertools.pairwise(ends)]


def _node() -> tuple[str, int]:
    """Equal on two ranks if they can connect through such a socket: the same kernel and network namespace."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(), Path("/proc/self/ns/net").stat().st_ino


class Listener:
    """The writing rank's end of the sockets. It must exist before other ranks send.

    Args:
        group: of this rank.
        number: of the save; connections of earlier saves are refused.
    """

    def __init__(self, group: Group, number: int) -> None:
        self.group = group
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"{group.address}.{number}")
        self._socket.listen(len(group.ranks))
        self._peers: dict[int, socket.socket] = {}

    def accept(self, *, timeout_s: float) -> None:
        """Wait for all other ranks of the group.

        Raises:
            SaveError: one does not connect in time, or another process connects.
        """
        self._socket.settimeout(timeout_s)
        while len(self._peers) < len(self.group.ranks) - 1:
            try:
                peer, _ = self._socket.accept()
            except TimeoutError:
                missing = sorted(set(self.group.ranks[1:]) - set(self._peers))
                raise SaveError(f"{ELSEWHERE}nothing from rank {missing[0]}") from None
            peer.settimeout(timeout_s)
            if _user(peer) != os.getuid():
                peer.close()
                continue
            try:
                (rank,) = _NUMBERS.unpack(_receive(peer, _NUMBERS.size))
            except (EOFError, ConnectionError):
                raise SaveError(f"{ELSEWHERE}a rank of this node has ended") from None
            self._peers[rank] = peer

    def copy(self, rank: int, write: Callable[[memoryview], Any]) -> None:
        """Pass on the next part of a rank to `write`.

        Raises:
            SaveError: the rank failed to send it.
            OSError: it could not be written.
        """
        peer = self._peers[rank]
        buffer = memoryview(bytearray(_CHUNK))
        while (length := self._length(rank)) != 0:
            while length > 0:
                received = peer.recv_into(buffer, min(length, _CHUNK))
                if received == 0:
                    raise SaveError(f"{ELSEWHERE}rank {rank} has ended")
                write(buffer[:received])
                length -= received

    def _length(self, rank: int) -> int:
        try:
            (length,) = _LENGTH.unpack(_receive(self._peers[rank], _LENGTH.size))
            if length < 0:
                reason = _receive(self._peers[rank], -length).decode(errors="replace")
                raise SaveError(f"{ELSEWHERE}rank {rank}: {reason}")
        except (EOFError, ConnectionError):
            raise SaveError(f"{ELSEWHERE}rank {rank} has ended") from None
        return int(length)

    def answer(self, **message: Any) -> None:
        """Send the result to all connected ranks."""
        for peer in self._peers.values():
            try:
                peer.sendall(json.dumps(message).encode() + b"\n")
            except OSError:  # the rank has ended and does not need the answer
                continue

    def close(self) -> None:
        """Close the sockets of this process. Does not wait for processes that have ended."""
        for opened in (*self._peers.values(), self._socket):
            opened.close()


class _Sending(io.RawIOBase):
    """A stream to the writing rank."""

    def __init__(self, peer: socket.socket, on_write: Callable[[int], None]) -> None:
        super().__init__()
        self._peer = peer
        self._on_write = on_write
        self._size = 0

    def writable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """Bytes sent so far."""
        return self._size

    def write(self, data: Any) -> int:
        """Send all of it."""
        view = memoryview(data).cast("B")
        self._on_write(view.nbytes)
        if view.nbytes:  # an empty piece would end the part
            self._peer.sendall(_LENGTH.pack(view.nbytes))
            self._peer.sendall(view)
        self._size += view.nbytes
        return view.nbytes


def send(
    group: Group,
    number: int,
    rank: int,
    parts: Iterable[Callable[[io.BufferedWriter[Any]], None]],
    *,
    on_write: Callable[[int], None],
    timeout_s: float,
) -> dict[str, Any]:
    """Send parts to the writing rank of a group.

    Args:
        group: of this rank.
        number: of the save.
        rank: this one.
        parts: each writes to a stream; the same number on every rank.
        on_write: called before every piece with its size in bytes.
        timeout_s: how long the other side may take for a piece, or for its answer.

    Returns:
        The writing rank's answer.

    Raises:
        SaveError: the writing rank, or another one, failed.
        OSError: this rank's own part failed.
    """
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(timeout_s)
        try:
            peer.connect(f"{group.address}.{number}")
            if _user(peer) != os.getuid():
                raise SaveError("the socket of this node's writer belongs to another user")
            peer.sendall(_NUMBERS.pack(rank))
            for part in parts:
                _send_part(peer, part, on_write)
        except (ConnectionError, TimeoutError):
            pass  # the other side has ended; it may have sent a reason
        except OSError as error:
            _send_failure(peer, error)
            raise
        return _answer(peer, group)


def _send_part(peer: socket.socket, part: Callable[[Any], None], on_write: Callable[[int], None]) -> None:
    raw = _Sending(peer, on_write)
    try:
        stream = io.BufferedWriter(raw, _BUFFER)
        part(stream)
        stream.flush()
    finally:
        raw.close()
    peer.sendall(_LENGTH.pack(0))


def _send_failure(peer: socket.socket, error: OSError) -> None:
    reason = f"{error.strerror or error or type(error).__name__}".encode()
    try:
        peer.sendall(_LENGTH.pack(-len(reason)) + reason)
    except OSError:
        return


def _answer(peer: socket.socket, group: Group) -> dict[str, Any]:
    line = b""
    try:
        while not line.endswith(b"\n"):
            received = peer.recv(_CHUNK)
            if not received:
                break
            line += received
    except OSError:  # it has ended, or was never connected
        pass
    if not line.endswith(b"\n"):
        raise SaveError(f"{ELSEWHERE}rank {group.first}, which writes this rank's tensors, has ended")
    answer: dict[str, Any] = bounded.parse_json(line)
    if "problem" in answer:
        raise SaveError(f"{ELSEWHERE}rank {group.first}: {answer['problem'].removeprefix(ELSEWHERE)}")
    return answer


def _receive(peer: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = peer.recv(size - len(received))
        if not part:
            raise EOFError
        received += part
    return received


def _user(peer: socket.socket) -> int:
    return struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[1]
