"""The batch script and what is checked before it: no cluster is needed for any of it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import batch, job_environment, rank_processes, submit
from launch import rank_command as ranks
from launch import record as records
from mmscale.errors import CheckpointError, ConfigError, LaunchError, MmscaleError, UsageError
from mmscale.train.stages.table import MAIN, STAGES, Stage
from tests.unit.data.corpora import corpus, prepare
from tests.unit.launch.fake_slurm import FakeSlurm

ROOT = Path(__file__).parents[3]
PROFILE: dict[str, Any] = {"nodes": 2, "tasks_per_node": 2, "time": "30m", "signal_delay": "60s"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    prepare(tmp_path / "set", corpus(40))
    content = {
        "run": {"name": "tiny", "dir": str(tmp_path / "runs")},
        "vocab": {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 32}]},
        "data": {"path": str(tmp_path / "set")},
        "model": {
            "kind": "moma",
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 2,
            "seq_length": 128,
            "experts": {"counts": {"text": 2, "image": 2}},
        },
        "train": {"micro_batch_size": 1, "global_batch_size": 8},
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def profile(folder: Path, **settings: Any) -> str:
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(PROFILE | settings))
    return str(file)


def script(
    config: Path, *overrides: str, sweep: tuple[str, ...] = (), after: str | None = None, **settings: Any
) -> str:
    cluster = profile(config.parent, **settings)
    return submit.script(submit.plan_launch(config, overrides, cluster=cluster, sweep=sweep), after=after)


def options(text: str) -> dict[str, str]:
    """The script's #SBATCH lines as sbatch reads them."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            name, _, value = word.removeprefix("--").partition("=")
            found[name] = value
    return found


def test_the_script_asks_for_what_the_profile_says_and_writes_nothing(config: Path) -> None:
    text = script(
        config, partition="batch", account="team", constraint="a&b", exclusive=True, memory_gb=0, exclude=["n7"]
    )
    asked = options(text)
    expected = {"nodes": "2", "ntasks-per-node": "2", "time": "30", "partition": "batch", "account": "team"}
    expected |= {"constraint": "a&b", "exclude": "n7", "mem": "0", "signal": "B:USR2@60", "job-name": "mmscale-tiny"}
    assert asked.items() >= expected.items()
    assert {"requeue", "exclusive"} <= set(asked) and asked["open-mode"] == "append"
    assert "wckey" not in asked
    assert not (config.parent / "runs").exists()
    assert {"no-requeue"} <= set(options(script(config, requeue=False))) - {"requeue"}


def test_the_command_line_replaces_what_the_profile_asks_for(config: Path) -> None:
    cluster = profile(config.parent, partition="batch", account="team")
    asked = {"time": "2h", "partition": "debug", "qos": "high"}
    (planned,) = submit.plan_launch(config, cluster=cluster, asked=asked)
    found = options(submit.script([planned]))
    expected = {"time": "120", "partition": "debug", "qos": "high", "account": "team"}
    assert {name: found[name] for name in expected} == expected
    assert planned.record.asked == asked  # `resume` asks for the same
    with pytest.raises(ConfigError, match="--partition: partition is 'a;b'"):
        submit.plan_launch(config, cluster=cluster, asked={"partition": "a;b"})
    with pytest.raises(ConfigError, match="--qos is for SLURM, and --cluster local runs here"):
        submit.plan_launch(config, cluster="local", asked={"qos": "high"})


@pytest.mark.parametrize(
    ("limit", "minutes"), [("2-12:30:00", "3630"), ("01:00:00", "60"), ("UNLIMITED", None), (None, None)]
)
def test_a_job_asks_for_the_time_that_its_partition_allows(
    config: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, minutes: str | None
) -> None:
    fake = FakeSlurm(config.parent / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    other = "echo 'PartitionName=a Default=NO MaxTime=00:10:00 State=UP'"
    fake.answer("scontrol", f"{other}; echo 'PartitionName=b Default=YES MaxTime={limit} State=UP'")
    if limit is None:
        fake.away()
    found = options(script(config, time=None))
    assert found.get("time") == minutes


def test_the_script_is_bash_and_ends_with_the_process_that_signals_reach(config: Path) -> None:
    text = script(
        config, setup=["module() { :; }", "module load cuda"], environment={"A": {"value": "a b", "reason": "r"}}
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
    assert text.strip().splitlines()[-1].startswith(f"exec {sys.executable} -u -m submitit.core._submit ")
    assert text.index("trap '' USR1 USR2") < text.index("module load cuda") < text.index("export A='a b'")


def test_values_reach_the_shell_as_they_are(config: Path) -> None:
    """Runs the script's own lines: what they export is what the profile says, and nothing else happens."""
    wicked = "x\"; touch pwned; $(touch pwned) `touch pwned` 'y'"
    text = script(config, environment={"WICKED": {"value": wicked, "reason": "it is $(touch pwned) a test"}})
    kept = [line for line in text.splitlines() if not line.startswith("exec ")]
    ended = subprocess.run(
        ["bash", "-c", "\n".join([*kept, 'printf %s "$WICKED"'])], cwd=config.parent, capture_output=True, text=True
    )
    assert ended.stdout == wicked
    assert not (config.parent / "pwned").exists()


@pytest.mark.parametrize("name", ["x%j", "x\ny", "x'y", "x$HOME", 'x"y', "x`id`"])
def test_paths_that_a_shell_or_slurm_reads_are_refused(config: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"run\.dir"):
        script(config, f"run.dir={config.parent}/{name}" if "\n" not in name else 'run.dir="/tmp/x\\ny"')


def test_a_path_with_a_space_is_fine(config: Path) -> None:
    text = script(config, f"run.dir={config.parent}/my runs")
    assert options(text)["output"].startswith(f"{config.parent}/my runs/tiny/launch/001/submitit/")


@pytest.mark.parametrize(
    ("overrides", "error", "cause"),
    [
        (["parallel.tp=3", "model.num_attention_heads=3"], ConfigError, "divi"),
        (
            ["parallel.pp=4", "parallel.ep=2", "model.num_layers=4"],
            ConfigError,
            "parallel.ep = 2 does not divide the 1 data",
        ),
        (["data.path=/nowhere"], MmscaleError, "/nowhere"),
        (["train.stepz=3"], ConfigError, "train.stepz is not a setting"),
    ],
)
def test_what_cannot_run_is_refused_before_it_queues(
    config: Path, overrides: list[str], error: type[MmscaleError], cause: str
) -> None:
    with pytest.raises(error, match=cause):
        script(config, *overrides)


def test_nodes_of_the_command_line_count(config: Path) -> None:
    cluster = profile(config.parent)
    (planned,) = submit.plan_launch(config, cluster=cluster, nodes=4)
    assert planned.record.world_size == 8
    with pytest.raises(ConfigError):  # 12 ranks do not share 8 sequences
        submit.plan_launch(config, cluster=cluster, nodes=6)


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_a_stage_is_launched_in_its_own_folder(config: Path, stage: Stage) -> None:
    cluster = profile(config.parent)
    own = [f"sft.path={config.parent / 'set'}"]
    (planned,) = submit.plan_launch(config, own, cluster=cluster, stage=stage.name, after=True)
    run = config.parent / "runs" / "tiny"
    assert planned.record.run == str(stage.folder(run)) and planned.record.main_run == run
    name = "-".join(filter(None, ("mmscale-tiny", stage.subfolder)))
    assert options(submit.script([planned], after="7"))["job-name"] == name
    told = ranks.command(planned.record, planned.record.checked_profile(), logs=run, environ={})
    assert told[told.index("--stage") + 1] == stage.name
    if stage.name != MAIN:  # it goes on from what is not there yet
        with pytest.raises(CheckpointError, match="no committed checkpoint"):
            submit.plan_launch(config, own, cluster=cluster, stage=stage.name)


@pytest.mark.parametrize("ranks_by", ["srun", "torchrun"])
def test_one_rank_that_fails_ends_the_others(config: Path, ranks_by: str) -> None:
    """SLURM ends them at once after a failure, and after a status of 0 as late as ranks without SLURM are ended."""
    (planned,) = submit.plan_launch(config, cluster=profile(config.parent, ranks=ranks_by))
    told = ranks.command(planned.record, planned.record.checked_profile(), logs=config.parent, environ={})
    srun = told[: told.index(planned.record.python)]
    assert srun[0] == "srun" and "--kill-on-bad-exit=1" in srun and f"--wait={rank_processes._OTHERS_S:.0f}" in srun


def test_a_record_of_before_there_were_stages_is_of_the_main_run(config: Path) -> None:
    (planned,) = submit.plan_launch(config, cluster=profile(config.parent))
    records.write_record(planned.record, planned.config)
    file = Path(planned.record.folder) / records.RECORD
    plain = json.loads(file.read_text())
    del plain["stage"]
    file.write_text(json.dumps(plain))
    assert records.read_record(file.parent) == planned.record


def test_a_hand_written_script_names_a_stage() -> None:
    flags = {"yes": True, "from_scratch": False}
    assert batch._parsed(["c.yaml", "--stage", "auxiliary", "a=1", "--yes"]) == ("c.yaml", ["a=1"], "auxiliary", flags)
    assert batch._parsed(["c.yaml", "--from-scratch"]) == ("c.yaml", [], MAIN, {"yes": False, "from_scratch": True})
    for wrong in (["c.yaml", "--stage"], ["c.yaml", "--stage", "other"], ["--yes"]):
        with pytest.raises(UsageError, match="no configuration, or --stage"):
            batch._parsed(wrong)


def test_the_launch_folder_holds_all_that_the_job_needs(config: Path) -> None:
    (planned,) = submit.plan_launch(config, ["train.steps=7"], cluster=profile(config.parent))
    records.write_record(planned.record, planned.config)
    folder = Path(planned.record.folder)
    assert folder.stat().st_mode & 0o077 == 0  # pickles lie there
    assert records.read_record(folder) == planned.record
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 7
    assert (folder / "environment.json").is_file()
    code = folder / "code.zip"
    assert len(list(folder.rglob("*"))) == 4  # however many files the code has: one archive
    assert zipfile.Path(code, "launch/job.py").read_bytes() == (ROOT / "launch" / "job.py").read_bytes()
    command = [sys.executable, "-c", "import mmscale, launch; print(mmscale.__file__, launch.__file__)"]
    variables = os.environ | records.python_variables(planned.record)
    said = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True).stdout.split()
    assert said == [str(code / name / "__init__.pyc") for name in ("mmscale", "launch")]
    (shared,) = submit.plan_launch(config, ["run.name=shared"], cluster=profile(config.parent, share="group"))
    records.write_record(shared.record, shared.config)
    assert Path(shared.record.folder).stat().st_mode & 0o777 == 0o750
    with pytest.raises(LaunchError, match="launched twice"):
        records.write_record(planned.record, planned.config)
    (again,) = submit.plan_launch(config, cluster=profile(config.parent))
    assert again.record.folder.endswith("002")


def test_secrets_and_facts_of_other_ranks_stay_here(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MMSCALE_API_KEY", "HF_TOKEN", "SOMETHING", "MMSCALE_ATTEMPT_ID", "OTHER_A", "OTHER_TOKEN"):
        monkeypatch.setenv(name, "value")
    monkeypatch.setenv("MMSCALE_FAULTS", "")
    before = dict(os.environ)
    (planned,) = submit.plan_launch(
        config, cluster=profile(config.parent, keep=["OTHER_*"], environment={"B": {"value": "2", "reason": "r"}})
    )
    with job_environment.only(planned.record.checked_profile()):
        inside = dict(os.environ)
    assert {"PATH", "MMSCALE_FAULTS", "OTHER_A"} <= set(inside) and inside["B"] == "2"
    assert not {"MMSCALE_API_KEY", "HF_TOKEN", "SOMETHING", "MMSCALE_ATTEMPT_ID", "OTHER_TOKEN"} & set(inside)
    assert dict(os.environ) == before


def test_exported_functions_and_what_nodes_need_to_reach_others_are_passed_and_named(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (planned,) = submit.plan_launch(config, cluster=profile(config.parent))
    shell = {
        "BASH_FUNC_module%%": "() { eval x; }",
        "BASH_FUNC_ml()": "() { :; }",
        "MODULEPATH": "/m",
        "LMOD_CMD": "/l",
    }
    shell |= {"HTTPS_PROXY": "http://proxy:3128", "NCCL_IB_HCA": "mlx5", "HF_HOME": "/hf", "PYTHONPATH": "/mine"}
    secrets = {"HF_TOKEN": "x", "WANDB_API_KEY": "x", "http_proxy": "http://me:password@proxy:3128"}
    monkeypatch.setattr(os, "environ", shell | secrets | {"EDITOR": "vi"})
    found = job_environment.environment_of_job(planned.record.checked_profile())
    assert found.variables == shell
    assert found.withheld == ("HF_TOKEN", "WANDB_API_KEY", "http_proxy")
    names, withheld = job_environment.comments(planned.record.checked_profile())
    assert {"module()", "ml()", "HTTPS_PROXY", "PYTHONPATH"} <= set(names.split())
    assert withheld.endswith("HF_TOKEN WANDB_API_KEY http_proxy") and "password" not in withheld


def test_setup_that_fails_ends_the_job_and_says_so(config: Path) -> None:
    text = script(config, setup=["module() { return 3; }", "true", "module load cuda", "touch reached"])
    ended = subprocess.run(["bash", "-c", text], cwd=config.parent, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: setup of the profile failed with exit status 3: ")
    assert not (config.parent / "reached").exists()


def test_the_snapshot_comes_first_and_the_users_own_path_behind_it(config: Path) -> None:
    text = script(config)
    kept = [line for line in text.splitlines() if not line.startswith("exec ")]
    for given, behind in (("/a:/b", ":/a:/b"), ("", "")):
        said = subprocess.run(
            ["bash", "-c", "\n".join([*kept, 'printf %s "$PYTHONPATH"'])],
            env=os.environ | {"PYTHONPATH": given},
            capture_output=True,
            text=True,
        ).stdout
        assert said == f"{config.parent}/runs/tiny/launch/001/code.zip{behind}"


def test_secrets_reach_the_job_by_files_and_stay_out_of_everything_else(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text("of-a-file-4711\n")
    monkeypatch.setenv("WANDB_API_KEY", "of-the-shell-4711")
    secrets = {"WANDB_API_KEY": {"env": "WANDB_API_KEY"}, "OTHER_TOKEN": {"file": str(file)}}
    cluster = profile(config.parent, secrets=secrets)
    (planned,) = submit.plan_launch(config, cluster=cluster)
    used, folder = planned.record.checked_profile(), Path(planned.record.folder)
    text = submit.script([planned])
    assert "4711" not in text and "# Secrets, which the job reads from files: OTHER_TOKEN WANDB_API_KEY" in text
    records.write_record(planned.record, planned.config)
    job_environment.write_secrets(used, folder)
    (written,) = (folder / job_environment.SECRETS).iterdir()
    assert written.name == "WANDB_API_KEY" and written.stat().st_mode & 0o077 == 0
    others = [entry for entry in folder.rglob("*") if entry.is_file() and entry != written]
    assert not [entry for entry in others if b"4711" in entry.read_bytes() and "code" not in entry.parts]
    with job_environment.only(used):
        assert "WANDB_API_KEY" not in os.environ
    assert job_environment.read_secrets(used, folder) == {
        "WANDB_API_KEY": "of-the-shell-4711",
        "OTHER_TOKEN": "of-a-file-4711",
    }
    job_environment.remove_secrets(folder)
    with pytest.raises(LaunchError, match="secret WANDB_API_KEY cannot be read"):
        job_environment.read_secrets(used, folder)
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UsageError, match=r"secrets\.WANDB_API_KEY of the profile: the variable WANDB_API_KEY of this"):
        job_environment.check_secrets(used)
    for wrong in ({}, {"env": "A", "file": "b"}):
        with pytest.raises(ConfigError, match="a secret has either env or file"):
            script(config, secrets={"A": wrong})


def test_launching_imports_no_torch(config: Path) -> None:
    code = (
        "import sys; from mmscale.cli import main\n"
        f"status = main(['launch', {str(config)!r}, '--cluster', {profile(config.parent)!r}, '--dry-run'])\n"
        "import launch.job, launch.status, launch.control, launch.logs, launch.batch\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules; sys.exit(status)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("#!/bin/bash")


def test_without_slurm_it_says_so(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    planned = submit.plan_launch(config, cluster=profile(config.parent))
    with pytest.raises(LaunchError, match="there is no sbatch on this machine"):
        submit.launch(planned)


def test_one_machine_has_one_node(config: Path) -> None:
    (planned,) = submit.plan_launch(config, ["parallel.ep=2"], cluster="local")
    assert planned.record.world_size == 2
    assert "--nproc 2" in submit.script([planned])
    with pytest.raises(UsageError, match="this is one machine"):
        submit.plan_launch(config, cluster="local", nodes=2)


def test_a_hand_written_script_takes_node_checks_and_ranks_from_a_profile(config: Path) -> None:
    skip = {"skip": {"clock": "no NTP"}}
    cluster = profile(config.parent, ranks="torchrun", cordon_file="bad.txt", preflight=skip, gpus_per_node=8)
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "3"}
    record = records.read_record(batch._folder([str(config)], environ | {"MMSCALE_CLUSTER": cluster}))
    used = record.checked_profile()
    assert (record.nodes, record.tasks_per_node, used.cpus_per_task) == (2, 1, 3)  # as sbatch was asked, not as it says
    assert used.gpus_per_node == 8  # SLURM says nothing of devices
    environ |= {"SLURM_JOB_ID": "8", "SLURM_GPUS_ON_NODE": "1"}
    record = records.read_record(batch._folder([str(config)], environ | {"MMSCALE_CLUSTER": cluster}))
    assert record.checked_profile().gpus_per_node == 1
    assert (used.ranks, used.cordon_file, used.preflight.skip) == ("torchrun", "bad.txt", {"clock": "no NTP"})
    with pytest.raises(UsageError, match="MMSCALE_CLUSTER=local is not a profile of SLURM"):
        batch._folder([str(config), "run.name=other"], environ | {"MMSCALE_CLUSTER": "local"})


def test_torchrun_is_for_slurm(config: Path) -> None:
    with pytest.raises(ConfigError, match="ranks: torchrun is for scheduler: slurm"):
        script(config, scheduler="local", ranks="torchrun")
