# ruff: noqa: F401, F811  fixtures of another file
"""Sweeps and chains of jobs: arrays of runs, successors of each run, and refusals of `sbatch`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from launch import record as records
from launch import submit
from mmscale.errors import LaunchError, UsageError
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.unit.launch.test_submit import config, options, profile, script


def test_a_sweep_is_an_array_of_runs_with_names_of_their_own(config: Path) -> None:
    cluster = profile(config.parent)
    planned = submit.plan_launch(config, cluster=cluster, sweep=["optim.lr=1e-4,3e-4", "run.seed=1,2"])
    assert [one.config.run.name for one in planned] == [
        f"tiny-lr-{lr}-seed-{seed}" for lr in ("1e-4", "3e-4") for seed in (1, 2)
    ]
    assert [(one.config.optim.lr, one.config.run.seed) for one in planned] == [
        (lr, seed) for lr in (1e-4, 3e-4) for seed in (1, 2)
    ]
    asked = options(submit.script(planned))
    assert asked["array"] == "0-3%4" and "%A_%a" in asked["output"]
    assert options(submit.script(planned, at_once=2))["array"] == "0-3%2"
    with pytest.raises(UsageError, match="is not key=value"):
        submit.plan_launch(config, cluster=cluster, sweep=["optim.lr"])
    with pytest.raises(UsageError, match="has 1e-4 twice"):
        submit.plan_launch(config, cluster=cluster, sweep=["optim.lr=1e-4,3e-4,1e-4"])
    lists = [overrides for overrides, _ in submit._variants(["optim.betas=[0.9,0.95],[0.9,0.99]"])]
    assert lists == [["optim.betas=[0.9,0.95]"], ["optim.betas=[0.9,0.99]"]]


@pytest.fixture
def sbatch(config: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """An sbatch that takes five jobs, from number 11 on; what it was asked for is in script.N."""
    fake = FakeSlurm(config.parent / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    count = f"n=$((10 + $(wc -l < {fake.folder}/sbatch.calls))); cp ${{@: -1}} {fake.folder}/script.$n"
    fake.answer("sbatch", f"{count}; [ $n -lt 16 ] || {{ echo 'sbatch: error: limit' >&2; exit 1; }}; echo job $n")
    return fake


def test_each_run_of_a_sweep_has_successors_of_its_own(config: Path, sbatch: FakeSlurm) -> None:
    cluster = profile(config.parent, chain=3)
    planned = submit.plan_launch(config, cluster=cluster, sweep=["run.seed=1,2"])
    found = submit.launch(planned)
    assert [(one["job"], one["successors"]) for one in found] == [("11_0", ["12", "13"]), ("11_1", ["14", "15"])]
    asked = {number: options((sbatch.folder / f"script.{number}").read_text()) for number in range(11, 16)}
    behind = ["afterany:11_0", "afterany:12", "afterany:11_1", "afterany:14"]
    assert "dependency" not in asked[11] and [asked[number]["dependency"] for number in range(12, 16)] == behind
    assert all("array" not in asked[number] for number in range(12, 16))
    runs = {asked[number]["output"].rpartition("/launch/")[0] for number in (14, 15)}
    assert runs == {planned[1].record.run}
    after = options(script(config, after=planned[0].record.run))["dependency"]
    assert after == "afterany:11_0:12:13"


@pytest.mark.parametrize("first", [True, False])
def test_what_is_done_of_a_sweep_is_no_part_of_its_array(config: Path, sbatch: FakeSlurm, first: bool) -> None:
    """Rows stay in the order of the sweep, and the dry run prints what would be submitted."""
    planned = submit.plan_launch(config, cluster=profile(config.parent), sweep=["run.seed=1,2,3"])
    over = 0 if first else 1
    planned[over] = replace(planned[over], done="is done")
    assert options(submit.script(planned))["array"] == "0-1%2"
    found = submit.launch(planned)
    assert [one["run"] for one in found] == [one.record.run for one in planned]
    assert [one.get("done", "") for one in found] == [one.done for one in planned]
    assert [one["job"] for one in found if "done" not in one] == ["11_0", "11_1"]
    alone = [replace(one, done="is done") for one in planned[1:]]
    assert "array" not in options(submit.script([planned[0 if over else 1], *alone[1:]]))
    assert "#SBATCH" in submit.script(alone)  # of runs that are all done it is what would have started them


def test_a_chain_that_is_refused_in_part_is_taken_back(config: Path, sbatch: FakeSlurm) -> None:
    planned = submit.plan_launch(config, cluster=profile(config.parent, chain=7))
    with pytest.raises(LaunchError, match="SLURM did not take the job: sbatch: error: limit"):
        submit.launch(planned)
    assert sbatch.calls("scancel") == ["15", "14", "13", "12", "11"]
    assert not Path(planned[0].record.run).exists()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("sbatch: unrecognized option '--segment=2'\nTry \"sbatch --help\" for more information", "--segment=2"),
        ("sbatch: error: Invalid account\nsbatch: error: Batch job submission failed: no", "submission failed: no"),
        ("a site's own filter\nsays no", "says no"),
    ],
)
def test_a_refusal_of_sbatch_is_quoted(
    config: Path, said: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSlurm(tmp_path / "bin")
    fake.answer("sbatch", f"cat >&2 <<'END'\n{said}\nEND\nexit 1")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    planned = submit.plan_launch(config, cluster=profile(config.parent))
    with pytest.raises(LaunchError, match="SLURM did not take the job: ") as refused:
        submit.launch(planned)
    assert refused.value.cause.endswith((told, f"{told}'")), refused.value.cause
    assert not Path(planned[0].record.run).exists()


def test_after_names_a_job_or_a_run(config: Path, tmp_path: Path) -> None:
    assert options(script(config, after="12"))["dependency"] == "afterany:12"
    run = tmp_path / "other"
    with pytest.raises(UsageError, match="neither a job nor a run with one"):
        script(config, after=str(run))
    folder = run / "launch" / "001"
    folder.mkdir(parents=True)
    (folder / records.RECORD).write_text("{}")
    records.set_job(folder, records.JobKey("34_1"))
    assert options(script(config, after=str(run)))["dependency"] == "afterany:34_1"
    with pytest.raises(UsageError):
        script(config, after="12; id")
