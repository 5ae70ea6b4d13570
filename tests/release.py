# `make tag` calls this. It does not build, sign or publish anything.
"""Checks that a checkout is a release, and prints the message of its tag: the section of CHANGELOG.md.

python -m tests.release
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_HEADING = re.compile(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", re.MULTILINE)
_VERSION = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)


def sections(changelog: str) -> dict[str, tuple[str, str]]:
    """Date and text of each released version, in the order of the file; the text after `## Unreleased` is left out."""
    found = list(_HEADING.finditer(changelog))
    starts = [*(one.start() for one in found), len(changelog)]
    return {one[1]: (one[2], changelog[one.end() : end].strip()) for one, end in zip(found, starts[1:], strict=True)}


def unreleased(changelog: str) -> str:
    """The text between `## Unreleased` and the newest release."""
    _, _, after = changelog.partition("## Unreleased\n")
    newest = _HEADING.search(after)
    return (after[: newest.start()] if newest else after).strip()


def problems(root: Path) -> list[str]:
    """What keeps the checkout from being the release that `mmscale.__version__` names."""
    version = _VERSION.search((root / "mmscale" / "__init__.py").read_text())
    assert version is not None
    changelog, citation = (root / "CHANGELOG.md").read_text(), (root / "CITATION.cff").read_text()
    found, released = [], sections(changelog)
    if version[1] not in released:
        return [f"CHANGELOG.md has no section `## {version[1]} (date)`"]
    date, text = released[version[1]]
    if next(iter(released)) != version[1]:
        found.append(f"mmscale.__version__ is {version[1]}, and the newest section of CHANGELOG.md is another")
    if not text:
        found.append(f"the section {version[1]} of CHANGELOG.md is empty")
    if unreleased(changelog):
        found.append("CHANGELOG.md has unreleased changes")
    wanted = (f"version: {version[1]}", f"date-released: {date}")
    found += [f"CITATION.cff lacks `{line}`" for line in wanted if line not in citation.splitlines()]
    git = ["git", "-C", str(root)]
    if subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout:
        found.append("there are changes that are not committed")
    if subprocess.run([*git, "tag", "--list", f"v{version[1]}"], check=True, capture_output=True, text=True).stdout:
        found.append(f"the tag v{version[1]} exists")
    return found


def main(root: Path = ROOT) -> int:
    """Print version and section, or what is missing; returns the exit status."""
    if found := problems(root):
        sys.stderr.write("".join(f"error: {one}\n" for one in found))
        sys.stderr.write("  fix: see Releases in CONTRIBUTING.md\n")
        return 1
    version, (_, text) = next(iter(sections((root / "CHANGELOG.md").read_text()).items()))
    sys.stdout.write(f"mmscale {version}\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
