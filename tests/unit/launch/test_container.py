"""What a container puts between srun and Python, and what is refused before anybody queues."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest

from launch import container
from launch import rank_command as ranks
from launch.profile import Container, Profile, profile_of
from launch.record import Record
from mmscale.config import Config
from mmscale.config.load import load
from mmscale.errors import ConfigError, UsageError

ROOT = Path(__file__).parents[3]
RUN = Path("/runs/a b/tiny")
CODE = f"{RUN}/launch/001/code.zip"


def given(**settings: Any) -> tuple[Record, Profile]:
    more = {name: settings.pop(name) for name in ("gpus_per_node", "ranks", "environment") if name in settings}
    content = {
        "tasks_per_node": 2,
        "srun": ["--cpu-bind=none"],
        "container": {"image": "/i/m.sqsh", **settings},
        **more,
    }
    profile = profile_of(content, where="here")
    record = Record(
        folder=f"{RUN}/launch/001",
        run=str(RUN),
        cwd="/home/me/work",
        cluster="c",
        profile=content,
        nodes=2,
        tasks_per_node=2,
        max_restarts=0,
        max_without_progress=0,
        python="/of/the/host",
    )
    return record, profile


ENV = ["env", "--unset=PYTHONHOME", "--unset=PYTHONUSERBASE", "--unset=PYTHONSTARTUP"]
ENV += [f"PYTHONPATH={CODE}", "PYTHONSAFEPATH=1", "PYTHONNOUSERSITE=1"]
MOUNTS = f"/home/me/work:/home/me/work,{RUN}:{RUN}"


@pytest.mark.parametrize("runtime", container._RUNTIMES)
@pytest.mark.parametrize("gpus", [0, 8])
def test_each_runtime(runtime: str, gpus: int) -> None:
    options = ["--container-name=mmscale"] if runtime == "pyxis" else ["--userns"]
    record, profile = given(
        runtime=runtime,
        python="/opt/python",
        mounts=["/data", "/a:/b:ro", "/c:/d:rw"],
        options=options,
        gpus_per_node=gpus,
    )
    mounts = f"/data:/data,/a:/b:ro,/c:/d,{MOUNTS}"
    command = container.task(record, profile, ["-m", "mmscale", "train"])
    if runtime == "pyxis":
        start = ["--container-image=/i/m.sqsh", f"--container-mounts={mounts}", "--container-workdir=/home/me/work"]
        start += options
    else:
        start = [runtime, "exec", *(["--nv"] if gpus else []), f"--bind={mounts}", "--pwd=/home/me/work", *options]
        start += ["/i/m.sqsh"]
    assert command == ["--cpu-bind=none", *start, *ENV, "/opt/python", "-m", "mmscale", "train"]


def test_runtimes_are_those_of_the_profile() -> None:
    assert set(get_args(Container.model_fields["runtime"].annotation)) == set(container._RUNTIMES)


def test_without_a_container_it_is_the_python_that_launched() -> None:
    record, profile = given()
    profile = profile.model_copy(update={"container": None})
    assert container.task(record, profile, ["-m", "x"]) == ["--cpu-bind=none", "/of/the/host", "-m", "x"]


def test_a_folder_in_the_working_directory_is_mounted_once() -> None:
    record, profile = given()
    record = dataclasses.replace(record, run="/home/me/work/runs/tiny/auxiliary", stage="auxiliary")
    assert container._mounts(profile.container, record) == ["/home/me/work:/home/me/work"]  # type: ignore[arg-type]
    record = dataclasses.replace(record, cwd="/elsewhere")
    mounts = container._mounts(profile.container, record)  # type: ignore[arg-type]
    assert mounts == ["/elsewhere:/elsewhere", "/home/me/work/runs/tiny:/home/me/work/runs/tiny"]


def test_the_path_of_the_profile_comes_behind_the_snapshot() -> None:
    record, profile = given(environment={"PYTHONPATH": {"value": "/in/image", "reason": "a plugin"}})
    assert f"PYTHONPATH={CODE}:/in/image" in container.task(record, profile, [])


@pytest.mark.parametrize("ranks_by", ["srun", "torchrun"])
def test_ranks_and_agents_are_started_in_it(ranks_by: str) -> None:
    record, profile = given(ranks=ranks_by)
    command = ranks.command(record, profile, logs=Path("/logs"), environ={"SLURM_JOB_NODELIST": "n[1-2]"}, port=1)
    assert command.index("--container-image=/i/m.sqsh") < command.index("env") < command.index("python3")
    assert "/of/the/host" not in command


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(ROOT / "configs/quickstart.yaml", [f"data.path={tmp_path}/set", f"run.dir={tmp_path}/runs"])


def test_data_that_are_not_mounted_are_refused(config: Config, tmp_path: Path) -> None:
    record, profile = given()
    with pytest.raises(ConfigError, match=f"data {tmp_path}/set is not mounted in the container") as caught:
        container.check(record, profile, config)
    assert caught.value.remedy == f"container: {{mounts: [{tmp_path}/set:{tmp_path}/set:ro]}}"
    for mount in (f"{tmp_path}", f"/somewhere:{tmp_path}/set:ro"):
        container.check(*given(mounts=[mount]), config)


def test_an_image_that_is_not_there_is_refused_unless_its_folder_may_be_on_nodes(
    config: Config, tmp_path: Path
) -> None:
    mounts = [str(tmp_path)]
    with pytest.raises(ConfigError, match=f"container.image: there is no {tmp_path}/i.sqsh"):
        container.check(*given(image=f"{tmp_path}/i.sqsh", mounts=mounts), config)
    for image in ("/nowhere/here/i.sqsh", str(tmp_path), "nvcr.io#nvidia/pytorch:25.01-py3", "docker://a/b:c"):
        container.check(*given(image=image, mounts=mounts), config)


def test_paths_that_lists_of_mounts_cannot_hold_are_refused(config: Config) -> None:
    record, profile = given()
    with pytest.raises(UsageError, match=r"has ':' and cannot be mounted"):
        container.check(dataclasses.replace(record, cwd="/a:b"), profile, config)


@pytest.mark.parametrize(
    "wrong",
    [{"mounts": ["a:b"]}, {"mounts": ["/a:/b:x"]}, {"mounts": ["/a,/b"]}, {"image": "-x"}, {"runtime": "docker"}],
    ids=str,
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        given(**wrong)


def test_a_container_is_for_slurm() -> None:
    with pytest.raises(ConfigError, match="container is for scheduler: slurm, and this is local"):
        profile_of({"scheduler": "local", "container": {"image": "/a"}}, where="here")
