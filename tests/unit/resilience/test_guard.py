"""Who may talk to a guard, and what files it trusts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmscale.resilience import snapshot_files, wire
from mmscale.resilience.guard_link import own_address
from mmscale.resilience.snapshot_files import Marker, UnusableError
from mmscale.runtime.rank_env import RankEnv

TOKEN = b"t" * 32
PATIENCE_S = 300.0  # waits end early
MARKER = Marker(
    generation="g",
    attempt=1,
    serial=3,
    step=30,
    rank=1,
    members=(0, 1),
    lengths=(64, 128),
    digests=("a", "b"),
    parity_digest="c",
)


@pytest.fixture
def accepted() -> Iterator[tuple[tuple[str, int], list[object]]]:
    """An address where one connection is welcomed, and how that went."""
    found: list[object] = []
    with wire.listen("127.0.0.1") as listener:

        def welcome() -> None:
            connection, _ = listener.accept()
            try:
                found.append(wire.welcome(connection, token=TOKEN, timeout_s=PATIENCE_S))
                header = wire.receive(connection)
                assert header is not None
                payload = bytearray(header["size"])
                wire.receive_into(connection, memoryview(payload))
                found.append((header["what"], bytes(payload)))
                found.append(wire.receive(connection))
            except (wire.RefusedError, OSError) as error:
                found.append(error)
            finally:
                connection.close()

        thread = threading.Thread(target=welcome)
        thread.start()
        yield listener.getsockname(), found
        thread.join(timeout=PATIENCE_S)
        assert not thread.is_alive()


def test_frames_between_those_who_know_the_token(accepted: tuple[tuple[str, int], list[object]]) -> None:
    address, found = accepted
    with wire.connect(address, token=TOKEN, me=5, timeout_s=PATIENCE_S) as connection:
        wire.send(connection, {"what": "piece"}, memoryview(b"x" * 100_000))
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.name.startswith("Thread"):
            thread.join(timeout=PATIENCE_S)
    assert found == [5, ("piece", b"x" * 100_000), None]


def test_who_does_not_know_the_token_is_refused(accepted: tuple[tuple[str, int], list[object]]) -> None:
    address, found = accepted
    with pytest.raises((wire.RefusedError, OSError)):
        wire.connect(address, token=b"f" * 32, me=5, timeout_s=PATIENCE_S)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.name.startswith("Thread"):
            thread.join(timeout=PATIENCE_S)
    assert [type(entry) for entry in found] == [wire.RefusedError]


def test_a_listener_that_does_not_know_the_token_gets_nothing() -> None:
    """It cannot answer the challenge, whatever it says."""
    with wire.listen("127.0.0.1") as listener:

        def impostor() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(os.urandom(32))
                connection.recv(1 << 10)
                connection.sendall(os.urandom(32))

        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(wire.RefusedError, match="does not know the token"):
            wire.connect(listener.getsockname(), token=TOKEN, me=0, timeout_s=PATIENCE_S)
        thread.join()


def test_a_guard_without_a_trainer_leaves_nothing() -> None:
    """The trainer dies before it has said anything, or right after the first words."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-m", "mmscale.resilience.guard"], stdin=theirs.fileno())
    theirs.close()
    ours.close()
    assert process.wait(timeout=PATIENCE_S) == 0

    folder = snapshot_files.create_folder()
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-m", "mmscale.resilience.guard"], stdin=theirs.fileno())
    theirs.close()
    setup = {"folder": str(folder), "address": "127.0.0.1", "token": TOKEN.hex(), "hold_s": 0.1, "trainer": os.getpid()}
    ours.sendall(json.dumps(setup).encode() + b"\n")
    assert b"port" in ours.recv(1024)
    assert (folder / snapshot_files.SOCKET).exists()
    ours.close()
    assert process.wait(timeout=PATIENCE_S) == 0
    assert not folder.exists()


def test_a_marker_says_what_it_said() -> None:
    assert Marker.parse(MARKER.text()) == MARKER


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("step"),
        lambda content: content.update(more=1),
        lambda content: content.update(format=0),
        lambda content: content.update(members=[0]),
        lambda content: content.update(rank=7),
        lambda content: content.update(step="30"),
        lambda content: content.update(lengths=["64", "128"]),
        lambda content: content.update(digests=None),
    ],
)
def test_a_marker_that_is_none(change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(MARKER.text())
    change(content)
    with pytest.raises(UnusableError, match="a commit marker"):
        Marker.parse(json.dumps(content))


def test_only_private_folders_of_our_own_are_trusted(tmp_path: Path) -> None:
    folder = snapshot_files.create_folder(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert snapshot_files.existing_folder(folder.name, tmp_path) == folder
    folder.chmod(0o750)
    assert snapshot_files.existing_folder(folder.name, tmp_path) is None
    link = tmp_path / f"mmscale-{'0' * 32}"
    folder.chmod(0o700)
    link.symlink_to(folder)
    assert snapshot_files.existing_folder(link.name, tmp_path) is None
    for name in ("mmscale-x", f"../{tmp_path.name}/{folder.name}", "mmscale-" + "0" * 31, ""):
        assert snapshot_files.existing_folder(name, tmp_path) is None


def test_files_have_pages_before_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "image.0"
    snapshot_files.allocate(file, 1 << 20)
    found = file.stat()
    assert found.st_blocks * 512 >= 1 << 20 and found.st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match=r"No space|too large|Invalid"):
        snapshot_files.allocate(tmp_path / "image.1", 1 << 60)
    with pytest.raises(UnusableError, match="No such file"):
        snapshot_files.map_file(tmp_path / "image.7")
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(UnusableError):
        snapshot_files.map_file(tmp_path / "link")


def test_guards_of_one_node_listen_on_loopback_and_others_where_they_can_be_reached() -> None:
    assert own_address(RankEnv(rank=0, world_size=2), ["a", "a"]) == "127.0.0.1"
    # A route leads to a public address wherever this machine has a network at all; nothing is sent to it.
    env = RankEnv(rank=0, world_size=2, master_addr="192.0.2.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            wanted = probe.getsockname()[0]
        except OSError:
            wanted = "127.0.0.1"
    assert own_address(env, ["a", "b"]) == wanted
    assert own_address(RankEnv(rank=0, world_size=2, master_addr="localhost"), ["a", "127.0.0.1"]) == "127.0.0.1"
