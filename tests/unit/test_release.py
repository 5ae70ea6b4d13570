"""The changelog's sections, and what `make tag` refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import release

ROOT = Path(__file__).parents[2]
CHANGELOG = "# Changelog\n\n## Unreleased\n\n## 0.2.0 (2026-12-24)\n\n- New.\n\n## 0.1.0 (2026-11-30)\n\n- First.\n"


def git(root: Path, *arguments: str) -> None:
    user = ("-c", "user.name=Someone", "-c", "user.email=someone@example.org", "-c", "tag.gpgSign=false")
    subprocess.run(["git", "-C", str(root), *user, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A release that has not been tagged."""
    (tmp_path / "mmscale").mkdir()
    (tmp_path / "mmscale" / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / "CITATION.cff").write_text("version: 0.2.0\ndate-released: 2026-12-24\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "0.2.0")
    return tmp_path


def test_the_changelog_is_in_the_order_of_versions_and_dates() -> None:
    released = release.sections((ROOT / "CHANGELOG.md").read_text())
    assert released and all(text for _, text in released.values())
    versions = [tuple(map(int, version.split("."))) for version in released]
    assert versions == sorted(versions, reverse=True)
    dates = [date for date, _ in released.values()]
    assert dates == sorted(dates, reverse=True)


def test_a_release_gives_its_section(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(checkout) == 0
    assert capsys.readouterr().out == "mmscale 0.2.0\n\n- New.\n"
    git(checkout, "tag", "v0.2.0")
    assert release.main(checkout) == 1
    assert "the tag v0.2.0 exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("mmscale/__init__.py", "0.2.0", "0.3.0", "has no section `## 0.3.0 (date)`"),
        ("mmscale/__init__.py", "0.2.0", "0.1.0", "is 0.1.0, and the newest section of CHANGELOG.md is another"),
        ("CHANGELOG.md", "- New.", "", "the section 0.2.0 of CHANGELOG.md is empty"),
        ("CHANGELOG.md", "## Unreleased\n", "## Unreleased\n\n- Newer.\n", "has unreleased changes"),
        ("CITATION.cff", "version: 0.2.0", "version: 0.1.0", "CITATION.cff lacks `version: 0.2.0`"),
        ("CITATION.cff", "-24", "-25", "CITATION.cff lacks `date-released: 2026-12-24`"),
        ("CHANGELOG.md", "- First.", "- The first.", "there are changes that are not committed"),
    ],
)
def test_what_is_no_release(
    checkout: Path, capsys: pytest.CaptureFixture[str], file: str, before: str, after: str, said: str
) -> None:
    content = (checkout / file).read_text()
    assert before in content
    (checkout / file).write_text(content.replace(before, after))
    if "not committed" not in said:
        git(checkout, "commit", "-am", "changed")
    assert release.main(checkout) == 1
    assert said in capsys.readouterr().err
