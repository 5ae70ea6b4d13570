"""The cache of packed epochs: it never changes the order, and damage to it is repaired."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from mmscale.data.stream import packing_cache
from mmscale.data.stream.mixture import Mixture
from tests.unit.data.corpora import VOCABULARY
from tests.unit.data.stream.mixtures import (
    DOCUMENTS,
    OPTIONS,
    digest,
    mix,
    open_sources,
)


def test_a_damaged_cache_is_made_again(folder: Path, tmp_path: Path) -> None:
    expected = digest(mix(folder, cache=tmp_path).micro_batch(1))
    (file,) = tmp_path.glob("packing-*-0.npy")
    content = file.read_bytes()
    for damaged in (content[:-9], content[:40], b"", content[:-8] + b"\x00\x00\x00\x07" * 2):
        file.write_bytes(damaged)
        assert digest(mix(folder, cache=tmp_path).micro_batch(1)) == expected
        assert file.read_bytes() == content


def test_the_cache_is_used_and_leftovers_of_killed_writers_go(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_cache, "_BLOCK_DOCUMENTS", DOCUMENTS)
    mix(folder, cache=tmp_path)
    (file,) = tmp_path.glob("packing-*-0.npy")
    stale = file.with_name(f"{file.name}.elsewhere.1.tmp")
    stale.write_bytes(b"half")
    mix(folder, cache=tmp_path).micro_batch(100)  # packs later epochs
    assert not stale.exists()
    monkeypatch.setattr(packing_cache, "pack_epoch", lambda *_, **__: pytest.fail("packed again"))
    mix(folder, cache=tmp_path).micro_batch(100)


def test_how_many_epochs_a_file_holds_does_not_change_the_order(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_batches(documents: int) -> list[str]:
        monkeypatch.setattr(packing_cache, "_BLOCK_DOCUMENTS", documents)
        mixture = mix(folder, cache=tmp_path)
        return [digest(mixture.micro_batch(index)) for index in range(60)]  # six epochs

    expected = first_batches(1)
    assert first_batches(2 * DOCUMENTS) == first_batches(100 * DOCUMENTS) == expected


def test_without_a_writable_cache_indices_stay_in_memory(folder: Path, tmp_path: Path) -> None:
    expected = digest(mix(folder, cache=tmp_path / "good").micro_batch(50))
    (tmp_path / "file").write_text("")
    assert digest(mix(folder, cache=tmp_path / "file" / "below").micro_batch(50)) == expected


def test_of_four_processes_one_packs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "packed"
    real = packing_cache.pack_epoch

    def noted(*args: Any, **kwargs: Any) -> Any:
        with packed.open("a") as file:
            file.write("x")
        return real(*args, **kwargs)

    monkeypatch.setattr(packing_cache, "pack_epoch", noted)
    monkeypatch.setattr(packing_cache, "_BLOCK_DOCUMENTS", DOCUMENTS)
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(4)

    def work() -> None:
        sources = open_sources(folder)
        barrier.wait()
        queue.put(digest(Mixture(sources, VOCABULARY, cache=tmp_path / "cache", **OPTIONS).micro_batch(2)))

    processes = [context.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    assert len({queue.get(timeout=300) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert packed.read_text() == "x"
    assert not list((tmp_path / "cache").glob("*.tmp"))
