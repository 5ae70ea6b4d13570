"""The published table of routing measurements is what the measured curves give (docs/measurements)."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"


def test_the_table_follows_from_the_curves() -> None:
    rows = runpy.run_path(str(DOCS / "measurements" / "routing.py"))["table"](
        json.loads((DOCS / "measurements" / "routing.json").read_text())
    )
    page = (DOCS / "routing.md").read_text()
    assert len(rows) == 18 and all(row in page for row in rows)
