# Runs the real command: as forked ranks of this process if that is sufficient, otherwise as `python -m mmscale`. A
# started command costs 6 s of imports per rank, a forked one 0.1 s; both call mmscale.cli.main.
"""Commands of the end-to-end tests."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import INFO, Store, info_text
from mmscale.runs.metrics import read_metrics
from mmscale.runtime.rank_env import STORE_FD, listen, port_of
from tests.end_to_end import isolated
from tests.support import spoken

AFTER_A_FAILURE_S = 120.0  # time for the other ranks to end after one has failed

ROOT = Path(__file__).parents[2]
MARK = "MMSCALE_TEST_COMMAND"


@dataclass(frozen=True)
class Ended:
    """The result of a command.

    Attributes:
        status: exit status.
        out, err: output of rank 0.
        others: output of the other ranks.
    """

    status: int
    out: str
    err: str
    others: str = ""


def mmscale(*arguments: str | Path, nproc: int = 1, timeout_s: float = 300.0) -> Ended:
    """`mmscale ARGUMENTS` as forked ranks, with the environment of ranks of `--nproc`."""
    if arguments[:2] == ("convert", "to-hf"):
        isolated.start()
    folder = Path(tempfile.mkdtemp(prefix="mmscale-forked-"))
    pids = fork_all([str(argument) for argument in arguments], nproc, folder)
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(statuses) < nproc:
            for rank, pid in enumerate(pids):
                if rank not in statuses and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    statuses[rank] = os.waitstatus_to_exitcode(ended[1])
            if any(statuses.values()):  # as in the launcher, the others have some time to end by themselves
                deadline = min(deadline, time.monotonic() + AFTER_A_FAILURE_S)
            if time.monotonic() > deadline:
                texts = {file.name: file.read_text() for file in folder.iterdir()}
                raise AssertionError(
                    f"{arguments}: ranks {set(range(nproc)) - set(statuses)} hang: {statuses}\n{texts}"
                )
            time.sleep(0.005)
    finally:
        for rank, pid in enumerate(pids):
            if rank not in statuses:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
        texts = {file.name: file.read_text() for file in folder.iterdir()}
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    texts = {name: spoken(text) if name.endswith(".err") else text for name, text in texts.items()}
    others = "".join(text for name, text in sorted(texts.items()) if not name.startswith("0."))
    assert len(set(statuses.values())) == 1, f"{statuses}\n{texts}"
    return Ended(statuses[0], texts["0.out"], texts["0.err"], others)


def ok(*arguments: str | Path, nproc: int = 1, timeout_s: float = 300.0) -> str:
    """The output of `mmscale ARGUMENTS`, which must succeed."""
    ended = mmscale(*arguments, nproc=nproc, timeout_s=timeout_s)
    assert ended.status == 0, ended
    return ended.out


def losses(run: Path) -> dict[int, float]:
    """The training loss of every step of a run."""
    return {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}


def assert_goes_on_alike(
    whole: Path, folder: Path, settings: Sequence[str | Path], *, at: int, change: str = ""
) -> Path:
    """Train to a step, go on to the end, and compare losses with those of a run that was not interrupted.

    Args:
        whole: the uninterrupted run.
        folder: run.dir of the new one.
        settings: arguments of `mmscale train` that `whole` had.
        at: the step, of which a checkpoint is kept.
        change: a setting of two ranks for the rest; losses are then equal to rounding. Empty: one rank and equal bits.

    Returns:
        The new run.
    """
    ok("train", *settings, f"run.dir={folder}", f"train.steps={at}")
    ok("train", *settings, f"run.dir={folder}", *([change] if change else []), nproc=2 if change else 1)
    wanted, found = losses(whole), losses(folder / whole.name)
    assert found.keys() == wanted.keys(), (sorted(found), sorted(wanted))
    for step, loss in wanted.items():
        assert found[step] == (pytest.approx(loss, rel=1e-5) if change else loss), (change, step, found[step], loss)
    return folder / whole.name


def fork_all(arguments: list[str], nproc: int, folder: Path) -> list[int]:
    """Fork every rank; rank 0 alone keeps the socket that listens for the others."""
    _import_what_forks_need(next(iter(arguments), ""))
    with listen() as listener:
        return [fork(arguments, rank, nproc, listener, folder) for rank in range(nproc)]


def _import_what_forks_need(command: str) -> None:
    """Once here, instead of once in every fork."""
    import mmscale.cli
    import mmscale.inference.evaluate
    import mmscale.train.proof.verify_layout
    import mmscale.train.run

    if command in ("convert", "eval", "sample"):
        import checkpoints_tools.huggingface.evaluate_export
        import checkpoints_tools.huggingface.from_hf
        import checkpoints_tools.huggingface.generator
        import checkpoints_tools.huggingface.to_hf  # noqa: F401
    mmscale.cli.parser()


def fork(arguments: list[str], rank: int, nproc: int, listener: socket.socket, folder: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    port = port_of(listener)
    if rank:
        listener.close()
    else:
        os.environ[STORE_FD] = str(listener.fileno())
    status = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        if nproc > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), MMSCALE_LAUNCHER="local")
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        import gc

        from mmscale.cli import main

        sys.argv = ["mmscale", *arguments]  # the arguments with which `--nproc` starts its ranks

        gc.freeze()
        isolated.use()
        status = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@dataclass
class Started:
    """A real command that is still running."""

    process: subprocess.Popen[str]
    mark: str

    def processes(self) -> list[int]:
        """Every process that it started, and their children, as long as they are alive."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                try:
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def left_behind(self, *, within_s: float = 300.0) -> list[int]:
        """Processes that are still alive after its end; a killed process disappears shortly after the signal."""
        deadline = time.monotonic() + within_s
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        wanted = f"RANK={number}".encode()
        parents = {pid: int(_stat(pid)[1]) for pid in self.processes()}
        (pid,) = (
            pid
            for pid, parent in parents.items()
            if parent == self.process.pid and wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        )
        return pid

    def until(self, condition: Callable[[], bool], *, timeout_s: float = 300.0) -> None:
        """Wait until a condition holds while it runs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended early: {self.process.communicate()}"
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.01)

    def end(self, *, timeout_s: float = 300.0) -> Ended:
        """Wait for its end."""
        out, err = self.process.communicate(timeout=timeout_s)
        return Ended(self.process.returncode, out, spoken(err))


def _stat(pid: int) -> list[str]:
    """State, parent, ... of a process: the fields after its name, which may contain any characters."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def start(*arguments: str | Path, environ: dict[str, str] | None = None) -> Started:
    """Start `python -m mmscale ARGUMENTS` as a real process."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environ or {}), MARK: mark}
    command = [sys.executable, "-m", "mmscale", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return Started(process, mark)


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content: equal before and after if nothing was written."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def change_settings(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the configuration stored in a run's checkpoints, and adapt manifests and routers."""
    digests: dict[str, str] = {}
    store, stage = Store.of_run(run), Store.of_run(run / "auxiliary")
    for step in store.steps():
        info = store.info(step)
        change(info["config"])
        digests |= _replace_info(store, step, info)
    for step in stage.steps():
        info = stage.info(step)
        info["auxiliary"]["main_digest"] = digests.get(info["auxiliary"]["main_digest"])
        _replace_info(stage, step, info)


def _replace_info(store: Store, step: int, info: dict[str, Any]) -> dict[str, str]:
    """Replace the metadata of a checkpoint; returns the digests of its manifest before and after."""
    folder = store.path(step)
    file = folder / integrity.MANIFEST
    manifest, before = integrity.read_manifest(folder), _digest(file)
    (folder / INFO).write_text(info_text(info))
    file.write_text(replace(manifest, files=integrity.digests(folder, integrity.sizes(folder))).text())
    return {before: _digest(file)}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def assert_says(ended: Ended, *, status: int, cause: str, remedy: str) -> None:
    """Exit status, exactly one cause, exactly one remedy, on stderr, and no traceback."""
    said = f"exit status {ended.status}\n{ended.out}\n{ended.err}"
    assert ended.status == status, said
    assert "Traceback" not in said, said
    assert ended.out.count("error:") == 0, said
    (error,) = re.findall(r"^error: (.*)$", ended.err, re.MULTILINE)
    (fix,) = re.findall(r"^  fix: (.*)$", ended.err, re.MULTILINE)
    assert re.search(cause, error), f"{cause!r} is not in {error!r}"
    assert re.search(remedy, fix), f"{remedy!r} is not in {fix!r}"


def warnings_in(text: str) -> Sequence[str]:
    """Lines that look like warnings of Python or of a library's logger."""
    return [line for line in text.splitlines() if re.search(r"\bwarn|deprecat|/site-packages/", line, re.IGNORECASE)]


def undocumented(rows: Sequence[dict[str, Any]]) -> set[str]:
    """Keys of metrics.jsonl that are missing in docs/reference/metrics.md."""
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    known = [re.sub("<[a-z]+>", "[^/]+", key) for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    return {key for row in rows for key in row if not any(re.fullmatch(pattern, key) for pattern in known)}
