"""The quickstart's last lines: both targets are named, and CI fails where one is missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import quickstart_summary


@pytest.mark.parametrize(
    ("read", "drawn", "missed"),
    [(0.85, 0.4, 0), (0.849, 0.4, 1), (0.9, 0.395, 1), ("nan", 0.5, 1), (0.1, 0.1, 2)],
)
def test_targets(
    read: float | str, drawn: float, missed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"run": "r/hf", "routing": "causal", "accuracy/digit": read}))
    (tmp_path / "drawings.json").write_text(json.dumps({"sheet": "r/samples.png"}))
    found = {"asked": 200, "share": drawn, "ceiling": 0.99}
    (tmp_path / "recognition.json").write_text(json.dumps(found))
    assert quickstart_summary.main(tmp_path, strict=False) == 0
    assert quickstart_summary.main(tmp_path, strict=True) == int(missed > 0)
    said = capsys.readouterr().out.split("pictures:")[0]
    assert said.count("MISSED") == missed and said.count("reached") == 2 - missed
    assert "target 85%" in said and "target 40%" in said and "causal routing" in said
