"""What a hostile checkpoint says is refused, and not done."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mmscale.checkpoint.pickles import METADATA, read_metadata, weights_only
from mmscale.errors import CheckpointError


def index(relative_path: str = "__0_0.distcp") -> Metadata:
    tensor = TensorStorageMetadata(
        TensorProperties(dtype=torch.bfloat16),
        torch.Size([2, 3]),
        [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))],
    )
    return Metadata({"weight": tensor}, storage_data={MetadataIndex("weight"): _StorageInfo(relative_path, 0, 12)})


class Runs:
    """Unpickling it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_an_index_is_read(tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(pickle.dumps(index()))
    assert read_metadata(tmp_path) == index()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_members_of_enumerations_are_read_as_every_python_writes_them(tmp_path: Path, protocol: int) -> None:
    """Python 3.11.2, which Debian 12 has, writes them as getattr(enumeration, name); else getattr stays refused."""

    def written(owner: Any, name: str) -> None:
        content: Any = index()
        content.planner_data = Runs(getattr, owner, name)
        (tmp_path / METADATA).write_bytes(pickle.dumps(content, protocol=protocol))

    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    written(_MEM_FORMAT_ENCODING, member.name)
    assert read_metadata(tmp_path).planner_data is member
    for owner, name in ((_MEM_FORMAT_ENCODING, "__class__"), (_MEM_FORMAT_ENCODING, "mro"), (Metadata, "__init__")):
        written(owner, name)
        with pytest.raises(CheckpointError, match=r"wants to load builtins\.getattr"):
            read_metadata(tmp_path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["system", "open", "eval", "touch", "load", "attribute"])
def test_code_in_the_index_does_not_run(tmp_path: Path, kind: str, protocol: int) -> None:
    import os

    marker = tmp_path / "marker"
    call = {
        "system": (os.system, f"touch {marker}"),
        "open": (open, str(marker), "w"),
        "eval": (eval, f"open({str(marker)!r}, 'w')"),
        "touch": (Path.touch, marker),
        "load": (torch.load, str(tmp_path / "other.pt")),
        "attribute": (getattr, torch, "load"),
    }[kind]
    hostile: Any = index()
    hostile.planner_data = Runs(*call)
    (tmp_path / METADATA).write_bytes(pickle.dumps(hostile, protocol=protocol) if kind != "attribute" else b"")
    if kind == "attribute":  # a global with dots, as protocol 4 allows
        (tmp_path / METADATA).write_bytes(b"\x80\x04\x8c\x05torch\x8c\x13serialization.os.sys\x93.")
    with pytest.raises(CheckpointError, match="wants to load") as raised:
        read_metadata(tmp_path)
    assert raised.value.exit_status == 4 and "no checkpoint needs" in raised.value.cause
    assert not marker.exists()


@pytest.mark.parametrize(
    "path", ["../other/__0_0.distcp", "/etc/passwd", "a/../../b", "", "a\\..\\b", "link/x", "link"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / METADATA).write_bytes(pickle.dumps(index(path)))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(index())[:-9]])
def test_a_broken_index_is_an_error_in_words(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError):
        read_metadata(tmp_path)
    (tmp_path / METADATA).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_metadata(tmp_path)


def test_torch_load_runs_no_code_even_where_it_is_asked_to(tmp_path: Path) -> None:
    """As torch's checkpoint planner does for entries that are no tensors."""
    marker, file = tmp_path / "marker", tmp_path / "common.pt"
    torch.save({"progress": Runs(open, str(marker), "w")}, file)
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not marker.exists()
    torch.save({"progress": {"step": 1}}, file)
    with weights_only():
        assert torch.load(file, weights_only=False) == {"progress": {"step": 1}}
