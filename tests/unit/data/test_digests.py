"""Prepared files are what was prepared, byte by byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmscale.cli import main
from mmscale.data import digests
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.prepare import prepare
from mmscale.errors import DataError
from tests.unit.data.samples import config, image, save_picture, text, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two parts and both splits, with both tokenizers."""
    folder = tmp_path_factory.mktemp("documents")
    records = []
    for number in range(12):
        save_picture(folder / f"{number}.png", number)
        records.append({"id": f"d{number}", "content": [text(f"picture {number}"), image(f"{number}.png")]})
    file = write_jsonl(folder / "a.jsonl", records)
    prepare(config(documents=(str(file),), part_documents=6), folder / "set", progress=False)
    return folder / "set"


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "set")


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    status = main(["data", "verify", str(folder), "--json"])
    said = capsys.readouterr()
    return status, json.loads(said.out) if said.out else {}, said.err


def test_every_file_that_is_read_has_one(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = digests.read(data)
    assert wanted is not None
    own = {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}
    without = {name for name in own - wanted.keys() if not name.startswith(("done/", "."))}
    assert without == {"manifest.json", "digests.json", "source.json", "rejected.jsonl"} and wanted.keys() <= own
    assert sum(name.endswith(".bin") for name in wanted) >= 3
    status, result, _ = verify(data, capsys)
    assert (status, result["damaged"], result["digests"]) == (0, {}, True) and result["files"] == len(wanted)


def test_every_flipped_bit_is_found(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every file, of which most have no other check."""
    for name in digests.read(data) or {}:
        file = data / name
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        status, result, said = verify(data, capsys)
        assert status == 3 and result["damaged"] == {name: "has another content than was prepared"}
        assert f"{name} has another content" in said and "fix: copy the data set again" in said
        file.write_bytes(before)


def test_a_missing_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(name for name in digests.read(data) or {} if name.endswith(".meta.npy"))
    (data / name).unlink()
    assert verify(data, capsys)[1]["damaged"] == {name: "is missing"}


def test_a_part_that_is_made_anew_has_the_digests_of_before(made: Path, data: Path) -> None:
    """Digests are taken while a part is written, and after a broken off run from its record."""
    for name in ("manifest.json", "digests.json", "train/00001.bin", "done/00001.json"):
        (data / name).unlink()
    done = json.loads((data / "done/00000.json").read_text())
    assert done.pop("digests")
    (data / "done/00000.json").write_text(json.dumps(done))  # as before there were digests
    documents = made.parent / "a.jsonl"
    prepare(config(documents=(str(documents),), part_documents=6), data, progress=False)
    assert digests.read(data) == digests.read(made)


def test_data_of_before(data: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no digests, and is the same data as with them."""
    (data / digests.DIGESTS).unlink()
    status, result, _ = verify(data, capsys)
    assert (status, result["digests"], result["damaged"]) == (0, False, {})
    assert identity_of(data, read_manifest(data)) == identity_of(made, read_manifest(made))


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": 1}', '{"format": 2, "algorithm": "xxh3_128", "files": {}}', "[" * 9999]
    + [f'{{"format": 1, "algorithm": "xxh3_128", "files": {{"{name}": "0"}}}}' for name in ("../a", "/etc/passwd")],
)
def test_damaged_digests(data: Path, content: str) -> None:
    (data / digests.DIGESTS).write_text(content)
    with pytest.raises(DataError, match=r"digests\.json"):
        digests.read(data)


def test_one_wrong_read_is_no_damage(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that flips on the way to this host, once."""
    right, wrong = digests.digest_of, iter(["0" * 32])
    monkeypatch.setattr(digests, "digest_of", lambda file, **kwargs: next(wrong, None) or right(file, **kwargs))
    assert list(digests.verify(data, digests.read(data) or {})) == []


def test_it_gives_up_when_it_is_told(data: Path) -> None:
    name = "train/00000.bin"
    (data / name).write_bytes(b"\xff" * (data / name).stat().st_size)
    assert list(digests.verify(data, {name: "0"}, stopped=lambda: True)) == []
