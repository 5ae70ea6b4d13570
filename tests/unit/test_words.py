"""Plain words: phrases that a reader of the field stumbles over do not come back into docs, docstrings and comments.

Each phrase stands beside its replacement. The list is short, and a phrase is on it only if it is always wrong.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("mmscale", "launch", "slurm", "checkpoints_tools")
# Pages that keep their wording: a diary, and what older versions were announced with.
EXEMPT = {ROOT / "docs" / "log.md", ROOT / "CHANGELOG.md"}
FILES = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *(path for source in SOURCES for path in (ROOT / source).rglob("*.py")),
    }
    - EXEMPT
)

PLAIN = {
    r"training goes on": "training continues",
    r"go(es)? on from": "resume(s) from, continue(s) from",
    r"the run goes on": "the run continues",
    r"\banew\b": "again",
    r"without a word": "silently",
    r"\bwhoever\b": "name who: the caller, the user, the parent process",
    r"set aside as": "renamed to .bad",
    r"nobody can tell": "it is unknown",
    r"'s (business|affair)\b": "name the module and what it does: 'loader.py decides'",
    r"\bit is told\b": "the caller passes",
    r"\btold apart\b": "distinguished",
    r"what (the )?\w+ (consists of|is), it is": "subject, verb, object",
    r"\bcondemn(s|ed)?\b": "quarantine",
    r"\bgo_on_at\b": "seek",
    r"\bsettled?\(": "materialized()",
    r"the border of (a|the) step|a step's border|this border": "step boundary",
}


@functools.cache
def _texts() -> dict[Path, str]:
    return {path: path.read_text() for path in FILES}


@pytest.mark.parametrize("phrase", PLAIN)
def test_words_are_plain(phrase: str) -> None:
    # Over line breaks, and over the # of a comment that goes on in the next line.
    pattern = re.compile(phrase.replace(" ", r"\s+(?:#\s+)?"), flags=re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}"
        for path, text in _texts().items()
        for match in pattern.finditer(text)
    ]
    assert not found, f"write {PLAIN[phrase]!r} instead: {found}"
