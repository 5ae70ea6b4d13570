"""The guard of a rank's snapshots: a separate process, so that snapshots and the work on them outlive the trainer.

    python -m mmscale.resilience.guard        started by memory_tier.py, with one end of a socket pair as stdin

The trainer copies its state into a slot and continues training. The guard hashes the slot, exchanges parity with the
guards of its group, and commits it. When its trainer is gone it keeps the folder until a newer attempt has taken over,
or for `hold_s` seconds. restore.py restores snapshots and decides which may be restored. No torch: a guard starts in a
fraction of a second and takes a few MB.

Trainer to guard, one JSON object per line: "setup" (first, with the token), "group" (peers' addresses; again when the
images' sizes change), "snapshot", "finish". Guard to trainer: "port", "committed", "failed".
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmscale import bounded
from mmscale.resilience import parity, snapshot_files, wire
from mmscale.resilience.snapshot_files import Marker, UnusableError

_log = logging.getLogger(__name__)
_FRAME = 4 << 20  # bytes received before they are XORed: they stay in the cache
_ENDED, _ALIVE = b"ended\n", b"alive\n"


@dataclass
class _Group:
    """The parity group, as agreed on by its trainers."""

    generation: str
    attempt: int
    epoch: int
    rank: int
    members: list[int]
    me: int
    addresses: list[list[Any]]
    chunk: int
    timeout_s: float


@dataclass
class _Incoming:
    """The parity of one snapshot while it is received."""

    serial: int
    slot: int
    parity: parity.Bytes
    lengths: dict[int, int] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)


class Guard:
    """One rank's guard; `serve` returns when there is nothing left to guard.

    Args:
        control: the trainer's end of the socket pair.
        parent: file descriptor that becomes readable when the trainer is gone; None if the kernel has no such
            descriptor.
    """

    def __init__(self, control: socket.socket, parent: int | None) -> None:
        self.control = control
        self.parent = parent
        self.folder = Path()
        self.hold_s = 0.0
        self.token = b""
        self.group: _Group | None = None
        self._incoming: _Incoming | None = None
        self._changed = threading.Condition()
        self._outgoing: dict[int, socket.socket] = {}
        self._sending = threading.Lock()
        self._lines = b""

    def serve(self) -> None:
        """Carry out the trainer's orders; after its end, wait until a newer attempt takes over or the time is up."""
        setup = self._first_order()
        if setup is None:
            return
        self.folder, self.hold_s = Path(setup["folder"]), float(setup["hold_s"])
        if os.getppid() != setup["trainer"]:
            self.parent = None  # it is gone already: this descriptor belongs to the process that adopted this one
        self.token = bytes.fromhex(setup["token"])
        try:
            with wire.listen(setup["address"]) as peers, self._successors() as successors:
                self._send({"port": peers.getsockname()[1]})
                self._loop(peers, successors)
        finally:
            snapshot_files.remove_folder(self.folder)

    # --- the trainer ------------------------------------------------------------------------------------------------

    def _first_order(self) -> dict[str, Any] | None:
        while b"\n" not in self._lines:
            if not self._read_control():
                return None
        line, _, self._lines = self._lines.partition(b"\n")
        setup: dict[str, Any] = bounded.parse_json(line)
        return setup

    def _read_control(self) -> bool:
        try:
            received = self.control.recv(1 << 16)
        except OSError:
            received = b""
        self._lines += received
        return bool(received)

    def _send(self, message: dict[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError):  # a trainer that is gone needs no answer
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def _loop(self, peers: socket.socket, successors: socket.socket) -> None:
        deadline: float | None = None  # None while the trainer is alive
        with selectors.DefaultSelector() as selector:
            for source in (self.control, peers, successors):
                selector.register(source, selectors.EVENT_READ)
            if self.parent is not None:
                selector.register(self.parent, selectors.EVENT_READ)
            while deadline is None or time.monotonic() < deadline:
                for key, _ in selector.select(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    if key.fileobj is peers:
                        connection, _ = peers.accept()
                        threading.Thread(target=self._receive, args=(connection,), daemon=True).start()
                    elif key.fileobj is successors:
                        if self._hand_over(successors, alive=deadline is None):
                            return
                    elif key.fileobj is self.control and self._read_control():
                        if self._handle_orders():
                            return
                    elif deadline is None:  # the end of the control socket, or of the parent
                        deadline = time.monotonic() + self.hold_s
                        selector.unregister(self.control)
                        if self.parent is not None:
                            selector.unregister(self.parent)
                        break

    def _handle_orders(self) -> bool:
        """Carry out the complete lines; returns whether to end."""
        *lines, self._lines = self._lines.split(b"\n")
        for line in lines:
            order = bounded.parse_json(line)
            kind = order.pop("order")
            if kind == "finish":
                return True
            if kind == "group":
                self._join(_Group(**order))
            elif kind == "snapshot":
                # The trainer orders one snapshot at a time, so there is only one of these threads.
                threading.Thread(target=functools.partial(self._snapshot, **order), daemon=True).start()
        return False

    def _join(self, group: _Group) -> None:
        with self._changed:
            self.group, self._incoming = group, None
            self._changed.notify_all()
        self._disconnect()

    # --- a newer attempt --------------------------------------------------------------------------------------------

    def _successors(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.folder / snapshot_files.SOCKET))  # in a folder that only this user can enter
        listener.listen(8)
        return listener

    def _hand_over(self, successors: socket.socket, *, alive: bool) -> bool:
        connection, _ = successors.accept()
        with connection, contextlib.suppress(OSError):
            if not alive:
                snapshot_files.remove_folder(self.folder)
            connection.sendall(_ALIVE if alive else _ENDED)
        return not alive

    # --- a snapshot -------------------------------------------------------------------------------------------------

    def _snapshot(self, *, serial: int, slot: int, step: int, length: int) -> None:
        group = self.group
        assert group is not None
        try:
            self._send({"committed": serial, **self._work(group, serial=serial, slot=slot, step=step, length=length)})
        except (OSError, UnusableError, wire.RefusedError) as error:
            self._disconnect()
            self._send({"failed": serial, "reason": f"{type(error).__name__}: {error}"})

    def _work(self, group: _Group, *, serial: int, slot: int, step: int, length: int) -> dict[str, float]:
        began = time.monotonic()
        with contextlib.closing(snapshot_files.map_file(snapshot_files.image_file(self.folder, slot))) as content:
            if len(content) != length:
                raise UnusableError(f"an image of {len(content)} bytes instead of {length}")
            digest = snapshot_files.digest(content)
            hashed = time.monotonic()
            incoming = self._begin(group, serial, slot)
            self._note(incoming, group.me, length, digest)
            for distance in range(1, len(group.members)):
                other = (group.me + distance) % len(
                    group.members
                )  # spread, so that not all send to the same guard at once
                part = parity.piece(member=group.me, stripe=other, length=length, chunk=group.chunk)
                header = {"epoch": group.epoch, "serial": serial, "slot": slot, "length": length}
                with memoryview(content) as view, view[part] as payload:
                    wire.send(self._connection(group, other), {**header, "digest": digest}, payload)
        self._wait_for(incoming, group)
        exchanged = time.monotonic()
        marker = Marker(
            generation=group.generation,
            attempt=group.attempt,
            serial=serial,
            step=step,
            rank=group.rank,
            members=tuple(group.members),
            lengths=tuple(incoming.lengths[member] for member in range(len(group.members))),
            digests=tuple(incoming.digests[member] for member in range(len(group.members))),
            parity_digest=snapshot_files.digest(incoming.parity),
        )
        snapshot_files.commit(self.folder, slot, marker)
        return {"digest_s": hashed - began, "exchange_s": exchanged - hashed}

    def _begin(self, group: _Group, serial: int, slot: int) -> _Incoming:
        """The parity of a snapshot, created when it is first requested: by the own trainer or by a faster peer."""
        with self._changed:
            known = self._incoming
            if known is not None and known.serial == serial:
                return known
            snapshot_files.uncommit(self.folder, slot)
            if group.chunk:
                mapped = snapshot_files.map_file(snapshot_files.parity_file(self.folder, slot), writable=True)
                content = np.frombuffer(mapped, np.uint8)
                if content.size != group.chunk:
                    raise UnusableError(f"parity of {content.size} bytes instead of {group.chunk}")
                content[:] = 0
            else:
                content = np.zeros(0, np.uint8)
            self._incoming = _Incoming(serial, slot, content)
            return self._incoming

    def _note(self, incoming: _Incoming, member: int, length: int, digest: str) -> None:
        with self._changed:
            incoming.lengths[member], incoming.digests[member] = length, digest
            self._changed.notify_all()

    def _wait_for(self, incoming: _Incoming, group: _Group) -> None:
        def is_complete() -> bool:
            return len(incoming.digests) == len(group.members) or self.group is not group

        with self._changed:
            if not self._changed.wait_for(is_complete, timeout=group.timeout_s) or self.group is not group:
                absent = [rank for member, rank in enumerate(group.members) if member not in incoming.digests]
                raise UnusableError(f"no parity came from the guards of ranks {absent}")

    # --- peers ------------------------------------------------------------------------------------------------------

    def _connection(self, group: _Group, member: int) -> socket.socket:
        if member not in self._outgoing:
            host, port = group.addresses[member]
            self._outgoing[member] = wire.connect(
                (host, port), token=self.token, me=group.me, timeout_s=group.timeout_s
            )
        return self._outgoing[member]

    def _disconnect(self) -> None:
        for connection in self._outgoing.values():
            wire.close(connection)
        self._outgoing.clear()

    def _receive(self, connection: socket.socket) -> None:
        """Receive everything that one peer sends while it is alive. On any error the connection is closed."""
        with connection:
            try:
                member = wire.welcome(connection, token=self.token, timeout_s=self.hold_s)
                scratch = np.empty(_FRAME, np.uint8)
                while (header := wire.receive(connection)) is not None:
                    self._receive_piece(connection, member, header, scratch)
            except (OSError, ValueError, KeyError, TypeError, wire.RefusedError, UnusableError) as error:
                _log.warning("a connection from another guard: %s: %s", type(error).__name__, error)

    def _receive_piece(
        self, connection: socket.socket, member: int, header: dict[str, Any], scratch: parity.Bytes
    ) -> None:
        with self._changed:  # a peer may be ahead of the own trainer, which has not yet sent the group's members
            self._changed.wait_for(
                lambda: self.group is not None and self.group.epoch >= header["epoch"], timeout=self.hold_s
            )
            group = self.group
        if group is None or group.epoch != header["epoch"]:
            raise wire.RefusedError("a piece for images of other sizes")
        size = int(header["size"])
        others = set(range(len(group.members))) - {group.me}
        if not 0 <= size <= group.chunk or size % parity.ALIGN or member not in others:
            raise wire.RefusedError("a piece that does not fit")
        incoming = self._begin(group, int(header["serial"]), int(header["slot"]))
        view = scratch.data
        for begin in range(0, size, _FRAME):
            count = min(_FRAME, size - begin)
            wire.receive_into(connection, view[:count])
            with self._changed:  # pieces of two peers overlap
                parity.xor_into(incoming.parity[begin:], scratch[:count])
        self._note(incoming, member, int(header["length"]), str(header["digest"]))


def end(folder: Path) -> bool:
    """End a folder's guard and remove the folder. If the guard is dead already, the folder is removed here.

    Returns:
        False: its trainer is alive, and nothing was done.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10.0)
        try:
            connection.connect(str(folder / snapshot_files.SOCKET))
            if connection.recv(len(_ALIVE)) == _ALIVE:
                return False
        except OSError:
            pass
    snapshot_files.remove_folder(folder)
    return True


def main() -> None:
    """Run as the guard of the process that started this one."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(
            number, signal.SIG_IGN
        )  # signals that end a job's trainers must not end the snapshots it would resume from
    try:
        parent = os.pidfd_open(os.getppid())
    except OSError:
        parent = None  # the end of the socket pair shows it too, unless children of the trainer keep it open
    Guard(socket.socket(fileno=os.dup(sys.stdin.fileno())), parent).serve()
    os._exit(0)  # threads that wait for peers are not joined


if __name__ == "__main__":
    main()
