"""One YAML reader for every file and override: scalars of YAML 1.2, bounds, and a writer that it reads back."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch.profile import load_profile
from mmscale.config import yaml_text
from mmscale.config.document import ConfigDocument, apply_override, read_file
from mmscale.config.load import flatten, load
from mmscale.errors import ConfigError
from mmscale.report import facts
from tests.bounded_work import bounded_work

ROOT = Path(__file__).parents[3]
MODEL = "model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 64, num_attention_heads: 4, kind: dense}\n"

# What YAML 1.1, which PyYAML reads by itself, takes for something else than a person meant.
SURPRISES: dict[str, Any] = {
    "010": "010",
    "07": "07",
    "08": "08",
    "0o10": 8,
    "0x10": 16,
    "0b11": "0b11",
    "1:30": "1:30",
    "12:30:00": "12:30:00",
    "1:30.5": "1:30.5",
    "1_000": "1_000",
    "1_000.5": "1_000.5",
    "no": "no",
    "yes": "yes",
    "on": "on",
    "off": "off",
    "y": "y",
    "N": "N",
    "true": True,
    "False": False,
    "2024-01-01": "2024-01-01",
    "2024-01-01 10:00:00": "2024-01-01 10:00:00",
    "~": None,
    "null": None,
    "": None,
    "=": "=",
    "<<": "<<",
    "1e-4": 1e-4,
    "3E5": 3e5,
    "+5": 5,
    "-0": 0,
    ".5": 0.5,
    "5.": 5.0,
    ".inf": math.inf,
    "-.Inf": -math.inf,
    "inf": "inf",
    "nan": "nan",
    "9" * 300: "9" * 300,
    "1e400": math.inf,
    "!!str 010": "010",
    "'5'": "5",
    '"\\u0031"': "1",
}
REFUSED = (
    "!!int 010",
    "!!bool yes",
    "!!float 1",
    "!!timestamp 2024-01-01",
    "!!python/name:os.system x",
    "!!binary aGk=",
    "!x 5",
)


def given_by_override(text: str) -> Any:
    document = ConfigDocument()
    apply_override(document, f"a={text}", defaults={})
    return document.data["a"]


def given_by_file(text: str, folder: Path) -> Any:
    file = folder / "a.yaml"
    file.write_text(f"a: {text}\n")
    return read_file(file).data["a"]


@pytest.mark.parametrize("text", SURPRISES)
def test_scalars(text: str, tmp_path: Path) -> None:
    for value in (given_by_override(text), given_by_file(text, tmp_path)):
        assert value == SURPRISES[text] and type(value) is type(SURPRISES[text])


@pytest.mark.parametrize("text", REFUSED)
def test_tags_that_do_not_fit(text: str) -> None:
    with pytest.raises(ConfigError, match=r"override: a: .* write a plain value without a tag"):
        given_by_override(text)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=010", 10),
        ("train.steps=08", 8),
        ("train.steps=0o10", 8),
        ("train.steps=1_000", 1000),
        ("train.steps=1:30", None),
        ("train.steps=0b11", None),
        ("train.steps=9" + "9" * 300, None),
        ("train.steps=true", None),
        ("optim.power_exponent=false", None),
        ("optim.lr=1:30.5", None),
        ("optim.lr=01e-3", 1e-3),
        ("run.name=010", "010"),
        ("run.name=1_000", "1_000"),
        ("run.name=1e3", "1e3"),
        ("run.name=no", "no"),
        ("run.dir=12:30:00", "12:30:00"),
        ("checkpoint.deadline=1:30:00", 5400.0),
        ("checkpoint.deadline=12:30:00", 45_000.0),
        ("checkpoint.deadline=1:30", None),  # of an hour or of a minute?
        ("checkpoint.deadline=1:99:00", None),
        ("train.dry_run=no", False),
        ("train.dry_run=on", True),
    ],
)
def test_settings_get_what_a_person_meant(tmp_path: Path, override: str, value: object) -> None:
    key, _, text = override.partition("=")
    file = tmp_path / "run.yaml"
    file.write_text(MODEL)
    section, _, leaf = key.partition(".")
    whole = tmp_path / "whole.yaml"
    whole.write_text(f"{MODEL}{section}:\n  {leaf}: {text}\n")
    for path, overrides in ((file, [override]), (whole, [])):
        if value is None:
            with pytest.raises(ConfigError, match=f"{key} is "):
                load(path, overrides)
        else:
            found = flatten(load(path, overrides))[key]
            assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("time: 12:30:00", "time", 750),
        ("time: 2-00:00:00", "time", 2880),
        ("time: 010", "time", 10),
        ("nodes: 010", "nodes", 10),
        ("exclusive: no", "exclusive", False),
        ("partition: 007", "partition", "007"),
        ("partition: on", "partition", "on"),
        ("account: 1e3", "account", "1e3"),
        ("sbatch: {begin: 16:00, comment: 010, nice: 5, contiguous: true}", "sbatch", {
            "begin": "16:00", "comment": "010", "nice": 5, "contiguous": True,
        }),
        ("preflight:", "preflight", load_profile("local").preflight.model_dump()),
    ],
)  # fmt: skip
def test_cluster_profiles(tmp_path: Path, text: str, key: str, value: object) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(f"tasks_per_node: 1\n{text}\n")
    assert load_profile(str(file)).model_dump()[key] == value


@pytest.mark.parametrize(
    "text", ["time: 1.5", "time: true", "nodes: true", "nodes: 1e300", "time: 1e9", "signal_delay: .inf"]
)
def test_profiles_name_the_line_of_a_wrong_value(tmp_path: Path, text: str) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(f"tasks_per_node: 1\n{text}\n")
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}:2: {text.partition(':')[0]}"):
        load_profile(str(file))
    file.write_text(f"{text}\n{text}\n")
    with pytest.raises(ConfigError, match="is given twice"):
        load_profile(str(file))


def test_an_environment_variable_keeps_its_characters(tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    values = {"A": "010", "B": "no", "C": "1.50", "D": "1e3", "E": "true", "F": "0x1F", "G": "5"}
    lines = [f"  {name}: {{value: {value}, reason: test}}" for name, value in values.items()]
    file.write_text("\n".join(["tasks_per_node: 1", "environment:", *lines]))
    found = load_profile(str(file)).environment
    assert {name: variable.value for name, variable in found.items()} == values


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(10**30), max_value=10**30)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20)
    | st.sampled_from([*SURPRISES])
)
DATA = st.dictionaries(
    st.text("abc.<=~ 01:", min_size=1, max_size=6),
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner)),
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(DATA)
@example({"a": ["010", "1:30", "1e3", "0o7", "no", "", "~", "=", "2024-01-01"]})
def test_what_is_written_is_read_back(data: dict[str, Any]) -> None:
    text = yaml_text.dump(data)
    document = ConfigDocument()
    apply_override(document, f"a={text}", defaults={})
    assert document.data["a"] == data
    # Texts stay texts for a reader of YAML 1.1 too.
    again = yaml.safe_load(yaml_text.dump({"a": [value for value in data.values() if isinstance(value, str)]}))
    assert again["a"] == [value for value in data.values() if isinstance(value, str)]


WORDS = ["&a ", "*a", "!!", "- ", ": ", "\n  ", "---\n", "...", "%YAML 1.1\n", "\x00", "\ufeff"]
PIECES = st.sampled_from([*"[]{}:,-?&*!|>%@`#'\"\n\t aZ09.~=<", *WORDS])


@settings(deadline=None, max_examples=200)
@given(st.lists(PIECES, max_size=60).map("".join))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    try:
        with bounded_work():
            apply_override(ConfigDocument(), f"a={text}", defaults={})
    except ConfigError as error:
        assert error.remedy and "\n" not in error.cause  # noqa: PT017  # most texts are right


def _aliases(levels: int) -> str:
    lines = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, levels)]
    return "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *lines])


HOSTILE = {
    "a kilobyte of anchors": _aliases(15),
    "an anchor that contains itself": "a: &a {b: *a, c: *a}",
    "brackets": "[" * 100_000,
    "braces": "{a: " * 50_000,
    "dashes": "- " * 100_000,
    "questions": "? " * 100_000,
    "a long word": "a: " + "x" * 10_000_000,
    "many keys": "\n".join(f"key{number}: 1" for number in range(9_900)),
    "many keys in one section": "train:\n" + "\n".join(f"  key{number}: 1" for number in range(9_900)),
    "many wrong values": "train:\n  modality_weights:\n" + "\n".join(f"    k{number}: x" for number in range(9_000)),
    "a long key": "x" * 200_000 + ": 1",
    "a long quoted key": f'model: {{"{"y" * 200_000}": 1}}',
    "many quotes": "a: '" + "x\n\n" * 60_000,
    "a long number": "train: {steps: " + "9" * 200_000 + "}",
    "a long exponent": "optim: {lr: 1e" + "9" * 1000 + "}",
    "a long wrong number": "optim: {lr: " + "1_" * 100_000 + "}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(HOSTILE[name])
    with bounded_work():
        for read in (load, lambda path: load_profile(str(path))):
            with pytest.raises(ConfigError) as error:
                read(file)
            assert error.value.remedy and len(error.value.cause) < 20_000
        assert facts.settings(tmp_path) == {}


@pytest.mark.parametrize(
    "override", ["a" * 200_000 + "=1", "a." * 200_000 + "a=1", "x" * 300_000, "a=" + "[" * 300_000]
)
def test_hostile_overrides_are_refused(tmp_path: Path, override: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MODEL)
    with pytest.raises(ConfigError) as error:
        load(file, [override])
    assert len(str(error.value)) < 500


def test_a_device_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError):
        read_file(Path("/dev/zero"))


def test_old_run_folders_read_as_before(tmp_path: Path) -> None:
    data = {
        "run": {"name": "1e3", "dir": "010"},
        "optim": {"lr": 1e-5},
        "train": {"steps": 8, "dry_run": True},
        "x": None,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    assert facts.settings(tmp_path)["optim.lr"] == 1e-5
    assert facts.settings(tmp_path)["run.dir"] == "010"
    assert facts.settings(tmp_path)["train.steps"] == 8


def test_no_other_module_reads_yaml() -> None:
    found = [
        str(file.relative_to(ROOT))
        for folder in ("mmscale", "launch", "slurm", "checkpoints_tools")
        for file in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import yaml|from yaml)", file.read_text(), re.MULTILINE)
    ]
    assert sorted(found) == ["mmscale/config/document.py", "mmscale/config/yaml_text.py"]
