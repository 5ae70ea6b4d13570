"""Reads a data-parallel rank's share of every global batch, ahead of time in worker processes.

Its state is one integer. It decides what each rank reads and when; mixture.py defines the content of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from torch.utils.data import DataLoader, Dataset, Sampler

from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.sharing import RankPart
from mmscale.errors import ConfigError, MmscaleError

_READ_AHEAD = 4  # global batches that each worker prepares in advance


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One rank's part of a global batch, and the counts of the whole batch that every rank needs.

    Attributes:
        micro_batches: this rank's micro-batches, in the order of their numbers.
        counts: tokens per modality of the GLOBAL batch.
        label_counts: trained labels per modality of the GLOBAL batch: the denominators of per-modality losses.
        index: number of the global batch's first micro-batch.
    """

    micro_batches: tuple[MicroBatch, ...]
    counts: tuple[int, ...]
    label_counts: tuple[int, ...]
    index: int


@dataclass(frozen=True)
class _Failure:
    """An error for the user, passed from a worker as a value: DataLoader would hide cause and remedy in a traceback."""

    kind: type[MmscaleError]
    cause: str
    remedy: str

    def throw(self) -> NoReturn:
        raise self.kind(self.cause, remedy=self.remedy)


@dataclass(frozen=True, eq=False)
class _Steps(Dataset[StepBatch | _Failure]):
    """Maps the number of a global batch's first micro-batch to its StepBatch."""

    mixture: Mixture
    part: RankPart
    micro_batches_per_step: int

    def __getitem__(self, index: int) -> StepBatch | _Failure:
        try:
            return self.read(index)
        except MmscaleError as error:
            return _Failure(type(error), error.cause, error.remedy)

    def read(self, index: int) -> StepBatch:
        """The global batch of the micro-batches index..index+G-1, of which rank r of dp reads index + j*dp + r."""
        everyone = range(index, index + self.micro_batches_per_step)
        counts = [self.mixture.counts(number) for number in everyone]
        labels = [self.mixture.label_counts(number) for number in everyone]
        return StepBatch(
            micro_batches=tuple(self.part.batch(self.mixture, index, len(everyone))),
            counts=tuple(map(sum, zip(*counts, strict=True))),
            label_counts=tuple(map(sum, zip(*labels, strict=True))),
            index=index,
        )


class BatchLoader(Iterator[StepBatch]):
    """This rank's micro-batches step by step, starting at any step.

    Step t of G micro-batches uses the numbers t*G..t*G+G-1, of which dp rank r of dp reads t*G + j*dp + r: with a fixed
    global batch the set of micro-batches is the same at any dp, and so is the loss. All ranks of a tensor- or
    pipeline-parallel group open a loader with the same dp_rank. The order does not depend on `workers`.

    Args:
        mixture: the stream; a pass (`once`) ends after ceil(len_epoch / G) steps.
        dp_rank: this rank's place among data-parallel ranks.
        dp_size: data-parallel ranks.
        together: places of the ranks of this rank's expert-parallel group among data-parallel ranks (`RankPart`).
        context: this rank's place among context-parallel ranks, and their number.
        micro_batches_per_step: micro-batches of a global batch, over all ranks.
        workers: processes that read ahead; 0: read in this process.

    Raises:
        ConfigError: micro-batches cannot be divided evenly among ranks.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        dp_rank: int,
        dp_size: int,
        together: tuple[int, ...] = (),
        context: tuple[int, int] = (0, 1),
        micro_batches_per_step: int,
        workers: int = 0,
    ) -> None:
        if micro_batches_per_step % dp_size:
            raise ConfigError(
                f"train.global_batch_size: {micro_batches_per_step} micro-batches of {mixture.micro_batch_size} "
                f"sequences cannot be shared out evenly among {dp_size} data-parallel ranks",
                remedy="make global_batch_size a multiple of micro_batch_size * data-parallel ranks",
            )
        self._steps = _Steps(mixture, RankPart(dp_rank, dp_size, together, context), micro_batches_per_step)
        self._workers = workers
        self._next = 0
        self._iterator: Iterator[StepBatch | _Failure] | None = None

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> StepBatch:
        """The next step.

        Raises:
            DataError: the data is damaged.
            StopIteration: the pass is over.
        """
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        if isinstance(batch, _Failure):
            batch.throw()
        self._next = batch.index + self._steps.micro_batches_per_step
        return batch

    def state_dict(self) -> dict[str, int]:
        """Number of sequences returned so far, over all ranks; those that workers have read ahead do not count."""
        mixture = self._steps.mixture
        return {"consumed_sequences": mixture.start + self._next * mixture.micro_batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where another loader stopped, whatever its dp_size, workers or micro-batches per step.

        With another micro_batch_size the micro-batches differ, and reading continues at the first one that does not
        begin before the position. A stream of the unread rest begins there (mmscale.data.stream.segments).
        """
        self.close()
        mixture = self._steps.mixture
        self._next = -(-(state["consumed_sequences"] - mixture.start) // mixture.micro_batch_size)
        assert self._next >= 0, "this stream began later"

    def close(self) -> None:
        """Stop the workers. The next step starts them again."""
        self._iterator = None  # the last reference; DataLoader's iterator ends its workers when it is destroyed

    def _start(self) -> Iterator[StepBatch | _Failure]:
        """Read the remaining steps, ahead of time if there are workers."""
        indices = self._indices()
        if not self._workers:
            return (self._steps[index] for index in indices)
        loader = DataLoader(
            self._steps,
            batch_size=None,
            # A range is a sufficient sampler for DataLoader.
            sampler=cast("Sampler[int]", indices),
            num_workers=self._workers,
            prefetch_factor=_READ_AHEAD,
            collate_fn=_as_it_is,
        )
        return iter(loader)

    def _indices(self) -> range:
        """First micro-batch of each remaining step."""
        mixture, per_step = self._steps.mixture, self._steps.micro_batches_per_step
        end = mixture.len_epoch() if mixture.once else 2**62
        return range(self._next, end, per_step)


def _as_it_is(batch: Any) -> Any:
    """A collate function that changes nothing; the default one would convert every field to a tensor."""
    return batch
