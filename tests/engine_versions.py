"""tests/te_on_cpu over other versions of Transformer-Engine than the pinned one.

make test-engines                                            every version, in .versions/: two hours on two cores
make test-engines ENGINES='--only 2.20.2 --tests layers'     some of them, and some of their tests
python -m tests.engine_versions FOLDER --python PYTHON       with the megatron-core of another environment
python -m tests.engine_versions FOLDER --table               the table of what has run so far

Only the package's Python is downloaded, a megabyte for each version; plain torch replaces its compiled functions
(te_on_cpu/install.py). Results are kept in FOLDER/transformer-engine-VERSION/. What has passed is not repeated, unless
its folder is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from mmscale.runtime.engine_range import TRIED
from tests.versions import ROOT, passed, summary

CHECKS = ROOT / "tests" / "te_on_cpu"
# Files checks_*.py of te_on_cpu.
TESTS: dict[str, tuple[str, ...]] = {
    "layers": ("layers",),
    "attention": ("attention", "context"),
    "checkpoints": ("checkpoints",),
    "steps": ("steps", "benchmark"),
    "layouts": ("layouts",),
    "untied": ("untied", "untied_fp8"),
    "products": ("grouped_fp8", "fp4"),
    "ring": ("ring",),
}
_MEGATRON = "from importlib.metadata import version; print(version('megatron-core'))"


def unpacked(version: str, folder: Path, pip_args: list[str]) -> Path | None:
    """The folder with this version's Python; None: pip could not get it."""
    place = folder / f"transformer-engine-{version}"
    if not (place / "transformer_engine").is_dir():
        only = ["--no-deps", "--only-binary=:all:", "--target", str(place), f"transformer-engine=={version}"]
        quiet = ["--disable-pip-version-check", "--quiet", "--no-compile"]
        if subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *pip_args, *only], cwd=ROOT).returncode:
            return None
    return place


def tested(place: Path, python: str, names: list[str]) -> bool:
    """Run tests over an unpacked version; whether all of them passed. Keeps pytest's summaries by megatron-core."""
    megatron = subprocess.run([python, "-c", _MEGATRON], capture_output=True, text=True, check=True).stdout.strip()
    note = place / "results.json"
    results: dict[str, dict[str, str]] = json.loads(note.read_text()) if note.exists() else {}
    own = results.setdefault(megatron, {})
    paths = os.pathsep.join((str(place), str(ROOT)))
    settings = {"PYTHONPATH": paths, "MMSCALE_TRANSFORMER_ENGINE": str(place), "CUDA_VISIBLE_DEVICES": ""}
    for name in names:
        if passed(own.get(name, "")):
            continue
        files = [str(CHECKS / f"checks_{part}.py") for part in TESTS[name]]
        plain = ["-q", "-p", "no:cacheprovider", "-p", "tests.te_on_cpu.plugin", "-W", "ignore", "-m", "", "--tb=short"]
        log = place / f"{megatron}-{name}.log"
        with log.open("w") as out:
            ended = subprocess.run(
                [python, "-m", "pytest", *plain, *files],
                cwd=ROOT,
                env=os.environ | settings,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        own[name] = summary(log.read_text(), ended.returncode)
        note.write_text(json.dumps(results))
        print(f"{place.name}  megatron-core {megatron}  {name}: {own[name]}", flush=True)
    return all(passed(own[name]) for name in names)


def table(folder: Path) -> list[str]:
    """The results so far in Markdown: a row for each version and megatron-core."""
    lines = ["| Transformer-Engine | megatron-core | result |", "| --- | --- | --- |"]
    for version in TRIED:
        note = folder / f"transformer-engine-{version}" / "results.json"
        found: dict[str, dict[str, str]] = json.loads(note.read_text()) if note.exists() else {}
        for megatron, results in found.items():
            cells = [f"{name}: {results.get(name, 'not run')}" for name in TESTS]
            lines.append(f"| {version} | {megatron} | {'; '.join(cells)} |")
        if not found:
            lines.append(f"| {version} | | not run |")
    return lines


def main() -> int:
    """Unpack the versions, run the tests, print the table. Exit status 1: something failed or could not be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the unpacked versions and their results")
    parser.add_argument("--only", action="append", choices=TRIED, help="only these versions")
    parser.add_argument("--tests", action="append", choices=tuple(TESTS), help="only these tests")
    parser.add_argument("--python", default=sys.executable, help="of an environment with another megatron-core")
    parser.add_argument("--pip-args", default="", help="further arguments for pip, in one text")
    parser.add_argument("--table", action="store_true", help="print the results so far and end")
    asked = parser.parse_args()
    folder, good = asked.folder.resolve(), True
    for version in () if asked.table else asked.only or TRIED:
        place = unpacked(version, folder, asked.pip_args.split())
        if place is None:
            print(f"transformer-engine {version}  not run: pip could not download it", flush=True)
        good &= place is not None and tested(place, asked.python, asked.tests or list(TESTS))
    print("\n".join(table(folder)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
