"""Every function that replaces a file: if the write fails the old file stays, and nothing is left beside it."""

from __future__ import annotations

import ast
import contextlib
import os
import resource
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch import record, snapshot
from mmscale.checkpoint import run_folder, signing
from mmscale.checkpoint.layout import Store
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.prepared import manifest as manifests
from mmscale.data.prepared import table_facts
from mmscale.data.prepared.table_facts import TableFacts
from mmscale.data.stream import cache_files
from mmscale.errors import CheckpointError
from mmscale.resilience import generations, snapshot_files
from mmscale.resilience.generations import Generation
from mmscale.resilience.snapshot_files import Marker
from mmscale.resilience.watchdog import Watchdog
from mmscale.runtime import atomic_files
from mmscale.runtime.atomic_files import new_folder, open_atomic, write_atomic
from mmscale.runtime.disk_writer import replacing

ROOT = Path(__file__).parents[3]
PACKAGES = ("mmscale", "launch", "slurm", "checkpoints_tools")
LONG = "x" * 100_000  # more than streams buffer


def _text_tokenizer(folder: Path) -> None:
    TextTokenizer.save(SimpleNamespace(tokenizer=SimpleNamespace(to_str=lambda pretty: LONG)), folder)  # type: ignore[arg-type]


def _manifest(folder: Path) -> None:
    content = SimpleNamespace(model_dump_json=lambda indent: LONG)
    manifests.write_manifest(folder, content)  # type: ignore[arg-type]


def _latest(folder: Path) -> None:
    (folder / "step_00000001").mkdir(exist_ok=True)
    Store(folder).point_to_newest()


def _index(folder: Path) -> None:
    one = Generation(name="a", attempt=1, identity={"text": LONG}, groups=((0, 1),), folders=("a", "b"))
    generations.write_index(folder, [one])


def _marker(folder: Path) -> None:
    members = (0, 1)
    marker = Marker("a", 1, 1, 1, 0, members, lengths=(1, 1), digests=(LONG, LONG), parity_digest="")
    snapshot_files.commit(folder, 0, marker)


def _report(folder: Path) -> None:
    watchdog = Watchdog(rank=0, folder=folder.parent, timeout_s=1.0)
    watchdog.folder = folder
    watchdog._write(1.0, {LONG: 1})


# The file that each function replaces, and a call of it for a folder.
WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "text": ("a.json", lambda folder: write_atomic(folder / "a.json", LONG)),
    "replacing": ("now", lambda folder: replacing(folder / "now", LONG.encode())()),
    "configuration": ("config.yaml", lambda folder: run_folder.write_config(folder, {"text": LONG})),
    "latest": ("latest", _latest),
    "text tokenizer": ("tokenizer.json", _text_tokenizer),
    "data manifest": ("manifest.json", _manifest),
    "table facts": ("facts", lambda folder: table_facts._keep(folder / "facts", TableFacts(1, 1, (1,)))),
    "packing index": ("index.npy", lambda folder: cache_files.write_array(folder / "index.npy", np.arange(20_000))),
    "snapshots": ("memory.json", _index),
    "slot of a snapshot": ("commit.0", _marker),
    "hang report": ("rank_0.json", _report),
    "launch record": ("a.json", lambda folder: record._write_json(folder / "a.json", {"text": LONG})),
    "code": ("code.zip", lambda folder: snapshot.write(folder / "code.zip", ["slurm"])),
}
NEW_ONLY = ("configuration",)  # keeps a file that is there
NOT_AN_ERROR = ("table facts", "packing index")  # caches: a warning
PRIVATE = ("snapshots", "slot of a snapshot")
WITH_THE_MACHINE = ("replacing", "snapshots", "slot of a snapshot", "hang report")  # not synced to disk


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Every write into a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_write_leaves_the_old_file_alone(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file, write = WRITERS[name]
    if name not in NEW_ONLY:
        (folder / file).write_text("old")
    if name == "latest":
        (folder / "step_00000001").mkdir()
    before = sorted(folder.rglob("*"))
    with full_disk(), contextlib.nullcontext() if name in NOT_AN_ERROR else pytest.raises(OSError, match="too large"):
        write(folder)
    assert sorted(folder.rglob("*")) == before
    assert name in NEW_ONLY or (folder / file).read_text() == "old"


@pytest.mark.parametrize("name", WRITERS)
def test_the_file_is_on_disk_before_it_gets_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"{path.name} -> {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    folder = tmp_path / "folder"
    folder.mkdir()
    umask = os.umask(0o027)
    try:
        WRITERS[name][1](folder)
    finally:
        os.umask(umask)
    file = folder / WRITERS[name][0]
    (rename,) = (one for one in done if "->" in one)
    temporary = rename.split(" -> ")[0]
    assert temporary.startswith(f".{file.name}.") and temporary.endswith(atomic_files.TEMPORARY)
    assert done == ([rename] if name in WITH_THE_MACHINE else [temporary, rename, folder.name])
    assert stat.S_IMODE(file.stat().st_mode) == (0o600 if name in PRIVATE else 0o640)
    assert [path.name for path in folder.iterdir() if path.is_file()] == [file.name]


def test_a_signature_that_cannot_be_written(tmp_path: Path) -> None:
    key = tmp_path / "key"
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    signing._ssh_keygen("-q", "-t", "ed25519", "-N", "", "-f", str(key))
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / "MANIFEST.json").write_text("{}")
    with full_disk(), pytest.raises(CheckpointError, match="cannot be written"):
        signing.sign(folder, key=key)
    assert [path.name for path in folder.iterdir()] == ["MANIFEST.json"]


def test_an_exception_of_the_caller_leaves_nothing(tmp_path: Path) -> None:
    def half(opened: AbstractContextManager[Any]) -> None:
        with opened as new:
            if isinstance(new, Path):
                (new / "file").write_text("half")
            else:
                new.write(b"half")
            raise ValueError("no")

    for opened in (open_atomic(tmp_path / "file"), new_folder(tmp_path / "folder")):
        with pytest.raises(ValueError, match="no"):
            half(opened)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(atomic_files, "fsync", lambda path: done.append(path.name))
    with new_folder(tmp_path / "folder") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("whole")
    assert done == ["sub", "file", folder.name, tmp_path.name]
    assert (tmp_path / "folder" / "sub" / "file").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "folder"):
        pass
    assert len(list(tmp_path.iterdir())) == 1


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    with open_atomic(tmp_path / "file") as one:
        one.write(b"one")
        with open_atomic(tmp_path / "file") as other:
            other.write(b"other")
        assert (tmp_path / "file").read_bytes() == b"other"
    assert (tmp_path / "file").read_bytes() == b"one"


def test_a_link_at_the_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("theirs")
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    write_atomic(tmp_path / "file", "ours")
    assert (tmp_path / "elsewhere").read_text() == "theirs" and not (tmp_path / "file").is_symlink()


# Other renames, whose names are part of a protocol.
RENAMES = {
    "launch/agent.py": "status files of ranks that ended before the last restart",
    "mmscale/checkpoint/layout.py": "checkpoints",
    "mmscale/checkpoint/publish.py": "checkpoints",
    "mmscale/presets/quickstart/write_documents.py": "a program of the user's, uses no mmscale",
    "mmscale/resilience/run_lock.py": "the lease, which is linked first",
    "mmscale/runtime/atomic_files.py": "this helper",
    "slurm/local/cluster.py": "uses no mmscale",
    "slurm/local/keeper.py": "uses no mmscale",
}


def test_no_other_module_renames_what_it_wrote() -> None:
    found = set()
    for path in (path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            renames = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if renames and node.func.attr in ("replace", "rename", "renames"):
                on_os = isinstance(node.func.value, ast.Name) and node.func.value.id in ("os", "shutil")
                if on_os or (len(node.args) == 1 and not node.keywords):
                    found.add(path.relative_to(ROOT).as_posix())
    assert found == set(RENAMES)
