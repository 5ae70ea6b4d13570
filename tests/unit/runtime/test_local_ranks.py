"""Local ranks: environment, output, what happens when one of them dies. The ranks are plain Python, without torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmscale.errors import LaunchError
from mmscale.runtime import local_ranks
from mmscale.runtime.local_ranks import FORWARDED, run_local

pytestmark = pytest.mark.usefixtures("signals_heard")


def run(nproc: int, code: str, folder: Path, *, environ: dict[str, str] | None = None) -> int:
    prelude = "import os, sys, signal, time; rank = int(os.environ['RANK']); "
    program = (sys.executable, "-c", prelude + "\n" + code)
    return run_local(nproc, [], log_dir=folder / "logs", environ=environ, program=program)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_environment_of_each_rank(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    names += ["OMP_NUM_THREADS", "GOMP_SPINCOUNT", "MINE"]
    code = f"open(r'{tmp_path}/' + str(rank), 'w').write(' '.join(os.environ[name] for name in {names}))"
    environ = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    assert run(3, code, tmp_path, environ={**environ, "MINE": "kept"}) == 0
    seen = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [line[:5] for line in seen] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({line[5] for line in seen}) == 1  # one port for all
    assert seen[0][6:] == ["1", "0", "kept"]


def test_rank_0_is_given_the_port_and_nobody_can_take_it(tmp_path: Path) -> None:
    code = """
import socket
port = int(os.environ["MASTER_PORT"])
other = socket.socket()
try:
    other.bind(("", port))
    sys.exit(9)  # another process could have the port
except OSError:
    pass
if rank == 0:
    time.sleep(0.5)  # a slow start
    listener = socket.socket(fileno=int(os.environ["MMSCALE_STORE_FD"]))
    assert listener.getsockname()[1] == port
    listener.accept()[0].send(b"rank 0")
else:
    assert "MMSCALE_STORE_FD" not in os.environ
    assert socket.create_connection(("127.0.0.1", port)).recv(6) == b"rank 0"
"""
    assert run(2, code, tmp_path, environ={**os.environ, "MMSCALE_STORE_FD": "99"}) == 0


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_waits_for_one_that_ended_learns_it_within_seconds(tmp_path: Path, lost: int) -> None:
    code = f"""
if rank == {lost}:
    sys.exit(9)
from mmscale.runtime import groups
from mmscale.runtime.rank_env import discover
groups.start(discover(), timeout_s=600)
"""
    began = time.monotonic()
    with pytest.raises(LaunchError, match=f"rank {lost} of 2 ended with exit status 9"):
        run(2, code, tmp_path, environ={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})
    assert time.monotonic() - began < 300  # not the 600 s of the groups


def test_threads_that_the_user_asks_for_are_kept(tmp_path: Path) -> None:
    code = "sys.exit(0 if os.environ['OMP_NUM_THREADS'] == '4' else 9)"
    assert run(1, code, tmp_path, environ={**os.environ, "OMP_NUM_THREADS": "4"}) == 0


def test_ranks_know_themselves(tmp_path: Path) -> None:
    code = "from mmscale.runtime.rank_env import discover; env = discover()\n"
    code += "assert (env.rank, env.source) == (rank, 'local')"
    root = str(Path(__file__).parents[3])
    assert run(2, code, tmp_path, environ={**os.environ, "PYTHONPATH": root}) == 0


def test_output_of_rank_0_goes_through_and_others_into_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(2, "print('out', rank); print('err', rank, file=sys.stderr)", tmp_path) == 0
    assert capfd.readouterr() == ("out 0\n", "err 0\n")
    assert sorted((tmp_path / "logs" / "rank_1.log").read_text().split("\n")) == ["", "err 1", "out 1"]


def test_killed_rank_is_named_and_ends_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = f"""
open(r'{tmp_path}/pid' + str(rank), 'w').write(str(os.getpid()))
if rank == 1:
    print('last words', flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
"""
    with pytest.raises(LaunchError) as caught:
        run(3, code, tmp_path)
    assert "rank 1 of 3 was ended by SIGKILL (9)" in str(caught.value)
    assert "rank_1.log" in str(caught.value)
    assert "last words" in capfd.readouterr().err
    for path in tmp_path.glob("pid*"):
        assert not alive(int(path.read_text()))


def test_crashed_rank_is_named_with_its_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError, match="rank 1 of 2 ended with exit status 1; the other ranks were ended"):
        run(2, "if rank: raise ValueError('broken')\ntime.sleep(100)", tmp_path)
    assert "ValueError: broken" in capfd.readouterr().err


def test_rank_that_ignores_sigterm_is_killed_after_the_grace_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "GRACE_S", 0.5)
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank: time.sleep(0.5); sys.exit(9)\ntime.sleep(100)"
    began = time.monotonic()
    with pytest.raises(LaunchError, match="exit status 9"):
        run(2, code, tmp_path)
    assert time.monotonic() - began < 90  # not the 100 s of the sleep


@pytest.mark.parametrize("status", [2, 3, 4, 5, 74, 75])
def test_documented_exit_status_is_kept(status: int, tmp_path: Path) -> None:
    assert run(2, f"time.sleep(0.1 * rank); sys.exit({status})", tmp_path) == status


def test_documented_exit_status_of_one_rank_shows_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "GRACE_S", 0.2)
    code = "if rank: print('no data here'); sys.exit(3)\ntime.sleep(100)"
    assert run(2, code, tmp_path) == 3
    assert "no data here" in capfd.readouterr().err


def test_crash_counts_more_than_a_documented_status(tmp_path: Path) -> None:
    code = "time.sleep(0.2 * rank)\nif rank: os.abort()\nsys.exit(75)"
    with pytest.raises(LaunchError, match="rank 1 of 2 was ended by SIGABRT"):
        run(2, code, tmp_path)


def test_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="rank 0 could not be started"):
        run_local(2, [], log_dir=tmp_path, program=["/nonexistent/python"])


def test_processes_that_a_rank_leaves_behind_are_ended(tmp_path: Path) -> None:
    code = f"import subprocess; open(r'{tmp_path}/pid', 'w').write(str(subprocess.Popen(['sleep', '100']).pid))"
    assert run(1, code, tmp_path) == 0
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))


LAUNCHER = """
import sys
from pathlib import Path
from mmscale.runtime import local_ranks
from mmscale.runtime.local_ranks import run_local
sys.exit(run_local(2, [], log_dir=Path(sys.argv[1]) / "logs", program=(sys.executable, "-c", sys.argv[2])))
"""
RANK = """
import os, signal, sys, time
def stop(number, frame):
    open(os.environ["FOLDER"] + f"/got_{os.environ['RANK']}", "a").write(f"{number} ")
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, stop)
open(os.environ["FOLDER"] + "/pid_" + os.environ["RANK"], "w").write(str(os.getpid()))
time.sleep(100)
"""


def start_launcher(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    environ = {**os.environ, "FOLDER": str(folder), "PYTHONPATH": str(Path(__file__).parents[3])}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(folder), RANK], env=environ)
    paths = [folder / "pid_0", folder / "pid_1"]
    wait_for(lambda: all(path.exists() and path.read_text() for path in paths))
    return launcher, [int(path.read_text()) for path in paths]


@pytest.mark.parametrize("number", FORWARDED)
def test_signals_are_passed_on_to_every_rank(number: signal.Signals, tmp_path: Path) -> None:
    launcher, _ = start_launcher(tmp_path)
    launcher.send_signal(number)
    assert launcher.wait(timeout=300) == 75
    # The rank that is slower to end may be asked to terminate as well.
    first = [(tmp_path / f"got_{rank}").read_text().split()[0] for rank in (0, 1)]
    assert first == [str(int(FORWARDED[number]))] * 2


def test_signal_that_no_rank_handles_is_named(tmp_path: Path) -> None:
    # The launcher's own process is this one: rank 0 sends it the signal that it then passes on.
    code = "if rank == 0: os.kill(os.getppid(), signal.SIGUSR2)\ntime.sleep(100)"
    with pytest.raises(LaunchError, match=r"stopped by SIGUSR2 before rank \d could handle it: nothing was saved"):
        run(2, code, tmp_path)


def test_signal_to_a_rank_that_has_just_ended_loses_no_status(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], process_group=0)
    rank = local_ranks._Rank(0, process, None)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    local_ranks._send([rank], signal.SIGUSR2)
    assert local_ranks._poll([rank]) == [rank]
    assert rank.status == 3


def test_second_interrupt_ends_the_ranks(tmp_path: Path) -> None:
    code = f"""
passed_on = []
signal.signal(signal.SIGINT, lambda number, frame: passed_on.append(number))
ready = r'{tmp_path}/ready'
if rank == 1:
    open(ready, 'w').close()
else:
    while not os.path.exists(ready):
        time.sleep(0.02)
    os.kill(os.getppid(), signal.SIGINT)
    while not passed_on:  # two signals that are pending at once count as one
        time.sleep(0.02)
    os.kill(os.getppid(), signal.SIGINT)
while True:
    time.sleep(100)
"""
    with pytest.raises(LaunchError, match="interrupted twice"):
        run(2, code, tmp_path)


def test_no_orphans_when_the_launcher_is_killed(tmp_path: Path) -> None:
    launcher, pids = start_launcher(tmp_path)
    launcher.kill()
    launcher.wait(timeout=300)
    wait_for(lambda: not any(alive(pid) for pid in pids))
