"""Rejected documents are counted by reason, and the counts are printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.cli import main
from mmscale.data.prepared.rejected_reasons import Reason, reasons


def test_reasons_that_differ_in_names_and_numbers_are_one(tmp_path: Path) -> None:
    said = [f"image img/{number:05x}.png is missing" for number in range(7)]
    said += [f"{80 + number} tokens are more than data.prepare.max_document_tokens = 64" for number in range(3)]
    said += ["unknown key 'task'", "unknown key 'split'"]
    rows = [{"where": f"a.jsonl:{place}", "id": str(place), "reason": one} for place, one in enumerate(said, start=1)]
    file = tmp_path / "rejected.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert reasons(file, most=2) == [Reason(7, said[0], "a.jsonl:1"), Reason(3, said[7], "a.jsonl:8")]
    assert [one.documents for one in reasons(file)] == [7, 3, 2]


def test_missing_pictures_are_counted_where_they_are_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [{"id": str(n), "content": [{"type": "text", "text": f"the number {n} " * 9}]} for n in range(40)]
    lines += [{"id": f"{n}b", "content": [{"type": "image", "path": f"img/{n}.png"}]} for n in range(10)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert main(["init", "my", "--preset", "own-data"]) == 0
    assert main(["data", "prepare", "my/configs/own.yaml", "data.prepare.image=null", "--out", "out"]) == 0
    assert "rejected: 10 documents, the first: documents.jsonl:41: " in capsys.readouterr().err
