"""The order of large sources: every document once per epoch, found from any position, counted by several processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmscale.bench.corpus import synthetic_corpus
from mmscale.data.prepared import table_facts
from mmscale.data.stream import block_counts, blocks, table
from mmscale.data.stream.block_counts import BlockCounts
from mmscale.data.stream.blocks import BlockStream, Division
from mmscale.data.stream.packing import deal, pack_epoch
from mmscale.data.stream.sequences import START, PackSettings, StreamStart
from mmscale.data.stream.source import Source
from mmscale.errors import DataError
from mmscale.tables.settings import DATA_ORDERS, DataOrder
from tests.unit.data.corpora import VOCABULARY, corpus, prepare

DOCUMENTS = 150
SEQ = 128


def sizes(block: int, chunk: int) -> DataOrder:
    return dataclasses.replace(DATA_ORDERS["blocks"], block=block, chunk=chunk, above=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("blocks") / "set", corpus(DOCUMENTS), parts=4)


@pytest.fixture(autouse=True)
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables stay in their files, few of them open."""
    monkeypatch.setattr(table_facts, "LARGE", 0)
    monkeypatch.setattr(table, "_MAPS", 2)


def stream_of(folder: Path, *, order: DataOrder, caches: tuple[Path, ...] = (), **changes: Any) -> BlockStream:
    begin = changes.pop("begin", START)
    packing = PackSettings(**{"position": 0, "seq_length": SEQ, "seed": 3, "window": 20} | changes)
    source = Source(folder, split="train", vocabulary=VOCABULARY)
    return BlockStream(source, packing, order=order, folders=caches, begin=begin)


def sequences(stream: BlockStream, start: int, count: int) -> list[list[int]]:
    """Documents of sequences of the stream."""
    found = []
    for block, places in stream.stretch(start, count):
        packing = block.packing
        found += [packing.documents[packing.starts[n] : packing.starts[n + 1]].tolist() for n in places]
    return found


@settings(max_examples=60, deadline=None)
@given(
    documents=st.integers(1, 3000),
    block=st.integers(1, 400),
    chunk=st.integers(1, 64),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_blocks_of_an_epoch_hold_every_document_once(
    documents: int, block: int, chunk: int, seed: int, epoch: int
) -> None:
    division = Division(documents, sizes(block, chunk))
    where = {"seed": seed, "position": 1, "epoch": epoch}
    members = [division.members(number, **where) for number in range(len(division))]
    np.testing.assert_array_equal(np.sort(np.concatenate(members)), np.arange(documents))
    behind = [division.position_after(number, **where) for number in range(len(division))]
    lengths = [len(one) for one in members]
    assert behind == np.cumsum(lengths[::-1])[::-1].tolist()
    assert all((np.diff(one) > 0).all() for one in members)
    if len(division) > 1:  # as many chunks in each block as in any other, within one, and never small blocks
        assert max(lengths) - min(lengths) <= 2 * chunk
        assert min(lengths) >= block - 2 * chunk


@pytest.mark.long
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block=st.integers(8, 60),
    chunk=st.integers(1, 9),
    window=st.integers(1, 70),
    seed=st.integers(0, 9),
    seq_length=st.sampled_from([100, 128, 256]),
    multiple=st.sampled_from([1, 4]),
    jumps=st.lists(st.integers(0, 180), min_size=1, max_size=4),
)
def test_a_position_found_alone_is_that_of_reading_on(
    folder: Path, block: int, chunk: int, window: int, seed: int, seq_length: int, multiple: int, jumps: list[int]
) -> None:
    options: dict[str, Any] = {"order": sizes(block, chunk), "window": window, "seed": seed}
    options |= {"seq_length": seq_length, "multiple": multiple}
    whole = sequences(stream_of(folder, **options), 0, 200)
    for start in jumps:
        assert sequences(stream_of(folder, **options), start, 20) == whole[start : start + 20]


def test_epochs_differ_and_each_is_whole(folder: Path) -> None:
    stream = stream_of(folder, order=sizes(40, 4), once=True)
    one_epoch = stream.first_epoch
    documents = [document for one in sequences(stream, 0, one_epoch) for document in one]
    assert sorted(documents) == list(range(DOCUMENTS))
    following = [document for one in sequences(stream, one_epoch, 5) for document in one]
    assert following != documents[: len(following)]


def test_blocks_are_packed_and_dealt_as_well_as_a_whole_epoch() -> None:
    """Padding and image shares of micro-batches, of documents that lie in the data set sorted by their kind."""
    counts = synthetic_corpus(documents=60_000).counts
    counts = counts[np.argsort(counts[:, 1] > 0, kind="stable")]  # text only first: the worst order for chunks
    lengths = counts.sum(axis=1)
    division = Division(len(lengths), dataclasses.replace(DATA_ORDERS["blocks"], block=20_000, chunk=8))

    def quality(sums: list[np.ndarray]) -> tuple[float, float]:
        windows = [part for one in sums for part in np.split(one, [2048, 4096]) if len(part) == 2048]
        groups = np.concatenate([part[deal(part, group=4)].sum(axis=1) for part in windows])
        packed = np.concatenate(sums)
        share = groups[:, 1] / groups.sum(axis=1)
        return float(1 - packed.sum() / (len(packed) * 4096)), float(share.std())

    options = {"seq_length": 4096, "window": 8192, "seed": 1, "source": 0, "epoch": 0}
    whole = quality([pack_epoch(lengths, **options).sums(counts)])
    members = [division.members(number, seed=1, position=0, epoch=0) for number in range(len(division))]
    parts = [pack_epoch(lengths[some], block=1 + n, **options).sums(counts[some]) for n, some in enumerate(members)]
    found = quality(parts)
    assert found[0] < whole[0] + 0.001, (found, whole)
    assert found[1] < 1.15 * whole[1], (found, whole)


def test_counts_are_kept_and_a_later_start_packs_one_block(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = sizes(16, 2)
    expected = sequences(stream_of(folder, order=order, caches=(tmp_path,)), 0, 160)[150:155]
    real, packed = blocks.pack_documents, []
    monkeypatch.setattr(blocks, "pack_documents", lambda *args, **options: packed.append(1) or real(*args, **options))
    assert sequences(stream_of(folder, order=order, caches=(tmp_path,)), 150, 5) == expected
    assert len(packed) <= 2  # the position's block, and the next one


@pytest.mark.parametrize("damage", [b"", b"x" * 50, None])
def test_damaged_counts_are_found_again(folder: Path, tmp_path: Path, damage: bytes | None) -> None:
    order = sizes(16, 2)
    expected = sequences(stream_of(folder, order=order, caches=(tmp_path,)), 100, 5)
    (file,) = tmp_path.glob("counts-*.npy")
    content = np.load(file)
    content[1] += 1
    file.write_bytes(damage) if damage is not None else np.save(file, content)
    assert sequences(stream_of(folder, order=order, caches=(tmp_path,)), 100, 5) == expected


def test_counts_of_other_tables_are_an_error(folder: Path, tmp_path: Path) -> None:
    order = sizes(16, 2)
    stream = stream_of(folder, order=order, caches=(tmp_path,))
    wrong = BlockCounts((tmp_path,), stream._key)
    wrong.add(0, 1000)
    with pytest.raises(DataError, match=r"block 0 of .* has .* sequences, 1000 were counted before"):
        sequences(stream, 0, 1)


def test_a_folder_that_cannot_be_written_gives_way_to_the_next(folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file" / "below"
    (tmp_path / "file").write_text("")
    sequences(stream_of(folder, order=sizes(16, 2), caches=(blocked, tmp_path / "run")), 60, 1)
    assert list((tmp_path / "run").glob("counts-*.npy"))
    sequences(stream_of(folder, order=sizes(16, 2), caches=(blocked,)), 60, 1)  # and without any, in memory


def test_processes_share_the_counting(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four start together far inside the stream: together they pack little more than one alone would."""
    monkeypatch.setattr(block_counts, "_SAVE_EVERY", 0.0)
    order, noted = sizes(16, 2), tmp_path / "noted"
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(4)
    real = blocks.pack_documents

    def counted(*args: Any, **options: Any) -> Any:
        descriptor = os.open(noted, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b"x")
        os.close(descriptor)
        return real(*args, **options)

    monkeypatch.setattr(blocks, "pack_documents", counted)

    def work() -> None:
        stream = stream_of(folder, order=order, caches=(tmp_path / "cache",))
        barrier.wait()
        queue.put(sequences(stream, 1000, 3))

    processes = [context.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert all(one == found[0] for one in found)
    alone = stream_of(folder, order=order)
    assert sequences(alone, 1000, 3) == found[0]
    assert len(noted.read_bytes()) < 3 * alone.locate(1000)[0]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lives=st.lists(
        st.tuples(st.integers(0, 150), st.lists(st.integers(1, 30), max_size=3), st.integers(1, 3)),
        min_size=1,
        max_size=3,
    )
)
def test_what_was_read_is_not_read_again_after_changes(folder: Path, lives: list[tuple[int, list[int], int]]) -> None:
    """Sequences with gaps among them, as dealing leaves them, then a stream with another seed, and so on."""
    begin, read = START, Counter[int]()
    for taken, gaps, seed in lives:
        stream = stream_of(folder, order=sizes(24, 3), seed=seed, begin=begin)
        more = np.unique(np.cumsum(gaps) + taken).astype(np.int64)
        for one in sequences(stream, 0, taken):
            read.update(one)
        for number in more.tolist():
            read.update(sequences(stream, number, 1)[0])
        begin = stream.position_after(taken, more)
    left = Counter(document for _, documents in begin.leftovers for document in documents.tolist())
    left.update(_rest(begin))
    assert all(read[document] + left[document] == begin.epoch for document in range(DOCUMENTS))
    assert begin.unread == sum(left.values())


def _rest(begin: StreamStart) -> list[int]:
    if begin.rest is None:
        return []
    division, rest = Division(DOCUMENTS, sizes(24, 3)), begin.rest
    where = {"seed": rest.seed, "position": rest.position, "epoch": rest.epoch}
    return [int(one) for number in range(rest.first, len(division)) for one in division.members(number, **where)]


def test_too_long_documents_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"a block: document \d+ has \d+ tokens, model\.seq_length is 20"):
        sequences(stream_of(folder, order=sizes(40, 4), seq_length=20), 0, 1)


def test_counts_that_a_file_has_are_not_written_again(tmp_path: Path) -> None:
    """Every rank finds the same counts; only the first that has more than the file writes it."""
    first, second = BlockCounts((tmp_path,), "key"), BlockCounts((tmp_path,), "key")
    first.find(range(4), lambda number: 10 + number)
    (file,) = tmp_path.glob("counts-*.npy")
    written = file.stat().st_ino, file.stat().st_mtime_ns
    second.find(range(4), lambda number: 10 + number)
    second._found = {number: 10 + number for number in range(4)}  # as a rank that counted them at the same time
    second._save()
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == written
    second.add(5, 15)
    assert BlockCounts((tmp_path,), "key").get(5) == 15 and BlockCounts((tmp_path,), "key").get(2) == 12
