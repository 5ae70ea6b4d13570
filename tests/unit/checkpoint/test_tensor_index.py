"""`index.json` says what `.metadata` says, is read instead of it, and hostile ones take no memory."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from mmscale.checkpoint import tensor_index
from mmscale.checkpoint.pickles import METADATA
from mmscale.checkpoint.tensor_index import INDEX
from mmscale.errors import CheckpointError
from tests.bounded_work import bounded_work
from tests.unit.checkpoint.test_pickles import EDITS, edited

FILE = "__0_0.distcp"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.float8_e4m3fn)


@st.composite
def indices(draw: st.DrawFn) -> tuple[Metadata, list[WriteResult]]:
    """Tensors cut along one dimension over two files, and objects."""
    names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
    entries: dict[str, Any] = {}
    places, ends = [], {"__0_0.distcp": 0, "__1_0.distcp": 0}

    def placed(index: MetadataIndex, length: int) -> None:
        file = draw(st.sampled_from(sorted(ends)))
        places.append(WriteResult(index, length, _StorageInfo(file, ends[file], length)))
        ends[file] += length

    for name in draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        if draw(st.booleans()):
            entries[name] = BytesStorageMetadata()
            placed(MetadataIndex(name), draw(st.integers(0, 50)))
            continue
        shape = draw(st.lists(st.integers(0, 6), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        cuts = (
            sorted({0, *draw(st.lists(st.integers(0, shape[0]), max_size=2))} - {shape[0]})
            if shape and shape[0]
            else [0]
        )
        chunks = []
        for begin, end in zip(cuts, [*cuts[1:], shape[0] if shape else 1], strict=True):
            at = torch.Size([begin, *[0] * (len(shape) - 1)]) if shape else torch.Size([])
            size = torch.Size([end - begin, *shape[1:]]) if shape else torch.Size([])
            chunks.append(ChunkStorageMetadata(at, size))
            placed(MetadataIndex(name, at, len(chunks) - 1), size.numel() * dtype.itemsize + draw(st.integers(0, 9)))
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
    return Metadata(entries), places


def write(folder: Path, metadata: Metadata, places: list[WriteResult]) -> None:
    for name, content in tensor_index.files(metadata, places).items():
        with (folder / name).open("wb") as stream:
            content(stream)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=indices())
def test_both_files_say_the_same(tmp_path: Path, written: tuple[Metadata, list[WriteResult]]) -> None:
    write(tmp_path, *written)
    ours = tensor_index.read(tmp_path)
    (tmp_path / INDEX).unlink()
    theirs = tensor_index.read(tmp_path)
    assert ours.state_dict_metadata == theirs.state_dict_metadata == written[0].state_dict_metadata
    assert ours.storage_data == theirs.storage_data == {place.index: place.storage_data for place in written[1]}
    assert ours.version == theirs.version


def example(folder: Path) -> dict[str, Any]:
    """A whole one, with the file that it speaks of, as JSON."""
    (folder / FILE).write_bytes(bytes(100))
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size([2, 3]), [chunk])
    metadata = Metadata({"weight": tensor, "state": BytesStorageMetadata()})
    places = [
        WriteResult(MetadataIndex("weight", chunk.offsets), 12, _StorageInfo(FILE, 0, 12)),
        WriteResult(MetadataIndex("state"), 5, _StorageInfo(FILE, 12, 5)),
    ]
    write(folder, metadata, places)
    found: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
    assert found == {
        "format": 1,
        "files": [FILE],
        "tensors": {"weight": {"dtype": "bfloat16", "shape": [2, 3], "pieces": [[0, 0, 12, [0, 0], [2, 3]]]}},
        "objects": {"state": [0, 12, 5]},
    }
    return found


def test_what_metadata_holds_does_not_matter(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Touches:
        def __reduce__(self) -> Any:
            return (open, (str(marker), "w"))

    example(tmp_path)
    (tmp_path / METADATA).write_bytes(pickle.dumps(Touches()))
    assert set(tensor_index.read(tmp_path).state_dict_metadata) == {"weight", "state"}
    assert not marker.exists()


def piece(index: dict[str, Any]) -> Any:
    return index["tensors"]["weight"]["pieces"][0]


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda i: i.update(format=2), "cannot be read"),
    "no tensors": (lambda i: i.pop("tensors"), "cannot be read"),
    "another field": (lambda i: i.update(code="x"), "cannot be read"),
    "a number for a name of a file": (lambda i: i.update(files=[3]), "cannot be read"),
    "a file that is not listed": (lambda i: piece(i).__setitem__(0, 1), "cannot be read"),
    "a place behind the end": (lambda i: piece(i).__setitem__(1, 95), "names bytes behind the end of"),
    "a negative place": (lambda i: piece(i).__setitem__(1, -1), "cannot be read"),
    "half a byte": (lambda i: piece(i).__setitem__(2, 1.5), "cannot be read"),
    "truth for a number": (lambda i: piece(i).__setitem__(1, True), "cannot be read"),
    "a size of 2^80": (lambda i: i["tensors"]["weight"].update(shape=[1 << 80, 3]), "cannot be read"),
    "a million dimensions": (lambda i: i["tensors"]["weight"].update(shape=[2] * 10**6), "cannot be read"),
    "no such type": (lambda i: i["tensors"]["weight"].update(dtype="load"), "no type of numbers is called"),
    "a type that is a module": (lambda i: i["tensors"]["weight"].update(dtype="serialization"), "no type of numbers"),
    "a shape of 1e12": (lambda i: i["tensors"]["weight"].update(shape=[10**12, 3]), "more than is stored of it"),
    "one dimension more": (lambda i: i["tensors"]["weight"].update(shape=[2, 3, 1]), "outside of it"),
    "a piece outside": (lambda i: piece(i).__setitem__(3, [1, 0]), "outside of it"),
    "a piece that is told a thousand times": (
        lambda i: i["tensors"]["weight"].update(shape=[2000, 3], pieces=[piece(i)] * 1000),
        "more than is stored of it",
    ),
    "a thousand pieces of the same bytes": (
        lambda i: i["tensors"]["weight"].update(
            shape=[2000, 3], pieces=[[0, 0, 12, [2 * n, 0], [2, 3]] for n in range(1000)]
        ),
        r"holds 12,005 bytes of tensors, which has 100 bytes",
    ),
    "a length of 1e13 behind a shape of 1e12": (
        lambda i: i["tensors"]["weight"].update(
            shape=[10**12], pieces=[[0, 0, 10**13, [0], [10**12]]], dtype="float32"
        ),
        "bytes of tensors, which has 100 bytes",
    ),
    **{
        f"the file {name!r}": (lambda i, name=name: i.update(files=[name]), "outside of the checkpoint")
        for name in (
            "../other/__0_0.distcp",
            "/etc/passwd",
            "a/../../b",
            "",
            "a\\b",
            "a\0b",
            "\ud800",
            "link",
            "folder/x",
        )
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_indices(tmp_path: Path, name: str) -> None:
    content = example(tmp_path)
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "folder").symlink_to("/etc")
    change, message = HOSTILE[name]
    change(content)
    (tmp_path / INDEX).write_text(json.dumps(content))
    with bounded_work(), pytest.raises(CheckpointError, match=message) as raised:
        tensor_index.read(tmp_path)
    assert raised.value.exit_status == 4 and INDEX in raised.value.cause and "\n" not in raised.value.cause


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[1]", b"{}", b"[" * 100_000, b'{"format":' + b"9" * 5000 + b"}", b"\xff\xfe", b"\0" * 10],
    ids=repr,
)
def test_broken_indices(tmp_path: Path, content: bytes) -> None:
    """Also with a whole `.metadata` beside it: what is damaged is never passed over."""
    example(tmp_path)
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        tensor_index.read(tmp_path)


def test_compressed_pieces_are_refused(tmp_path: Path) -> None:
    """torch's extensions unpack a piece before anybody knows its size."""
    example(tmp_path)
    (tmp_path / INDEX).unlink()
    metadata = tensor_index.read(tmp_path)
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["stream.zstd"]
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="compressed"):
        tensor_index.read(tmp_path)


def read_edited(edits: list[tuple[str, int, bytes]], folder: Path) -> None:
    content = json.dumps(example(folder)).encode()
    (folder / INDEX).write_bytes(edited(content, edits))
    with bounded_work(), contextlib.suppress(CheckpointError):
        found = tensor_index.read(folder)
        sizes = [entry.size.numel() for entry in found.state_dict_metadata.values() if hasattr(entry, "size")]
        assert sum(sizes) <= 100


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_changed_indices_are_read_or_refused(tmp_path: Path, edits: list[tuple[str, int, bytes]]) -> None:
    read_edited(edits, tmp_path)


@pytest.mark.parametrize("ranks", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_pieces_of_many_ranks_are_read(tmp_path: Path, ranks: int) -> None:
    """A hundred tensors, of which each rank has a piece, from index.json and from the pickle."""
    entries: dict[str, Any] = {}
    places = []
    for tensor in range(100):
        name = f"decoder.layers.{tensor}.mlp.experts.linear_fc1.weight"
        chunks = [ChunkStorageMetadata(torch.Size([rank, 0]), torch.Size([1, 8])) for rank in range(ranks)]
        entries[name] = TensorStorageMetadata(TensorProperties(), torch.Size([ranks, 8]), chunks)
        places += [
            WriteResult(
                MetadataIndex(name, chunk.offsets, rank), 32, _StorageInfo(f"__{rank}_0.distcp", 32 * tensor, 32)
            )
            for rank, chunk in enumerate(chunks)
        ]
    write(tmp_path, Metadata(entries), places)
    with bounded_work():
        index = tensor_index.read(tmp_path)
        (tmp_path / INDEX).unlink()
        pickled = tensor_index.read(tmp_path)
    assert len(index.storage_data) == 100 * ranks
    assert index.state_dict_metadata == pickled.state_dict_metadata and index.storage_data == pickled.storage_data
