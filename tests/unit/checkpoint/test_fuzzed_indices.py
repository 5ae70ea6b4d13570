"""100,000 random changes to each kind of index: no code runs, nothing takes seconds or gigabytes.

    .venv/bin/python -m pytest -m exhaustive tests/unit/checkpoint/test_fuzzed_indices.py

Hypothesis, which finds small examples, does a few hundred in test_pickles and test_tensor_index; this counts.
MMSCALE_FUZZ is the number of changes, and the seed of a failure is in its message.
"""

from __future__ import annotations

import codecs
import json
import os
import pickle
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint import tensor_index
from mmscale.checkpoint.pickles import METADATA
from mmscale.errors import CheckpointError
from tests.bounded_work import CEILING_S
from tests.unit.checkpoint.test_pickles import index, untouched
from tests.unit.checkpoint.test_tensor_index import example

CHANGES = int(os.environ.get("MMSCALE_FUZZ", "100000"))
# What a change puts in beside random bytes: operations, calls, and what they need.
PICKLED = [
    *(
        bytes([code])
        for code in range(256)
        if any(code == ord(op) for op in "bcdeghijlpqrstuvBCDEFGHIJKLMNOPQRSTUVX]}()aR")
    ),
    *(bytes([code]) for code in range(0x80, 0x99)),
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"cbuiltins\ngetattr\n",
    b"X\x0a\x00\x00\x00touch /x/y",
    b"\x8c\x02os\x8c\x06system\x93",
    b"}X\x08\x00\x00\x00__call__Nsb",
    b"N}X\x0c\x00\x00\x00_member_map_}s\x86b",
    b"X\xff\xff\xff\x7f",
    b"r\xff\xff\xff\xff",
    b"2\x86" * 20,
    b"2]e" * 20,
]
JSON = [
    *b'[]{},:"0129-.eE\\'.decode(),
    "null",
    "true",
    "1e999",
    "-1",
    "9" * 30,
    "[" * 70,
    '{"a":' * 70,
    "NaN",
    "\\ud800",
]
WORDS = [word.encode() for word in JSON]
RAN: list[str] = []  # what was called while an index was read
_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec", "import", "socket.connect")


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if RAN is not None and event in _EVENTS:
        RAN.append(f"{event}: {arguments!r:.80}")


def changed(content: bytes, rng: random.Random, words: list[bytes]) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(content) + 1)
        some = rng.choice(words) if rng.random() < 0.6 else rng.randbytes(rng.choice((1, 1, 2, 4)))
        kind = rng.randrange(5)
        if kind == 0:
            content = content[:at] + some + content[at + len(some) :]
        elif kind == 1:
            content = content[:at] + some + content[at:]
        elif kind == 2:
            content = content[:at] + content[at + rng.randrange(1, 12) :]
        elif kind == 3:
            begin = rng.randrange(len(content) + 1)
            content = content[:at] + content[begin : begin + rng.randrange(1, 80)] + content[at:]
        else:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    return content


def base(kind: str, rng: random.Random, whole: bytes) -> bytes:
    return whole if kind == "index.json" else pickle.dumps(index(), protocol=rng.randrange(pickle.HIGHEST_PROTOCOL + 1))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["index.json", "metadata"])
def test_changed_indices_run_nothing(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.dumps(example(tmp_path)).encode()
    file = tmp_path / ("index.json" if kind == "index.json" else METADATA)
    if kind == "metadata":
        (tmp_path / "index.json").unlink()
    file.write_bytes(base(kind, random.Random(0), whole))
    tensor_index.read(tmp_path)  # imports what reading needs
    codecs.lookup("raw_unicode_escape")  # and the codec of pickle's oldest protocol, which is a module
    sys.addaudithook(watch)  # there is no way to take it out again
    before, ends, slowest, began = untouched(), Counter[str](), 0.0, time.monotonic()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(CHANGES):
        rng = random.Random(seed)
        file.write_bytes(changed(base(kind, rng, whole), rng, WORDS if kind == "index.json" else PICKLED))
        RAN.clear()
        start = time.process_time()
        try:
            tensor_index.read(tmp_path)
            ends["read"] += 1
        except CheckpointError:
            ends["refused"] += 1
        seconds = time.process_time() - start
        slowest = max(slowest, seconds)
        assert seconds < CEILING_S and RAN == [], (seed, seconds, RAN)
        assert seed % 100 or untouched() == before, seed
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    with capsys.disabled():
        took = f"slowest {slowest:.3f} s, {more / 1024:.0f} MiB, {(time.monotonic() - began) / 60:.1f} min"
        print(f"\n{kind}: {CHANGES:,} changes, {dict(ends)}, {took}")
    assert more < 256 << 10 and untouched() == before  # KiB
