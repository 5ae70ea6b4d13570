"""Seconds and memory from opening a data set of any number of documents to a micro-batch.

The data set consists of 100,000 synthetic documents and as many hard links to their files as needed, so it takes no
disk space. Its pages are in the page cache, so the time of a disk or a file system is not included. Each measurement is
a separate process.

    mmscale bench data --documents 1e9
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mmscale import bounded
from mmscale.bench.corpus import VOCABULARY, synthetic_corpus, write_corpus
from mmscale.data.prepared.manifest import Manifest, Split, read_manifest, write_manifest
from mmscale.data.prepared.table_facts import LARGE, table_facts
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.source import Source

_BASE = 100_000  # number of documents that are written; all others are links to their files
_MICRO_BATCH = 8
_PASS = 20  # parts of a pass that is packed at once
_COLUMNS = {"seconds": 2, "cpu_s": 2, "peak_mb": 0, "imports_mb": 0}  # with their numbers of decimals
_SUFFIXES = (".bin", ".idx", ".meta.npy")


def run(
    *, documents: int, seq_length: int = 4096, blocks: int = 6, processes: int = 2, seed: int = 1
) -> dict[str, Any]:
    """Time the first micro-batch at several positions.

    Args:
        documents: of the data set, rounded up to whole parts of 100,000.
        seq_length: tokens of a sequence.
        blocks: blocks whose sequences are counted before a position among them is read.
        processes: processes that count together.
        seed: seed of the order and of the position.

    Returns:
        `documents`, `parts`, `tables_cpu_s` (CPU seconds per million documents for reading all tables once, which
        `mmscale data prepare` does at its end), and for `first` (the start of the stream), `count` (`blocks` blocks
        are counted together by `processes`), `random` (a position among them, whose counts are stored) and `resume`
        (the position after it): `seconds` and `cpu_s` from opening the data set to the micro-batch, `peak_mb` of the
        process, `imports_mb` of that before it opens anything. `pass` has the same for the start of the stream of at
        most 2 million documents with `data.order: epochs`, and `documents`.
    """
    with tempfile.TemporaryDirectory() as place:
        folder, few = Path(place, "all"), Path(place, "few")
        parts = -(-documents // _BASE)
        manifest, small = _make(folder, parts, seq_length), _make(few, min(parts, _PASS), seq_length)
        result: dict[str, Any] = {
            "documents": manifest.splits["train"].documents,
            "parts": len(manifest.splits["train"].parts),
            "tables_cpu_s": _tables_cpu_s(folder, manifest),
            "blocks": blocks,
            "processes": processes,
        }
        result["first"] = _measured(folder, seq_length, seed, 0)[0]
        sequences = result["first"]["sequences_of_a_block"] * (blocks - 1)
        counted = _measured(folder, seq_length, seed, sequences // _MICRO_BATCH, processes=processes)
        result["count"] = max(counted, key=lambda one: one["seconds"])
        position = int(np.random.default_rng(seed).integers(sequences // _MICRO_BATCH))
        result["random"] = _measured(folder, seq_length, seed, position)[0]
        result["resume"] = _measured(folder, seq_length, seed, position + 1)[0]
        whole = _measured(few, seq_length, seed, 0, order="epochs")[0]
        result["pass"] = whole | {"documents": small.splits["train"].documents}
    return result


def render(result: dict[str, Any]) -> str:
    """The result of `run` as a table for people."""
    lines = [
        f"{result['documents']:,} documents in {result['parts']:,} parts; `mmscale data prepare` reads all tables "
        f"once: {result['tables_cpu_s']:.2f} CPU seconds per million documents",
        "",
        "| position | seconds to the micro-batch | of CPU | peak memory of a process [MB] | of which imports [MB] |",
        "|---|---|---|---|---|",
    ]
    names = {
        "first": "start of the stream",
        "count": f"behind {result['blocks'] - 1} blocks that {result['processes']} processes count together",
        "random": "random, counts kept",
        "resume": "resume, counts kept",
    }
    for key, name in names.items():
        found = result[key]
        values = (f"{found[key]:.{digits}f}" for key, digits in _COLUMNS.items())
        lines.append(f"| {name} | {' | '.join(values)} |")
    whole = result["pass"]
    used = (whole["peak_mb"] - whole["imports_mb"]) * 2**20 / whole["documents"]
    cpu_us = whole["cpu_s"] * 1e6 / whole["documents"]
    lines += [
        "",
        f"`data.order: epochs`, {whole['documents']:,} documents: {cpu_us:.1f} us of CPU and {used:.0f} bytes for each",
    ]
    return "\n".join(lines)


def _make(folder: Path, parts: int, seq_length: int) -> Manifest:
    """Write the documents once and link their files for every part."""
    folder.mkdir(exist_ok=True)
    write_corpus(folder, synthetic_corpus(documents=_BASE, seq_length=seq_length))
    manifest = read_manifest(folder)
    (part,) = manifest.splits["train"].parts
    for number in range(1, parts):
        for suffix in _SUFFIXES:
            os.link(folder / f"train{suffix}", folder / f"train-{number:06d}{suffix}")
    linked = [part.model_copy(update={"prefix": f"train-{number:06d}"}) for number in range(1, parts)]
    made = manifest.model_copy(update={"source": f"bench {parts}", "splits": {"train": Split(parts=(part, *linked))}})
    write_manifest(folder, made)
    return made


def _tables_cpu_s(folder: Path, manifest: Manifest) -> float:
    """CPU seconds per million documents for reading tables; reads only as many as make a split large."""
    parts = manifest.splits["train"].parts[: LARGE // _BASE + 1]
    begin = time.process_time()
    table_facts(folder, manifest.model_copy(update={"splits": {"train": Split(parts=parts)}}), "train")
    return (time.process_time() - begin) / (len(parts) * _BASE / 1e6)


def _measured(
    folder: Path, seq_length: int, seed: int, position: int, *, processes: int = 1, order: str = "blocks"
) -> list[dict[str, float]]:
    """Results of processes that start together."""
    command = [sys.executable, "-m", __spec__.name, str(folder), str(seq_length), str(seed), str(position), order]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    found = [(process.communicate()[0], process.returncode) for process in started]
    assert all(status == 0 for _, status in found), "a process that measures has failed; its error is above"
    return [bounded.parse_json(text) for text, _ in found]


def _measure(folder: Path, seq_length: int, seed: int, position: int, order: str = "blocks") -> dict[str, float]:
    """Open the data set and read one micro-batch."""
    imports = _peak_mb()
    begin, cpu = time.perf_counter(), time.process_time()
    source = Source(folder, split="train", vocabulary=VOCABULARY)
    mixture = Mixture(
        [source], VOCABULARY, seq_length=seq_length, micro_batch_size=_MICRO_BATCH, seed=seed, order=order
    )
    mixture.micro_batch(position)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    (stream,) = mixture.streams
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "peak_mb": _peak_mb(),
        "imports_mb": imports,
        "sequences_of_a_block": len(stream.block(stream.locate(position * _MICRO_BATCH)[0]).packing),
    }


def _peak_mb() -> float:
    """Largest resident memory of this process so far, mapped files included [MB]."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    length, seed, position = map(int, sys.argv[2:5])
    sys.stdout.write(json.dumps(_measure(Path(sys.argv[1]), length, seed, position, sys.argv[5])))
