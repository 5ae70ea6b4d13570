"""Makes the parts of a data set in worker processes. A worker that dies is reported, and none outlives its parent.

parts.py defines a part; prepare.py uses this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from mmscale.data.modalities.modality import Modality
from mmscale.data.modalities.table import MODALITIES, open_codecs, register
from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.encode import DocumentEncoder
from mmscale.data.prepared.parts import FinishedPart, PartJob, build_part
from mmscale.data.progress import Advance
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError

_POLL = 0.2  # interval in which the workers' counters are read [s]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class WorkSetup:
    """The inputs of every worker.

    Attributes:
        gpus: GPUs of the machine that tokenizers use, if they can (`modality.OnDevice`); 0: none.
    """

    folder: Path
    vocabulary: Vocabulary
    max_tokens: int
    held_out: float
    strict: bool
    salvage: tuple[str, ...] = ()
    gpus: int = 0
    modalities: tuple[type[Modality], ...] = field(default_factory=lambda: tuple(MODALITIES.values()))

    def encoder(self, number: int = 0) -> DocumentEncoder:
        """An encoder of documents, with the data set's tokenizers.

        Args:
            number: of this process among those of the machine, which chooses its GPU.

        Raises:
            ConfigError: the machine has no GPU, and `gpus` is not 0.
        """
        codecs = open_codecs(self.folder)
        for codec in codecs.values() if self.gpus else ():
            if hasattr(codec, "use_device"):
                codec.use_device(number % self.gpus)
        return DocumentEncoder(
            self.vocabulary,
            text=open_text_tokenizer(self.folder),
            codecs=codecs,
            max_tokens=self.max_tokens,
            salvage=self.salvage,
        )


def build_parts(
    setup: WorkSetup, jobs: Sequence[PartJob], *, workers: int, advance: Advance, first: int = 0
) -> list[FinishedPart]:
    """Make parts, several at a time.

    Args:
        setup: inputs of the workers.
        jobs: the parts to make, in any order.
        workers: processes; with one the parts are made in this process.
        advance: called with the number of processed records.
        first: number of the first worker among the processes of this machine.

    Returns:
        The finished parts in the order of `jobs`.

    Raises:
        DataError: a part could not be made, or a worker died. Parts that were finished before are kept.
    """
    if not jobs:  # an encoder would be loaded, on a GPU if there is one
        return []
    if workers == 1 or len(jobs) <= 1:
        return _build_here(setup, jobs, advance, first)
    context = multiprocessing.get_context("spawn")  # forking a process with tokenizer or torch threads may hang
    # Raw memory, one cell per part, without locks: a worker killed while holding a lock would block the others.
    stop, counters = context.RawValue("b", 0), context.RawArray("q", len(jobs))
    initargs = (setup, stop, counters, os.getpid())
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker, initargs=initargs)
    try:
        with pool:
            try:
                futures = [pool.submit(_work, index, job, first) for index, job in enumerate(jobs)]
                _watch(futures, counters, advance)
                return [future.result() for future in futures]
            except BaseException:
                stop.value = 1  # makes running parts stop after their current chunk
                pool.shutdown(wait=True, cancel_futures=True)  # only then may the caller remove half-written files
                raise
    except BrokenProcessPool as error:
        raise DataError(
            "data: a worker process died while it made a part (killed, or out of memory?)",
            remedy="run the same command again, with fewer workers if memory is short: finished parts are kept",
        ) from error


def _build_here(setup: WorkSetup, jobs: Sequence[PartJob], advance: Advance, number: int) -> list[FinishedPart]:
    encoder = setup.encoder(number)
    through = 0

    def count(records: int) -> None:
        nonlocal through
        through += records
        advance(through)

    return [_build(setup, encoder, job, count, lambda: False) for job in jobs]


def _build(
    setup: WorkSetup, encoder: DocumentEncoder, job: PartJob, count: Callable[[int], None], stopped: Callable[[], bool]
) -> FinishedPart:
    return build_part(
        setup.folder, job, encoder, held_out=setup.held_out, strict=setup.strict, advance=count, stopped=stopped
    )


def _watch(futures: Sequence[Future[Any]], counters: Any, advance: Advance) -> None:
    """Wait for all parts; return early at the first one that failed."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=_POLL, return_when=FIRST_COMPLETED)
        advance(sum(counters))
        for future in done:
            future.result()


# ------------------------------------------------------------------------------------------------ inside a worker

_worker: tuple[WorkSetup, DocumentEncoder | None, Any, Any] | None = None


def _start_worker(setup: WorkSetup, stop: Any, counters: Any, parent: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    with contextlib.suppress(OSError, AttributeError):  # Linux: die with the parent, even if it is killed with SIGKILL
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # One thread per worker, because the workers already use all cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, if the image tokenizer imports it
    threadpool_limits(1)  # for numpy's BLAS, which is loaded already
    for modality in setup.modalities:  # a new process has registered the built-in ones only
        register(modality)
    _worker = (setup, None, stop, counters)


def _work(index: int, job: PartJob, first: int) -> FinishedPart:
    global _worker
    assert _worker is not None
    setup, encoder, stop, counters = _worker
    if encoder is None:
        # Workers begin with consecutive jobs, so they begin on different GPUs.
        encoder = setup.encoder(first + index)
        _worker = (setup, encoder, stop, counters)

    def count(records: int) -> None:
        counters[index] += records

    return _build(setup, encoder, job, count, lambda: bool(stop.value))
