"""Whether a checkpoint is whole: any changed, missing or added byte is found, and by whom which file is hashed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint import integrity
from mmscale.checkpoint.integrity import (
    MANIFEST,
    CheckpointManifest,
    DamagedError,
    FileRecord,
    NoManifestError,
    UnreadableError,
)
from mmscale.errors import CheckpointError

FLIPS = 100
SIZES = {
    ".metadata": 11_000,
    "__0_0.distcp": 300_000,
    "__1_0.distcp": 300_000,
    "common.pt": 2000,
    "metadata.json": 119,
    "mmscale.json": 700,
    "rng/rank_00000.pt": 15_000,
    "rng/rank_00001.pt": 15_000,
}


def make(folder: Path, *, seed: int = 0) -> Path:
    """A folder that looks like a checkpoint, with its manifest."""
    rng = random.Random(seed)
    (folder / "rng").mkdir(parents=True)
    for name, size in SIZES.items():
        (folder / name).write_bytes(rng.randbytes(size))
    files = integrity.digests(folder, integrity.sizes(folder))
    manifest = CheckpointManifest(10, 1, "abc", "0.1.0", {"world_size": 2, "tp": 1}, files)
    (folder / MANIFEST).write_text(manifest.text())
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "step_00000010")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "step_00000010"))


def test_what_was_written_is_whole_and_comes_back(folder: Path) -> None:
    assert integrity.verify(folder, step=10) == []
    manifest = integrity.read_manifest(folder)
    assert manifest.topology == {"world_size": 2, "tp": 1}
    assert {name: record.size for name, record in manifest.files.items()} == SIZES
    assert MANIFEST not in manifest.files


@pytest.mark.parametrize("name", [*SIZES, MANIFEST])
def test_every_flipped_bit_is_found(folder: Path, name: str) -> None:
    """100 of 100 at random places of every kind of file, the manifest included."""
    file, rng = folder / name, random.Random(name)
    before = file.read_bytes()
    found = 0
    for _ in range(FLIPS):
        content, place = bytearray(before), rng.randrange(len(before))
        content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        found += bool(integrity.verify(folder, step=10))
    assert found == FLIPS
    file.write_bytes(before)
    assert integrity.verify(folder, step=10) == []


def zero_block(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4096 : 2 * 4096] = bytes(4096)
    file.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def link(file: Path) -> None:
    target = file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(target)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a block of zeros": (lambda f: zero_block(f / "__0_0.distcp"), "__0_0.distcp has another content"),
    "two files swapped": (lambda f: swap(f / "__0_0.distcp", f / "__1_0.distcp"), "__1_0.distcp has another content"),
    "random states swapped": (
        lambda f: swap(f / "rng/rank_00000.pt", f / "rng/rank_00001.pt"),
        "rng/rank_00000.pt has another content",
    ),
    "another checkpoint's file": (
        lambda f: shutil.copyfile(make(f.parent / "other", seed=1) / "common.pt", f / "common.pt"),
        "common.pt has another content",
    ),
    "another checkpoint's manifest": (
        lambda f: shutil.copyfile(make(f.parent / "other", seed=1) / MANIFEST, f / MANIFEST),
        "has another content",
    ),
    "one byte less": (
        lambda f: os.truncate(f / "__1_0.distcp", 299_999),
        "__1_0.distcp has 299999 bytes instead of 300000",
    ),
    "one byte more": (lambda f: (f / "common.pt").open("ab").write(b"\0"), "common.pt has 2001 bytes instead of 2000"),
    "empty": (lambda f: os.truncate(f / ".metadata", 0), ".metadata has 0 bytes"),
    "deleted": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "a deleted folder": (
        lambda f: shutil.rmtree(f / "rng"),
        "rng/rank_00000.pt is missing; rng/rank_00001.pt is missing",
    ),
    "an extra file": (lambda f: (f / "__2_0.distcp").write_bytes(b""), "__2_0.distcp is not in the manifest"),
    "a link": (lambda f: link(f / "common.pt"), "common.pt is neither a file nor a folder"),
    "manifest cut": (lambda f: os.truncate(f / MANIFEST, 500), f"{MANIFEST} is damaged"),
    "manifest empty": (lambda f: os.truncate(f / MANIFEST, 0), f"{MANIFEST} is damaged"),
    "manifest is no UTF-8": (lambda f: (f / MANIFEST).write_bytes(b"\xff"), f"{MANIFEST} is damaged"),
    "manifest reformatted": (
        lambda f: (f / MANIFEST).write_text(json.dumps(json.loads((f / MANIFEST).read_text()))),
        "its own digest does not fit",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_and_names_the_file(folder: Path, fault: str) -> None:
    damage, said = FAULTS[fault]
    damage(folder)
    assert said in integrity.describe(integrity.verify(folder, step=10))
    with pytest.raises(CheckpointError, match="is damaged") as raised:
        integrity.require_intact(folder, step=10)
    assert raised.value.exit_status == 4 and raised.value.remedy


def test_a_checkpoint_of_another_step_under_this_name(folder: Path) -> None:
    assert integrity.verify(folder, step=20) == [f"{MANIFEST} belongs to step 10"]


def test_a_checkpoint_without_manifest_is_refused_unless_allowed(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(NoManifestError):
        integrity.verify(folder)
    with pytest.raises(CheckpointError, match=MANIFEST) as raised:
        integrity.require_intact(folder, step=10)
    assert "checkpoint.allow_missing" in raised.value.remedy
    integrity.require_intact(folder, step=10, allow_missing=True)


def test_a_manifest_of_a_later_format_is_no_damage(folder: Path) -> None:
    manifest = integrity.read_manifest(folder)
    later = CheckpointManifest(**{**vars(manifest), "format": 2})
    (folder / MANIFEST).write_text(later.text())
    with pytest.raises(CheckpointError, match="has format 2"):
        integrity.read_manifest(folder)


@pytest.mark.parametrize("where", [".", "rng", "common.pt", ".."])
def test_what_everyone_may_write_is_refused(folder: Path, where: str) -> None:
    path = folder / where
    path.chmod(path.stat().st_mode | 0o002)
    with pytest.raises(CheckpointError, match="can be written by every user") as raised:
        integrity.require_intact(folder, step=10)
    assert "chmod -R o-w" in raised.value.remedy


@pytest.mark.parametrize("parts", [1, 2, 3, 20])
def test_files_are_dealt_once_and_evenly(parts: int) -> None:
    dealt = integrity.deal(SIZES, parts)
    assert len(dealt) == parts
    assert sorted(name for names in dealt for name in names) == sorted(SIZES)
    loads = [sum(SIZES[name] for name in names) for names in dealt]
    assert max(loads) <= max(301_000, sum(SIZES.values()) / parts * 1.2)
    assert integrity.deal(dict(reversed(SIZES.items())), parts) == dealt  # the same on every rank


def test_digests_of_files_around_the_size_of_a_chunk(tmp_path: Path) -> None:
    import xxhash

    for size in (0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1):
        content = random.Random(size).randbytes(size)
        (tmp_path / "file").write_bytes(content)
        assert integrity.digest(tmp_path / "file") == FileRecord(size, xxhash.xxh3_128_hexdigest(content))


def test_many_problems_are_cut_short() -> None:
    assert integrity.describe(["a"]) == "a"
    assert integrity.describe(list("abcde")) == "a; b; c, and 2 more"


class Storage:
    """Reads that fail as a file system's do: the given numbers of times, then not at all."""

    def __init__(self, real: Callable[..., Any], *failures: int, other: FileRecord | None = None) -> None:
        self.real, self.failures, self.other = real, list(failures), other

    def __call__(self, *arguments: Any) -> Any:
        if self.failures:
            raise OSError(self.failures.pop(0), "told so")
        if self.other is not None:
            found, self.other = self.other, None
            return found
        return self.real(*arguments)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "PAUSES_S", (0.0, 0.0, 0.0))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EACCES])
@pytest.mark.parametrize("reader", ["digest", "sizes"])
def test_an_error_of_the_storage_is_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reader: str, number: int
) -> None:
    real = getattr(integrity, reader)
    monkeypatch.setattr(integrity, reader, Storage(real, number, number, number))
    assert integrity.verify(folder, step=10) == []
    monkeypatch.setattr(integrity, reader, Storage(real, *[number] * 4))
    with pytest.raises(UnreadableError, match=r"cannot be read on .*may well be whole") as error:
        integrity.verify(folder, step=10)
    assert error.value.exit_status == 4


@pytest.mark.usefixtures("at_once")
def test_damage_is_what_two_reads_agree_about(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = FileRecord(11_000, "0" * 32)
    monkeypatch.setattr(integrity, "digest", Storage(integrity.digest, other=wrong))
    with pytest.raises(UnreadableError, match="reads differently every time"):
        integrity.verify(folder, step=10)
    monkeypatch.undo()
    listing = {**SIZES, "common.pt": 5}
    monkeypatch.setattr(integrity, "PAUSES_S", (0.0,))
    monkeypatch.setattr(integrity, "sizes", Storage(integrity.sizes, other=listing))  # type: ignore[arg-type]
    with pytest.raises(UnreadableError, match="is listed differently every time"):
        integrity.verify(folder, step=10)


@pytest.mark.usefixtures("at_once")
def test_a_file_that_another_host_listed_is_no_damage(folder: Path) -> None:
    manifest = integrity.read_manifest(folder)
    (folder / "common.pt").unlink()
    with pytest.raises(UnreadableError, match=r"common\.pt is not there on .*mounted"):
        integrity.content(folder, manifest, ["common.pt"])
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    with pytest.raises(DamagedError, match="is damaged"):
        integrity.read_manifest(folder)


@pytest.mark.parametrize("change", [{"format": 2}, {"algorithm": "blake3"}, {"format": 2, "signature": "x"}])
def test_a_manifest_of_a_newer_version_is_refused_and_not_condemned(folder: Path, change: dict[str, Any]) -> None:
    body = json.loads((folder / MANIFEST).read_text())["manifest"] | change
    text = json.dumps(body, indent=1, sort_keys=True)
    newer = json.dumps({"manifest": body, "digest": integrity.text_digest(text)}, indent=1, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(newer)
    with pytest.raises(CheckpointError, match=r"has format .*use the version of mmscale that wrote it"):
        integrity.read_manifest(folder)
    (folder / MANIFEST).write_text(newer.replace("abc", "abd"))  # a flipped bit of it is damage
    with pytest.raises(DamagedError, match="is damaged"):
        integrity.read_manifest(folder)
