"""What a hostile checkpoint says is refused, and not done."""

from __future__ import annotations

import contextlib
import pickle
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mmscale.checkpoint import strict_pickle
from mmscale.checkpoint.pickles import METADATA
from mmscale.checkpoint.tensor_index import read as read_metadata
from mmscale.checkpoint.tensor_index import vetted
from mmscale.checkpoint.torch_files import weights_only
from mmscale.errors import CheckpointError
from mmscale.runtime import megatron_cpu
from tests.bounded_work import bounded_work

megatron_cpu.install()

from megatron.core.dist_checkpointing.strategies import (  # noqa: E402
    cached_metadata_filesystem_reader as strategies,
)


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
        (tmp_path / METADATA).write_bytes(b"\x80\x04\x8c\x05torch\x8c\x14serialization.os.sys\x93.")
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


@pytest.mark.parametrize(
    "shape",
    [(10**12,), (2, 10**12), (10**6, 10**6, 10**6), (2**62, 2), (3, 3)],
    ids=str,
)
@pytest.mark.parametrize("chunked", ["whole", "chunk too", "chunks that are not stored"])
def test_shapes_that_nothing_fills(tmp_path: Path, shape: tuple[int, ...], chunked: str) -> None:
    """Memory is taken by the shape, before a byte is read."""
    content = index()
    entry = content.state_dict_metadata["weight"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.size = torch.Size(shape)
    if chunked == "chunk too":
        entry.chunks = [ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))]
    elif chunked != "whole":
        entry.chunks *= 1000
        assert content.storage_data is not None
        content.storage_data = {MetadataIndex("weight", torch.Size([0, 1])): _StorageInfo("__0_0.distcp", 0, 12)}
    (tmp_path / METADATA).write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"says that weight is .* more than is stored of it"):
        read_metadata(tmp_path)


CLASSES = (*strict_pickle._RECORDS, *strict_pickle._ENUMERATIONS, OrderedDict, torch.Size)


def untouched() -> list[tuple[Any, ...]]:
    """What a hostile pickle would change outside of its own objects."""
    enumerations = [
        (dict(kind._member_map_), dict(kind._value2member_map_), [dict(vars(member)) for member in kind])
        for kind in strict_pickle._ENUMERATIONS
    ]
    functions = [dict(vars(function)) for function in (strict_pickle._layout, strict_pickle._member)]
    return [*(tuple(sorted(vars(kind))) for kind in CLASSES), *enumerations, *functions]


@pytest.mark.parametrize("state", ["(None, slots)", "slots", "dict"])
@pytest.mark.parametrize("target", sorted(strict_pickle._GLOBALS), ids=".".join)
def test_nothing_is_written_to_classes_and_functions(tmp_path: Path, target: tuple[str, str], state: str) -> None:
    """BUILD with (None, {...}) sets attributes of whatever is on the stack: of WriteItemType, for instance."""
    before = untouched()
    name = (
        b"\x8c" + bytes([len(target[0])]) + target[0].encode() + b"\x8c" + bytes([len(target[1])]) + target[1].encode()
    )
    attribute = b"}\x8c\x0c_member_map_}s"
    given = {"(None, slots)": b"N" + attribute + b"\x86", "slots": attribute + b"N\x86", "dict": attribute}[state]
    (tmp_path / METADATA).write_bytes(b"\x80\x04" + name + b"\x93" + given + b"b.")
    with pytest.raises(CheckpointError, match="wants to load a state into"):
        read_metadata(tmp_path)
    assert untouched() == before


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a member", b"\x8c\x28torch.distributed.checkpoint.planner\x8c\x0dWriteItemType\x93K\x01\x85R}\x8c\x01ann b"),
        ("a set", b"\x8f."),
        ("a frozen set", b"(\x91."),
        ("a key that takes for ever", b"}" + b"\x8c\x01a" + b"2\x86" * 40 + b"Ns."),
        ("a size that takes for ever", b"\x8c\x05torch\x8c\x04Size\x93" + b"\x8c\x01a" + b"2\x86" * 40 + b"\x85R."),
        ("a memo of 64 GB", b"Nr\xff\xff\xff\xff."),
        ("a text of 2 GB", b"X\xff\xff\xff\x7f."),
        ("a frame of 8 EB", b"\x95\xff\xff\xff\xff\xff\xff\xff\x6f."),
        ("an object by its constructor", b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93)R."),
        ("an old instance", b"(ios\nsystem\n."),
        ("a number of an extension", b"\x82\x01."),
        ("an index in itself", b"]2a."),
    ],
)
def test_hostile_operations(tmp_path: Path, name: str, body: bytes) -> None:
    before = untouched()
    (tmp_path / METADATA).write_bytes(b"\x80\x04" + body)
    with bounded_work(), pytest.raises(CheckpointError):
        read_metadata(tmp_path)
    assert untouched() == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "cut", "copy"]), st.integers(0, 1 << 16), st.binary(min_size=1, max_size=6)
    ),
    min_size=1,
    max_size=8,
)


def edited(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, some in edits:
        at = place % max(1, len(content))
        before, after = content[:at], content[at:]
        if kind == "insert":
            content = before + some + after
        elif kind == "copy":
            content = before + content[at // 2 : at // 2 + 40] + after
        else:
            content = before + (some if kind == "flip" else b"") + after[len(some) :]
    return content


def read_edited(protocol: int, edits: list[tuple[str, int, bytes]], folder: Path) -> None:
    before = untouched()
    (folder / METADATA).write_bytes(edited(pickle.dumps(index(), protocol=protocol), edits))
    with bounded_work(), contextlib.suppress(CheckpointError):
        assert isinstance(read_metadata(folder), Metadata)
    assert untouched() == before


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(protocol=st.integers(2, pickle.HIGHEST_PROTOCOL), edits=EDITS)
def test_changed_indices_are_read_or_refused(
    tmp_path: Path, protocol: int, edits: list[tuple[str, int, bytes]]
) -> None:
    read_edited(protocol, edits, tmp_path)


def test_megatron_is_given_the_index_that_was_checked(tmp_path: Path) -> None:
    """Whatever the file says by then: nothing unpickles it a second time."""
    reader = strategies.CachedMetadataFileSystemReader
    marker = tmp_path / "marker"
    (tmp_path / METADATA).write_bytes(pickle.dumps(index()))
    found = read_metadata(tmp_path)
    (tmp_path / METADATA).write_bytes(pickle.dumps(Runs(open, str(marker), "w")))
    other = tmp_path / "other"
    other.mkdir()
    (other / METADATA).write_bytes(pickle.dumps(Runs(open, str(marker), "w")))
    for kind in (FileSystemReader, reader):
        with vetted(tmp_path, found):
            assert kind(str(tmp_path)).read_metadata().state_dict_metadata == index().state_dict_metadata
            with pytest.raises(CheckpointError, match="wants to load"):
                kind(str(other)).read_metadata()
    assert not marker.exists() and found.storage_meta is None


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
