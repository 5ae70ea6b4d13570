"""Small files from outside: whatever they hold, reading ends soon, in words, and takes little memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale import bounded
from mmscale.checkpoint import zarr_arrays
from mmscale.config.load import load
from mmscale.data.arrays import read_array
from mmscale.errors import MmscaleError
from tests.bounded_work import bounded_work

# --- the helper -------------------------------------------------------------------------------------------------------

DEEP = {
    "lists": "[" * 100_000,
    "closed lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "just too deep": "[" * (bounded.DEEPEST + 1) + "]" * (bounded.DEEPEST + 1),
    "behind many": json.dumps([[]] * 1000 + [json.loads("[" * 100 + "]" * 100)]),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("kind", [str, str.encode])
def test_deep_json(name: str, kind: Callable[[str], str | bytes]) -> None:
    with pytest.raises(ValueError, match=r"nested more than 64 deep"):
        bounded.parse_json(kind(DEEP[name]))


def test_what_is_within_the_bounds_is_read() -> None:
    deepest = "[" * bounded.DEEPEST + "]" * bounded.DEEPEST
    for text in (
        deepest,
        '"' + "[{" * 1000 + '"',
        "[" + "[]," * 1000 + "1]",
        str(1 << 127),
        "-1.5e300",
        "null",
        "[NaN]",
    ):
        found = bounded.parse_json(text)
        assert repr(found) == repr(json.loads(text)) and repr(bounded.parse_json(text.encode())) == repr(found)


@pytest.mark.parametrize("text", ["1" * 65, '{"a": [-' + "9" * 4000 + "]}"])
def test_numbers_that_no_float_holds(text: str) -> None:
    with pytest.raises(ValueError, match="digits"):
        bounded.parse_json(text)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large", "missing", "not UTF-8"])
def test_what_is_no_small_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(file)  # opening it would wait for ever
    elif kind == "device":
        file = Path("/dev/zero")
    elif kind == "folder":
        file = tmp_path
    elif kind == "large":
        with file.open("wb") as stream:
            stream.truncate(1 << 40)  # sparse
    elif kind == "not UTF-8":
        file.write_bytes(b'"\xff"')
    with pytest.raises((OSError, ValueError), match=r"regular file|bytes, more than|No such file|Is a dir|codec"):
        bounded.read_json(file)


@dataclass(frozen=True)
class Example:
    name: str
    counts: dict[str, int]
    more: tuple[int, ...] = ()


def test_records_are_of_their_types() -> None:
    whole = Example("a", {"b": 1}, (1, 2))
    assert bounded.record(Example, json.loads(json.dumps(asdict(whole)))) == whole
    for wrong in (None, [], {}, {"name": "a"}, {"name": None, "counts": {}}, {"name": "a", "counts": [], "more": 1}):
        with pytest.raises(ValueError):  # noqa: PT011
            bounded.record(Example, wrong)
    with pytest.raises(ValueError, match="other fields than counts, more, name"):
        bounded.record(Example, {"name": "a", "counts": {}, "other": 1})


def test_a_file_without_line_ends_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "LONGEST_LINE", 40)
    file = tmp_path / "file"
    file.write_bytes(b"a\n" + bytes(100) + b"\nb")
    with file.open("rb") as stream:
        assert list(bounded.lines(stream)) == [b"a\n", bytes(40), bytes(40), bytes(20) + b"\n", b"b"]


# --- arrays -----------------------------------------------------------------------------------------------------------


def npy(shape: str, *, dtype: str = "<i8", body: bytes = b"", order: str = "False") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}"
    head = head.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + body


ARRAYS = {
    "a trillion": npy("(1000000000000,)"),
    "a product beyond 64 bits": npy("(4294967296, 4294967296, 4294967296)"),
    "negative": npy("(-1,)", body=bytes(8)),
    "objects": npy("(1,)", dtype="|O", body=bytes(8)),
    "texts": npy("(1,)", dtype="<U2", body=bytes(8)),
    "cut off": npy("(2,)", body=bytes(8)),
    "more behind it": npy("(1,)", body=bytes(16)),
    "a program": npy("(__import__('os').system('false'),)"),
    "a long header": npy("(" + "1," * 30_000 + ")"),
    "a deep header": npy("(" * 5_000 + ")" * 5_000),
    "a pickle": b"\x80\x04]\x94.",
    "an archive": b"PK\x03\x04" + bytes(40),
    "empty": b"",
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_promise_too_much(tmp_path: Path, name: str, mapped: bool) -> None:
    (tmp_path / "a.npy").write_bytes(ARRAYS[name])
    with bounded_work(), pytest.raises((ValueError, OSError)):
        read_array(tmp_path / "a.npy", mapped=mapped)


@pytest.mark.parametrize("array", [np.arange(6).reshape(2, 3), np.zeros((0, 3), np.uint16), np.float32(2), np.ones(3)])
def test_arrays_are_read(tmp_path: Path, array: Any) -> None:
    np.save(tmp_path / "a.npy", array)
    for mapped in (False, True):
        found = read_array(tmp_path / "a.npy", mapped=mapped)
        np.testing.assert_array_equal(found, array)
        assert found.dtype == np.asarray(array).dtype


def test_archives_with_too_many_shards() -> None:
    grid = {"chunk_grid": {"configuration": {"chunk_shape": [1, 1]}}}
    for wrong in ([10**6, 10**6], [10**12], None, ["a", 1], [[], 1]):
        with pytest.raises(ValueError, match="it describes"):
            zarr_arrays.shard_files({**grid, "shape": wrong})


# --- YAML -------------------------------------------------------------------------------------------------------------

_ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)
YAML = {
    "a billion laughs": _ALIASES,
    "merges": "a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{','.join(['*a'] * 9)}]}}\n" for i in range(2000)),
    "itself": "a: &a [*a]\n",
    "deep": "a: " + "[" * 100_000,
    "deep block": "- " * 100_000,
    "many": "a: [" + "x," * 120_000 + "]",
    "many keys": "\n".join(f"a{i}: 1" for i in range(30_000)),
    "layers": "model: {num_layers: 200000000}",
    "digits": "train: {steps: " + "9" * 200_000 + "}",
    "tags": "a: !!python/object/apply:os.system [false]\n",
}


@pytest.mark.parametrize("name", YAML)
def test_configurations_that_take_for_ever(tmp_path: Path, name: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(YAML[name])
    with bounded_work(), pytest.raises(MmscaleError) as raised:
        load(file)
    assert raised.value.remedy and len(raised.value.cause) < 20_000


SOURCES = sorted(path for top in ("mmscale", "launch", "checkpoints_tools") for path in Path(top).rglob("*.py"))


def test_nothing_reads_json_past_this_module() -> None:
    """As ruff's banned-api holds where the rule is on; mmscale/runtime may use torch.cuda, so it is off there."""
    allowed = {
        "mmscale/bounded.py",
        "mmscale/data/modalities/audio.py",  # ships with exports; the table looks first
        "checkpoints_tools/huggingface/gate_reload.py",
        "checkpoints_tools/huggingface/shipped/image_codes_moma.py",
    }
    read = re.compile(r"(?<!or)json\.loads?\(|yaml\.(safe_)?load\(")
    found = {path.as_posix() for path in SOURCES if read.search(path.read_text())}
    assert len(SOURCES) > 200 and found == allowed


@pytest.mark.parametrize("content", ["[" * 100_000, "null", "[1]", '{"kind": ' + "9" * 5000 + "}", " " * (2 << 20)])
def test_settings_of_an_exported_image_tokenizer(tmp_path: Path, content: str) -> None:
    """It is read by a module that is shipped with exports and has no mmscale."""
    from checkpoints_tools.huggingface.shipped.image_codes_moma import FOLDER, SETTINGS, read_codes

    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / SETTINGS).write_text(content)
    with bounded_work(), pytest.raises(ValueError, match=r"holds no JSON object|more than the|integer string"):
        read_codes(tmp_path)
