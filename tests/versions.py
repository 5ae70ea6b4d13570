# Chooses tests that call megatron-core and transformers; the rest of the suite does not depend on their versions.
"""Tests with other versions of Python, megatron-core and transformers than the pinned ones.

make test-versions                                             every combination, in .versions/
make test-versions VERSIONS='--only 3.12-0.19.2 --tests layouts'   some of them, and some of their tests
python -m tests.versions FOLDER --list                         names and tests; nothing is installed
python -m tests.versions FOLDER --table                        the table of what has run so far

Each combination gets an environment of its own with mmscale, megatron-core, transformers and what depends on their
versions. All other pins of constraints.txt, with torch several gigabytes, are installed once per Python and shared.
Results are kept in FOLDER/NAME/results.json. What has passed is not repeated, unless its environment is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from checkpoints_tools.huggingface.shipped.versions_moma import NEWEST, OLDEST
from mmscale.runtime.doctor import MEGATRON

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PYTHONS = ("3.11", "3.12", "3.13")
MEGATRONS = (MEGATRON, "0.17.1", "0.18.2", "0.19.2")  # the newest patch of each
# Python that a version of megatron-core requires, by its first version.
NEEDS_PYTHON = (("0.17", "3.12"), ("0", "3.11"))
HUGGINGFACE = "tests/unit/checkpoints_tools/huggingface"
EXPORTS = (
    f"{HUGGINGFACE}/test_forward_arguments.py",
    f"{HUGGINGFACE}/test_modeling_moma.py",
    f"{HUGGINGFACE}/test_processing_moma.py",
    f"{HUGGINGFACE}/test_export_matrix.py",
    "tests/unit/checkpoints_tools/test_conventions.py",
)
# Tests of a combination with the newest transformers; with the oldest one, those of exports alone.
TESTS: dict[str, tuple[str, ...]] = {
    "layouts": ("tests/distributed/test_layouts.py",),
    "runtime": ("tests/unit/runtime",),
    "model": ("tests/unit/model",),
    "training": ("tests/unit/train",),
    "checkpoints": ("tests/unit/checkpoint",),
    "exports": EXPORTS,
}
# Run by this Python, with the other one as MMSCALE_OTHER_PYTHON.
RESUME = ("-m", "exhaustive", "tests/end_to_end/test_resumed_versions.py")
REPLACED = {"megatron-core", "transformers"}
# Pins that a version of transformers other than the pinned one may contradict.
FOLLOW_TRANSFORMERS = {"tokenizers", "huggingface-hub"}


@dataclass(frozen=True)
class Combination:
    """One environment: Python as 3.12, the others as versions of packages."""

    python: str
    megatron: str
    transformers: str

    @property
    def name(self) -> str:
        return f"{self.python}-{self.megatron}-{self.transformers}"

    @property
    def tests(self) -> tuple[str, ...]:
        return (*TESTS, "resume") if self.transformers == NEWEST else ("exports",)

    def constraints(self) -> str:
        """constraints.txt without what this combination replaces."""
        return pins_without(REPLACED if self.transformers == NEWEST else REPLACED | FOLLOW_TRANSFORMERS)


def pins_without(packages: set[str]) -> str:
    """constraints.txt without some packages."""
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    return "\n".join(line for line in lines if _package(line) not in packages) + "\n"


def _package(line: str) -> str:
    return Requirement(line).name.lower().replace("_", "-")


def combinations() -> Iterator[Combination]:
    """Every Python with every megatron-core that it can have; the oldest transformers with the newest of them.

    megatron-core and transformers do not import each other, so their product would test nothing more.
    """
    for python in PYTHONS:
        possible = [version for version in MEGATRONS if Version(python) >= Version(_needed(version))]
        for megatron in possible:
            yield Combination(python, megatron, NEWEST)
        yield Combination(python, possible[-1], OLDEST)


def _needed(megatron: str) -> str:
    return next(python for first, python in NEEDS_PYTHON if Version(megatron) >= Version(first))


def interpreter(python: str) -> str | None:
    """Path of a Python: python3.12 of PATH, or the newest 3.12 of pyenv."""
    if found := shutil.which(f"python{python}"):
        ended = subprocess.run([found, "-V"], capture_output=True, text=True)
        if ended.returncode == 0:  # pyenv's shims exist for versions that are not chosen
            return found
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found_here = sorted(versions.glob(f"{python}.*/bin/python"), key=lambda path: Version(path.parts[-3]))
    return str(found_here[-1]) if found_here else None


class NotInstalledError(Exception):
    """An environment that cannot be made; the text says why."""


def environment(one: Combination, folder: Path, pip_args: list[str]) -> Path:
    """Python of the combination's environment, which is made if it is not complete.

    Raises:
        NotInstalledError: there is no such Python, or pip fails.
    """
    common = _environment(folder / f"shared-{one.python}", one.python)
    requirements = common.parents[1] / "requirements.txt"
    requirements.write_text(pins_without(REPLACED | FOLLOW_TRANSFORMERS))
    (torch,) = (line for line in requirements.read_text().splitlines() if _package(line) == "torch")
    # torch with what its build needs; the others need nothing that is not pinned, or what a combination replaces.
    _install(common, [*pip_args, torch], [*pip_args, "--no-deps", "-r", str(requirements)])
    own = _environment(folder / one.name, one.python)
    _packages(own).joinpath("shared.pth").write_text(f"{_packages(common)}\n")
    constraints = own.parents[1] / "constraints.txt"
    constraints.write_text(one.constraints())
    versions = [f"megatron-core=={one.megatron}", f"transformers=={one.transformers}"]
    _install(own, [*pip_args, "-c", str(constraints), "-e", f"{ROOT}[dev]", *versions])
    return own


def _packages(python: Path) -> Path:
    return next((python.parents[1] / "lib").glob("python*/site-packages"))


def _environment(place: Path, python: str) -> Path:
    own = place / "bin" / "python"
    if not own.exists():
        found = interpreter(python)
        if found is None:
            raise NotInstalledError(f"there is no python{python}")
        _check([found, "-m", "venv", str(place)])
        _check([str(own), "-m", "pip", "install", "--quiet", "--upgrade", "pip"])
    return own


def _install(python: Path, *requests: list[str]) -> None:
    """Install once: the arguments of pip are noted beside the environment, with the files that they refer to."""
    note = python.parents[1] / "installed.json"
    asked = [*requests, [(ROOT / "pyproject.toml").read_text(), CONSTRAINTS.read_text()]]
    if note.exists() and json.loads(note.read_text()) == asked:
        return
    for arguments in requests:
        quiet = ["--disable-pip-version-check", "--quiet", "--no-compile"]  # few of the modules are ever imported
        _check([str(python), "-m", "pip", "install", *quiet, *arguments])
    note.write_text(json.dumps(asked))


def _check(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if ended.returncode != 0:
        errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or [ended.stderr]
        raise NotInstalledError(errors[0].strip())


def tested(one: Combination, folder: Path, python: Path, *, names: list[str]) -> dict[str, str]:
    """Run tests of a combination; pytest's summary of each, kept in results.json as soon as it is known."""
    note = folder / one.name / "results.json"
    results: dict[str, str] = json.loads(note.read_text()) if note.exists() else {}
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    plain |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    for name in names:
        if passed(results.get(name, "")):
            continue
        by, what = (sys.executable, RESUME) if name == "resume" else (str(python), TESTS[name])
        command = [by, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore", *what]
        more = {"MMSCALE_OTHER_PYTHON": str(python)} if name == "resume" else {}
        log = folder / one.name / f"{name}.log"
        with log.open("w") as out:
            ended = subprocess.run(command, cwd=ROOT, env=plain | more, stdout=out, stderr=subprocess.STDOUT)
        results[name] = summary(log.read_text(), ended.returncode)
        note.write_text(json.dumps(results))
        print(f"{one.name}  {name}: {results[name]}", flush=True)
    return results


def summary(text: str, status: int) -> str:
    """'17 passed, 2 skipped' of pytest's last line, without times; or the exit status if there is no such line."""
    counts = re.findall(r"(\d+ (?:failed|passed|skipped|errors?))(?=[, ])", (text.splitlines() or [""])[-1])
    return ", ".join(counts) if counts and (status == 0 or not passed(", ".join(counts))) else f"exit status {status}"


def passed(result: str) -> bool:
    """Whether a summary has tests that passed and none that failed."""
    return "passed" in result and "failed" not in result and "error" not in result


def table(folder: Path) -> list[str]:
    """The results so far in Markdown; a row per combination, with why one was not tried."""
    lines = ["| Python | megatron-core | transformers | result |", "| --- | --- | --- | --- |"]
    for one in combinations():
        note = folder / one.name / "results.json"
        results = json.loads(note.read_text()) if note.exists() else {}
        cells = [f"{name}: {results.get(name, 'not tried')}" for name in one.tests] if results else ["not tried"]
        lines.append(f"| {one.python} | {one.megatron} | {one.transformers} | {'; '.join(cells)} |")
    return lines


def main() -> int:
    """Make the environments, run the tests, print the table. Exit status 1: something failed or was not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the environments and their results")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="names that contain this text")
    parser.add_argument("--tests", action="append", choices=(*TESTS, "resume"), help="only these of its tests")
    parser.add_argument("--pip-args", default="", help="further arguments for pip, in one text")
    parser.add_argument("--list", action="store_true", help="print the combinations and end")
    parser.add_argument("--table", action="store_true", help="print the results so far and end")
    asked = parser.parse_args()
    chosen = [one for one in combinations() if not asked.only or any(text in one.name for text in asked.only)]
    if not chosen:
        print(f"error: no combination's name contains {' or '.join(asked.only)}", file=sys.stderr)
        print("remedy: choose from those that --list prints", file=sys.stderr)
        return 2
    if asked.list:
        print("\n".join(f"{one.name}  {', '.join(one.tests)}" for one in chosen))
        return 0
    good = True
    for one in [] if asked.table else chosen:
        try:
            python = environment(one, asked.folder.resolve(), asked.pip_args.split())
        except NotInstalledError as why:
            print(f"{one.name}  not tried: {why}", flush=True)
            good = False
            continue
        names = [name for name in one.tests if not asked.tests or name in asked.tests]
        good &= all(map(passed, tested(one, asked.folder.resolve(), python, names=names).values()))
    print("\n".join(table(asked.folder)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
