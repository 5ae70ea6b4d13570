"""The trainer's side of a guard: starts it, sends orders, reads answers, and ends it.

guard.py is the guard itself; memory_tier.py decides when to take snapshots. No torch.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.resilience import guard, snapshot_files
from mmscale.resilience.snapshot_files import UnusableError
from mmscale.runtime.rank_env import RankEnv

_START_S = 60.0
_ORDER_S = 10.0  # for a few hundred bytes into a socket pair
_ANY_PORT = 9


class GuardLink:
    """A guard's process and the socket pair to it.

    Args:
        root: folder for its folder.
        address: of this node, on which it listens for its peers.
        token: random secret that peers must know.
        hold_s: how long it keeps its folder without a trainer [seconds].

    Raises:
        OSError, UnusableError: it does not start.
    """

    def __init__(self, root: Path, *, address: str, token: bytes, hold_s: float) -> None:
        self.folder = snapshot_files.create_folder(root)
        self.problem = ""  # reason why the guard is no longer usable
        self.last: dict[str, float] = {}
        self._lines = b""
        self._ordered = self._committed = 0
        self._since = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._control, theirs = socket.socketpair()
        log = os.open(self.folder / snapshot_files.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", guard.__name__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # a signal to this rank's process group must not end the guard
            )
            setup = {
                "folder": str(self.folder),
                "address": address,
                "token": token.hex(),  # through a socket pair: other users could read arguments, but not this
                "hold_s": hold_s,
                "trainer": os.getpid(),
            }
            self._control.sendall(json.dumps(setup).encode() + b"\n")
            theirs.close()
            self.port = 0
            deadline = time.monotonic() + _START_S
            while not self.port and not self.problem and time.monotonic() < deadline:
                self._read(deadline - time.monotonic())
            if not self.port:
                raise UnusableError(self.problem or "it did not answer")
        except BaseException:
            theirs.close()
            self.finish(within_s=0.0)
            raise
        finally:
            os.close(log)

    @property
    def pending_s(self) -> float:
        """Time since the newest snapshot without a commit; 0 if it is committed."""
        return 0.0 if self._ordered == self._committed else max(time.monotonic() - self._since, 1e-9)

    def order(self, order: str, **fields: Any) -> None:
        """Send an order to the guard; `listen` detects a dead one."""
        with contextlib.suppress(OSError):
            self._control.settimeout(_ORDER_S)
            self._control.sendall(json.dumps({"order": order, **fields}).encode() + b"\n")

    def order_snapshot(self, *, serial: int, slot: int, step: int, length: int) -> None:
        """Tell the guard that a slot has been written, so that it hashes, exchanges parity and commits.

        Args:
            serial: number of the order, larger for each later one.
            slot: which of the two.
            step: optimizer steps done.
            length: of the image [bytes].
        """
        self._ordered, self._since = serial, time.monotonic()
        self.order("snapshot", serial=serial, slot=slot, step=step, length=length)

    def listen(self, *, until_committed_s: float = 0.0) -> None:
        """Read the guard's messages; wait up to this time for a commit."""
        deadline = time.monotonic() + until_committed_s
        while not self.problem and self._read(max(0.0, deadline - time.monotonic()) if self.pending_s else 0.0):
            pass

    def _read(self, timeout_s: float) -> bool:
        """Poll the socket once; returns whether a message arrived."""
        self._control.settimeout(timeout_s)
        try:
            received = self._control.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return False
        except OSError:
            received = b""
        if not received:
            self.problem = self.problem or f"the guard died: {self._last_log_line()}"
            return False
        *lines, self._lines = (self._lines + received).split(b"\n")
        for line in lines:
            said = bounded.parse_json(line)
            if "port" in said:
                self.port = int(said["port"])
            elif "failed" in said:
                self.problem = f"a snapshot failed: {said['reason']}"
            elif "committed" in said:
                self._committed, self.last = int(said["committed"]), said
        return True

    def _last_log_line(self) -> str:
        try:
            lines = (self.folder / snapshot_files.LOG).read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "it left no message"

    def finish(self, *, within_s: float = 10.0) -> None:
        """End the guard and its folder; if the guard does not react, the folder is removed here."""
        self.order("finish")
        self._control.close()
        if self._process is not None:
            try:
                self._process.wait(timeout=within_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        snapshot_files.remove_folder(self.folder)


def own_address(env: RankEnv, nodes: list[str]) -> str:
    """This node's address on the network that leads to the others.

    Args:
        env: place of this rank.
        nodes: host name of each rank's node.
    """
    others = [node for node in dict.fromkeys(nodes) if node != nodes[env.rank]]
    for host in (env.master_addr, *others[:8]) if others else ():
        with contextlib.suppress(OSError):
            family, kind, _, _, target = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(target)  # sends nothing: queries the routing table
                found = str(probe.getsockname()[0])
            if not ipaddress.ip_address(found).is_loopback:  # on many hosts the own name resolves to 127.0.1.1
                return found
    return "127.0.0.1"
