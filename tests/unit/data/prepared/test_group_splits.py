"""Groups with documents in both splits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmscale.cli import main
from mmscale.data.documents.schema import Document, SplitName, Text
from mmscale.data.prepared.group_splits import group_splits, keep_groups
from mmscale.data.prepared.prepare import prepare
from tests.unit.data.prepared.test_leaks import on, said
from tests.unit.data.samples import config, text, write_jsonl

LINE = "documents in both splits, because documents that name a split keep it"


def records(splits: Sequence[str | None], *, group: str | None = "g") -> list[dict[str, Any]]:
    """20 ordinary documents, and some of one group with these splits."""
    found: list[dict[str, Any]] = [{"id": f"o{n}", "content": [text(f"other {n}")]} for n in range(20)]
    for n, split in enumerate(splits):
        own = {"id": f"d{n}" if group else "same", "content": [text(f"text {n}")]}
        found.append(own | ({"group": group} if group else {}) | ({"split": split} if split else {}))
    return found


CASES: list[tuple[tuple[str | None, ...], bool]] = [
    (("train", "validation"), True),
    (("validation", "validation", "train"), True),
    (("train", "train"), False),
    ((None, None), False),
    ((None, "train", "validation"), True),
]


@pytest.mark.parametrize(("group", "part_documents"), [("g", 1), (None, 1000)])
@pytest.mark.parametrize(("splits", "both"), CASES)
def test_a_group_in_both_splits_is_said(
    splits: tuple[str | None, ...],
    both: bool,
    group: str | None,
    part_documents: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = write_jsonl(tmp_path / "d.jsonl", records(splits, group=group)), tmp_path / "out"
    settings = config(documents=[str(file)], held_out=0.3, part_documents=part_documents)
    prepare(settings, out)
    err = capsys.readouterr().err
    assert (f"note: 1 group has {LINE}" in err) == both
    lines = [line for line in said(on({"path": str(out)})) if LINE in line]
    assert len(lines) == both
    assert main(["data", "inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups_in_both_splits"] == both
    if both:
        numbers = {split: 21 + splits.index(split) for split in ("train", "validation")}
        places = ", ".join(f"{split}: {file.name}:{number}" for split, number in numbers.items())
        assert f"(for instance {group or 'same'!r}, {places})" in err
        assert lines[0].startswith(f"note: 1 group of {out} has {LINE}")


def test_a_split_against_the_hash(tmp_path: Path) -> None:
    """One document of a group names a split; the others get that of the hash."""
    made = [_document("g", split=None), _document("g", split="train"), _document("g", split="validation")]
    hashed = made[0].split_for(0.5)
    other = made[1] if hashed == "validation" else made[2]
    keep_groups(tmp_path / "a.json", [made[0]], held_out=0.5)
    keep_groups(tmp_path / "b.json", [other], held_out=0.5)
    found = group_splits([tmp_path / "a.json", tmp_path / "b.json"])
    assert found is not None and (found.both, found.hashed) == (1, 1)
    assert "'g'" in found.example and f"{hashed}: by its hash" in found.example


def test_of_many_groups_a_part_is_kept(tmp_path: Path) -> None:
    """What is kept of all parts is the same range of hashes: none is missed in it, and none is invented."""
    names = [f"group {number}" for number in range(300)]
    for n, split in enumerate(("train", "validation")):
        own = [_document(name, split=split) for name in names[n * 100 : 200 + n * 100]]  # 100 in both
        keep_groups(tmp_path / f"{n}.json", own, held_out=0.5, kept=50)
    found = group_splits([tmp_path / "0.json", tmp_path / "1.json"])
    assert found is not None and 10 < found.both < 40
    (tmp_path / "1.json").write_text("{")
    assert group_splits([tmp_path / "0.json", tmp_path / "1.json"]) is None


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_a_share_without_effect_is_said(
    named: bool, given: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [one | {"split": "train" if n else "validation"} for n, one in enumerate(records(()))]
    file = write_jsonl(tmp_path / "d.jsonl", own if named else [*own, {"id": "x", "content": [text("x")]}])
    settings = ["vocab.modalities=[{name: text, size: 300}]", *(["data.prepare.held_out=0.1"] if given else [])]
    assert main(["data", "prepare", "--documents", str(file), "--out", str(tmp_path / "out"), *settings]) == 0
    assert ("data.prepare.held_out has no effect" in capsys.readouterr().err) == (named and given)


def _document(group: str, *, split: SplitName | None) -> Document:
    return Document("d", (Text("x"),), "d.jsonl:1", split=split, group=group)
