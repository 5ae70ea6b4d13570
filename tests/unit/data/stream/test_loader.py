"""The loader: the same batches with any number of workers and ranks, also after a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmscale.data.stream.loader import BatchLoader
from mmscale.errors import ConfigError, DataError
from tests.unit.data.corpora import prepare
from tests.unit.data.stream.mixtures import (
    digest,
    mix,
)


def run_steps(loader: BatchLoader, steps: int) -> list[list[str]]:
    return [[digest(batch) for batch in next(loader).micro_batches] for _ in range(steps)]


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("workers", [1, 2])
def test_order_does_not_depend_on_workers(folder: Path, workers: int) -> None:
    options = {"dp_rank": 1, "dp_size": 2, "micro_batches_per_step": 4}
    expected = run_steps(BatchLoader(mix(folder), **options), 7)
    loader = BatchLoader(mix(folder), workers=workers, **options)
    assert run_steps(loader, 7) == expected
    loader.close()


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_resuming_at_another_dp_size_goes_on_with_the_same_batches(folder: Path, dp: int) -> None:
    mixture = mix(folder)
    whole = [[digest(mixture.micro_batch(step * 4 + i)) for i in range(4)] for step in range(6)]
    first = BatchLoader(mix(folder), dp_rank=0, dp_size=2, micro_batches_per_step=4, workers=1)
    run_steps(first, 3)
    state = first.state_dict()
    first.close()
    assert state == {"consumed_sequences": 3 * 4 * 4}  # what the worker has read ahead does not count
    resumed = []
    for rank in range(dp):
        loader = BatchLoader(mixture, dp_rank=rank, dp_size=dp, micro_batches_per_step=4)
        loader.load_state_dict(state)
        resumed.append(run_steps(loader, 3))
    for step in range(3):
        dealt = [resumed[rank][step] for rank in range(dp)]
        assert [dealt[i % dp][i // dp] for i in range(4)] == whole[3 + step]


@pytest.mark.usefixtures("order")
def test_every_rank_knows_the_counts_of_the_global_batch(folder: Path) -> None:
    steps = [next(BatchLoader(mix(folder), dp_rank=rank, dp_size=2, micro_batches_per_step=4)) for rank in range(2)]
    batches = [batch for step in steps for batch in step.micro_batches]
    for step in steps:
        assert step.label_counts == tuple(np.sum([batch.label_counts for batch in batches], axis=0))
        assert step.counts == tuple(np.sum([batch.counts for batch in batches], axis=0))


def test_micro_batches_must_divide_among_ranks(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be shared out evenly among 3"):
        BatchLoader(mix(folder), dp_rank=0, dp_size=3, micro_batches_per_step=4)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_named_also_from_a_worker(tmp_path: Path, documents: list[np.ndarray], workers: int) -> None:
    folder = prepare(tmp_path / "set", documents, parts=1)
    file = folder / "train-00000.bin"
    ids = np.frombuffer(file.read_bytes(), np.uint16).copy()
    ids[:] = 101
    file.write_bytes(ids.tobytes())
    loader = BatchLoader(mix(folder), dp_rank=0, dp_size=1, micro_batches_per_step=1, workers=workers)
    with pytest.raises(
        DataError, match=r"^data: document \d+ of .*train-00000 has \[0, \d+\] tokens per modality"
    ) as error:
        next(loader)
    assert error.value.remedy
    loader.close()
