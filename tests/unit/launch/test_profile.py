"""Cluster profiles: strict, and nothing in them is a command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launch.profile import Profile, load_profile, profile_of
from mmscale.errors import ConfigError

ROOT = Path(__file__).parents[3]
HOSTILE = ("x; rm -rf ~", "$(id)", "`id`", "a\n#SBATCH --wrap=id", "x && id", "-x", "a b", "'", "\\")


@pytest.mark.parametrize("file", sorted((ROOT / "configs/cluster").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_profiles_are_right(file: Path) -> None:
    assert load_profile(str(file)).tasks >= 1


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("key", ["partition", "account", "qos", "reservation", "constraint"])
def test_hostile_names_are_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"here: {key} is "):
        profile_of({"tasks_per_node": 1, key: value}, where="here")


@pytest.mark.parametrize(
    "content",
    [
        {"exclude": ["n1; id"]},
        {"srun": ["--x=$(id)"]},
        {"sbatch": {"comment": "a\nb"}},
        {"sbatch": {"x y": 1}},
        {"environment": {"A B": {"value": "1", "reason": "none"}}},
        {"environment": {"A": {"value": "1\nid", "reason": "none"}}},
        {"environment": {"A": {"value": "1", "reason": "x\nid"}}},
        {"setup": ["one\ntwo"]},
        {"container": {"image": "x;id"}},
        {"keep": ["A;B"]},
        {"secrets": {"A": {"env": "B;C"}}},
        {"secrets": {"A B": {"env": "B"}}},
    ],
    ids=str,
)
def test_hostile_values_elsewhere_are_refused(content: dict) -> None:
    with pytest.raises(ConfigError):
        profile_of({"tasks_per_node": 1, **content}, where="here")


@pytest.mark.parametrize("name", ["nodes", "time", "gpus", "mem", "export", "array", "signal", "output"])
def test_options_of_sbatch_that_follow_from_other_settings_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"sbatch: {name} would contradict"):
        profile_of({"tasks_per_node": 1, "sbatch": {name: 1}}, where="here")
    profile_of({"tasks_per_node": 1, "sbatch": {"mail-type": "FAIL", "nice": 100, "comment": "a"}}, where="here")


def test_a_secret_is_not_kept_but_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="WANDB_API_KEY looks like a secret"):
        profile_of({"tasks_per_node": 1, "keep": ["WANDB_API_KEY"]}, where="here")
    profile_of({"tasks_per_node": 1, "keep": ["WANDB_*"]}, where="here")


def test_unknown_settings_and_missing_reasons_are_errors() -> None:
    with pytest.raises(ConfigError, match="partitions is 'x': no such setting"):
        profile_of({"tasks_per_node": 1, "partitions": "x"}, where="here")
    with pytest.raises(ConfigError, match=r"environment\.A\.reason"):
        profile_of({"tasks_per_node": 1, "environment": {"A": {"value": "1"}}}, where="here")


def test_ranks_must_follow_from_the_profile() -> None:
    with pytest.raises(ConfigError, match="how many ranks a node has"):
        profile_of({}, where="here")
    assert profile_of({"gpus_per_node": 8}, where="here").tasks == 8
    assert profile_of({"gpus_per_node": 8, "tasks_per_node": 4}, where="here").tasks == 4


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        (30, 30),
        ("30", 30),
        ("90m", 90),
        ("12h", 720),
        ("2d", 2880),
        ("12:30:00", 750),
        ("2-00:00:00", 2880),
        ("1-6", 1800),
    ],
)
def test_times(text: str | int, minutes: int) -> None:
    assert Profile(tasks_per_node=1, time=text).time == minutes  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["soon", "-5", "1:2:3:4", "a-1", 0])
def test_no_times(text: str | int) -> None:
    with pytest.raises(ConfigError, match="time"):
        profile_of({"tasks_per_node": 1, "time": text}, where="here")


def test_ranks_are_told_before_the_time_is_over() -> None:
    with pytest.raises(ConfigError, match=r"signal_delay \(600 s\) is not below the time limit \(10 min\)"):
        profile_of({"tasks_per_node": 1, "time": "10m", "signal_delay": "10m"}, where="here")


def test_nodes_found_bad_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "cordoned.txt"
    profile = profile_of({"tasks_per_node": 1, "exclude": ["n7"], "cordon_file": str(file)}, where="here")
    assert profile.excluded() == ["n7"]
    file.write_text("# bad nodes\nn3  # down since Monday\n\nn7\nn9\n")
    assert profile.excluded() == ["n7", "n3", "n9"]


def test_names_that_are_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match="there is no cluster profile") as error:
        load_profile("nowhere")
    assert "test" in error.value.remedy and "local" in error.value.remedy
    monkeypatch.chdir(tmp_path)  # outside the checkout its profiles are not found; the message says where was looked
    with pytest.raises(ConfigError, match=re.escape(f"below {tmp_path}")) as error:
        load_profile("test")
    named = shlex.split(error.value.remedy.partition("--cluster ")[2])  # the remedy works as it is printed
    assert load_profile(named[0]) == load_profile(str(ROOT / "configs/cluster/test.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml:1: not YAML"):
        load_profile(str(broken))
    assert load_profile("local").scheduler == "local"
