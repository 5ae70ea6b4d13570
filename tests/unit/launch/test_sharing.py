"""What a colleague may look at: a run whose profile has `share: group`; else a line says what to ask its owner for."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import job_environment, submit
from launch.scheduler import JobState
from mmscale.cli import main
from mmscale.resilience.run_lock import RunLock
from mmscale.runs.events import EventLog
from mmscale.train.log.metrics_log import MetricsLog
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.unit.launch.launchable import write_launchable

GROUP, SOMEBODY = 54321, 65534  # numbers that no user or group of this machine needs to have
LOOKS = (["status", "RUN"], ["logs", "RUN"], ["logs", "RUN", "--job"], ["report", "RUN", "--no-png", "--out", "OUT"])


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the group's, on a machine where people close their files by their umask."""
    if os.getuid() != 0:
        pytest.skip("only root can look as another user")
    folder, before = Path(tempfile.mkdtemp()), os.umask(0o077)
    folder.chmod(0o2777)
    os.chown(folder, -1, GROUP)  # and that of what is made in it
    yield folder
    os.umask(before)
    shutil.rmtree(folder)


def launched(folder: Path, share: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was launched with such a profile, and has trained a step."""
    write_launchable(folder, share=share, secrets={"A_TOKEN": {"env": "A_TOKEN"}})
    monkeypatch.setenv("A_TOKEN", "hidden-4711")
    fake = FakeSlurm(folder / "bin", **{"7": JobState("7", "RUNNING")})
    fake.answer("sbatch", "umask > $(dirname $0)/umask; echo Submitted batch job 7")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    planned = submit.plan_launch(folder / "tiny.yaml", (), cluster=str(folder / "cluster.yaml"))
    submit.launch(planned)
    run = Path(planned[0].record.run)
    # What the job writes: its log is made by SLURM, which takes over the umask of sbatch.
    assert (folder / "bin" / "umask").read_text() == {"owner": "0077\n", "group": "0027\n"}[share]
    with job_environment.shared(planned[0].record.checked_profile()):
        (Path(planned[0].record.folder) / "submitit" / "7_0_log.out").write_text("attempt 1\n")
        with RunLock(run, job="7", by="launch") as lock:
            lock.acquire("7.0.0", attempt=1)
            EventLog(run, 1).add("launch", job="7", launch="001")
            EventLog(run, 1).add("start", step=0)
            MetricsLog(run, attempt=1).write(1, {"loss": 2.0})
            (run / "config.yaml").write_text((Path(planned[0].record.folder) / "config.yaml").read_text())
            (run / "logs" / "attempt_1").mkdir(parents=True)
            (run / "logs" / "attempt_1" / "rank_0.log").write_text("step 1\n")
    fake.open_to_all()
    (folder / "bin").chmod(0o755)
    return run


def looked(arguments: list[str], *, group: int) -> int:
    """Exit status of a command of another user."""
    os.setegid(group)
    os.seteuid(SOMEBODY)
    try:
        return main(arguments)
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize("share", ["owner", "group"])
def test_who_may_look(
    folder: Path, share: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launched(folder, share, monkeypatch)
    out = Path(tempfile.mkdtemp(dir=folder))
    out.chmod(0o777)
    for number, words in enumerate(LOOKS):
        known = {"RUN": str(run), "OUT": str(out / f"{number}.html")}
        arguments = [known.get(word, word) for word in words]
        assert main(arguments) == 0  # the owner; it also imports what the other user cannot read here
        (out / f"{number}.html").unlink(missing_ok=True)
        capsys.readouterr()
        for group in (GROUP, SOMEBODY):
            status = looked(arguments, group=group)
            said = capsys.readouterr()
            where = (words, share, group, said)
            assert "Traceback" not in said.err, where
            if share == "group" and group == GROUP:
                assert status == 0 and (said.out or words[0] == "report"), where
                assert "unreadable" not in said.out, where
            else:
                assert status == 1 and "no permission to" in said.err and "chmod -R g+rX" in said.err, where
    kept = [path for path in run.rglob("*") if path.is_file() and b"hidden-4711" in path.read_bytes()]
    assert [path.name for path in kept] == ["A_TOKEN"]
    assert [path.stat().st_mode & 0o777 for path in (kept[0].parent, kept[0])] == [0o700, 0o600]
    assert not [path for path in run.rglob("*") if path.stat().st_mode & 0o022]  # and nobody else writes
