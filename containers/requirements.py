"""Prints the dependencies in pyproject.toml or the versions of constraints.txt, for images; checks installed versions.

requirements.py [EXTRA,...] [--without NAME ...]     dependencies, with those of the extras
requirements.py --constraints [--without NAME ...]   constraints.txt without some packages (`nvidia`: and all nvidia-*)
requirements.py --check NAME ...                     ends with 1 if an installed version does not fit pyproject.toml

It uses the standard library only, and `packaging` for --check.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

TOP = Path(__file__).parents[1]


def name_of(requirement: str) -> str:
    """The package that a requirement names, normalized."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def project() -> dict[str, list[str]]:
    """Requirements of the project under "", and of each extra under its name."""
    table = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"": table["dependencies"], **table["optional-dependencies"]}


def requirements(extras: Sequence[str]) -> list[str]:
    """Requirements of the project with extras, without those that name the project itself."""
    known = project()
    found = [line for part in ("", *extras) for line in known[part]]
    return [line for line in found if name_of(line) != "mmscale"]


def without(lines: Sequence[str], names: Sequence[str]) -> list[str]:
    """Lines that name none of some packages."""
    left_out = {name.lower() for name in names}
    return [
        line
        for line in lines
        if name_of(line) not in left_out and not any(name_of(line).startswith(f"{name}-") for name in left_out)
    ]


def misfits(names: Sequence[str]) -> list[str]:
    """Installed packages whose version does not fit, one line each."""
    from packaging.requirements import Requirement

    found = []
    for line in (line for lines in project().values() for line in lines if name_of(line) in names):
        wanted = Requirement(line)
        try:
            there = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            found.append(f"{wanted.name} is not installed")
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            found.append(f"{wanted.name} {there} does not fit {wanted.specifier}")
    return found


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="?", default="")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--constraints", action="store_true")
    parser.add_argument("--check", nargs="+", default=[], metavar="NAME")
    given = parser.parse_args()
    if given.check:
        problems = misfits(given.check)
        sys.stderr.write("".join(f"{line}\n" for line in problems))
        return 1 if problems else 0
    if given.constraints:
        text = (TOP / "constraints.txt").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    else:
        lines = requirements([extra for extra in given.extras.split(",") if extra])
    sys.stdout.write("".join(f"{line}\n" for line in without(lines, given.without)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
