"""Files of torch.save that claim much, or take for ever, are refused; those that torch.save writes are read."""

from __future__ import annotations

import io
import pickle
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.utils import _create_file_view

from mmscale.checkpoint import torch_files
from mmscale.runtime import random_state
from tests.bounded_work import bounded_work

MOST_KIB = 64 << 10


def saved(content: Any, **settings: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **settings)
    return stream.getvalue()


def edited(content: bytes, *, pack: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """A file with other records: `data_0=b"..."` for archive/data/0."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(stream, "w", pack) as after:
        for info in before.infolist():
            name = info.filename.split("/", 1)[1].replace("/", "_").replace(".", "_")
            after.writestr(info.filename, records.get(name, before.read(info)))
    return stream.getvalue()


PLAIN = saved({"a": 1})
# t = ("x",); t = (t, t) forty times, each by its memo; {t: None}
SHARED = b"\x80\x02}X\x01\x00\x00\x00x\x85" + b"".join(
    b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(40)
)
HOSTILE = {
    "a packed tensor": (
        edited(saved(torch.zeros(8)), pack=zipfile.ZIP_DEFLATED, data_0=bytes(300 << 20)),
        "is compressed",
    ),
    "a packed text": (edited(PLAIN, pack=zipfile.ZIP_BZIP2), "is compressed"),
    "keys in keys": (edited(PLAIN, data_pkl=SHARED + b"Ns."), "tuples in each other"),
    "a bytearray of 100 GB": (
        edited(PLAIN, data_pkl=b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x19\x85R."),
        "asks for a bytearray",
    ),
    "the old format": (saved(torch.zeros(8), _use_new_zipfile_serialization=False), "not in the format"),
    "a pickle": (pickle.dumps({"a": 1}), "not in the format"),
    "nothing": (b"", "not in the format"),
    "a pickle cut within": (edited(PLAIN, data_pkl=SHARED), "damaged|tuples in each other"),
}


@pytest.mark.parametrize("source", ["path", "stream"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path: Path, name: str, source: str) -> None:
    content, message = HOSTILE[name]
    (tmp_path / "x.pt").write_bytes(content)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (torch_files.load, forced):
        with bounded_work(), pytest.raises(pickle.UnpicklingError, match=message):
            read(tmp_path / "x.pt" if source == "path" else io.BytesIO(content))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MOST_KIB


def forced(source: Any) -> Any:
    """As torch's planner reads entries that are no tensors."""
    with torch_files.weights_only():
        return torch.load(source, weights_only=False)


def test_what_torch_writes_is_read() -> None:
    tensors = {f"{number}": torch.arange(number, dtype=torch.bfloat16) for number in range(40)}
    nested: Any = {"groups": [{"params": [1, 2], "betas": (0.9, 0.95), "shape": ((1, 2), (3,))}] * 30, "step": 7}
    for content in (tensors, nested, OrderedDict(a=(1, (2, (3,)))), random_state.capture(), [b"bytes" * 9]):
        read = torch_files.load(io.BytesIO(saved(content)))
        assert str(read) == str(content) and type(read) is type(content)


def test_pieces_are_read_from_where_they_begin() -> None:
    """A file of tensors holds them one behind the other."""
    stream = io.BytesIO(b"before" + saved(torch.ones(3)))
    before = torch.load
    with torch_files.weights_only():
        with pytest.raises(pickle.UnpicklingError):
            torch.load(io.BytesIO(b"PK\x03\x04 and no more"))
    assert torch.load is before
    whole = len(stream.getvalue())
    stream = io.BytesIO(stream.getvalue() + b"behind" + saved(torch.zeros(4)))
    assert torch.equal(torch_files.load(_create_file_view(stream, 6, whole - 6)), torch.ones(3))
    rest = _create_file_view(stream, whole + 6, len(stream.getvalue()) - whole - 6)
    assert torch.equal(torch_files.load(rest), torch.zeros(4))
