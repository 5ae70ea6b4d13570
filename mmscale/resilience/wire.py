"""Connections between guards: both ends prove that they know the run's token, then send frames of bytes.

No pickle, and every wait has a timeout. `multiprocessing.connection` has the same handshake but no timeouts: a client
that connects and sends nothing would block its accept for ever. Frames are neither encrypted nor signed.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import socket
import struct
from typing import Any

from mmscale import bounded

HANDSHAKE_S = 10.0
_NONCE = 32
_ME = struct.Struct("<I")
_HEADER = struct.Struct("<I")
_MOST_HEADER = 1 << 20


class RefusedError(Exception):
    """The other end does not know the token, or does not use this protocol."""


def listen(address: str) -> socket.socket:
    """A listening socket on a free port of one address of this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(64)
    return listener


def connect(address: tuple[str, int], *, token: bytes, me: int, timeout_s: float) -> socket.socket:
    """Connect to a guard; both ends prove that they know the token.

    Args:
        address: host and port of the guard.
        token: secret that all guards of the run know.
        me: number of this member in its group.
        timeout_s: limit of each later send and receive [seconds].

    Raises:
        RefusedError, OSError: there is no listener, or it is not a guard of this run.
    """
    connection = socket.create_connection(address, timeout=HANDSHAKE_S)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        theirs = _exactly(connection, _NONCE)
        mine, name = os.urandom(_NONCE), _ME.pack(me)
        connection.sendall(mine + name + _proof(token, b"connect", theirs, mine, name))
        if not hmac.compare_digest(_exactly(connection, _NONCE), _proof(token, b"accept", mine, theirs, name)):
            raise RefusedError(f"{address} does not know the token of this run")
        connection.settimeout(timeout_s)
        return connection
    except BaseException:
        connection.close()
        raise


def welcome(connection: socket.socket, *, token: bytes, timeout_s: float) -> int:
    """The other end of `connect`; returns the member's number.

    Raises:
        RefusedError, OSError: it is not a guard of this run. The connection is closed then.
    """
    try:
        connection.settimeout(HANDSHAKE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mine = os.urandom(_NONCE)
        connection.sendall(mine)
        theirs, name = _exactly(connection, _NONCE), _exactly(connection, _ME.size)
        if not hmac.compare_digest(_exactly(connection, _NONCE), _proof(token, b"connect", mine, theirs, name)):
            raise RefusedError("a connection that does not know the token of this run")
        connection.sendall(_proof(token, b"accept", theirs, mine, name))
        connection.settimeout(timeout_s)
        return int(_ME.unpack(name)[0])
    except BaseException:
        connection.close()
        raise


def send(connection: socket.socket, header: dict[str, Any], payload: memoryview) -> None:
    """Send one frame: a small JSON header with the payload's size as "size", and the payload, which is not copied."""
    text = json.dumps({**header, "size": len(payload)}).encode()
    connection.sendall(_HEADER.pack(len(text)) + text)
    connection.sendall(payload)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Wait without a timeout for the next frame's header; None at the end. Read the payload with `receive_into`.

    Raises:
        RefusedError, OSError: the frame is malformed, or the connection broke.
    """
    timeout_s = connection.gettimeout()
    connection.settimeout(None)
    first = connection.recv(1)
    if not first:
        return None
    connection.settimeout(timeout_s)
    (size,) = _HEADER.unpack(first + _exactly(connection, _HEADER.size - 1))
    if size > _MOST_HEADER:
        raise RefusedError("a frame with a header of impossible size")
    header = bounded.parse_json(_exactly(connection, size))
    if not isinstance(header, dict):
        raise RefusedError("a frame without a header")
    return header


def receive_into(connection: socket.socket, buffer: memoryview) -> None:
    """Fill a buffer.

    Raises:
        ConnectionError: the other end is gone before it is full.
    """
    filled = 0
    while filled < len(buffer):
        count = connection.recv_into(buffer[filled:])
        if not count:
            raise ConnectionError("the other end is gone")
        filled += count


def close(connection: socket.socket) -> None:
    """Close, whatever state it is in."""
    with contextlib.suppress(OSError):
        connection.close()


def _exactly(connection: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    receive_into(connection, memoryview(buffer))
    return bytes(buffer)


def _proof(token: bytes, role: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token, role + b"".join(parts), "sha256")
