"""`mmscale data score` by a run: perplexity, memorisation and influence of each training document of a data set.

Documents are scored in slices whose sums are kept in .cache/scores of the data set, so a command that is started again
continues. D documents, K modalities.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from mmscale.data.arrays import read_array
from mmscale.data.prepared.folder_lock import write_error
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import TRAIN, check_tokenizers, read_manifest
from mmscale.data.process_pool import map_in_processes
from mmscale.data.progress import Reporter
from mmscale.data.scoring.stored import check_names, write_scores
from mmscale.data.stream.source import Source
from mmscale.errors import DataError
from mmscale.inference.document_losses import LABELS, LIKELIEST, LOSS, document_sums
from mmscale.inference.model import RunModel, open_run
from mmscale.inference.retrieval_heads import best_heads, masked_heads, retrieval_scores
from mmscale.runtime import device
from mmscale.runtime.atomic_files import write_atomic
from mmscale.tables.routings import Routing
from mmscale.tables.run_scores import RUN_SCORES

SLICE = 1024  # documents whose sums are kept together
HEADS = 0.05  # share of the heads that AttentionInfluence masks
_CACHE = ".cache/scores"
_MOST_NATS = 80.0  # exp of it fits float32

Sums = NDArray[np.float64]  # [..., 3], the last axis as of `document_sums`


def _perplexity(sums: Sums, _: Sums) -> NDArray[np.float64]:
    return np.exp(np.minimum(_mean(sums, LOSS), _MOST_NATS))


def _memorised(sums: Sums, _: Sums) -> NDArray[np.float64]:
    return _mean(sums, LIKELIEST)


def _influence(sums: Sums, masked: Sums) -> NDArray[np.float64]:
    loss = _mean(sums, LOSS)
    return (_mean(masked, LOSS) - loss) / np.where(loss > 0.0, loss, np.nan)


def _mean(sums: Sums, what: int) -> NDArray[np.float64]:
    """Mean over labels; NaN if there are none."""
    return sums[..., what] / np.where(sums[..., LABELS] > 0.0, sums[..., LABELS], np.nan)


VALUES: dict[str, Callable[[Sums, Sums], NDArray[np.float64]]] = {
    "perplexity": _perplexity,
    "memorised": _memorised,
    "influence": _influence,
}  # from sums with all heads and with masked ones (the same, if none are masked) to scores


def score_by_run(
    folder: Path,
    kind: str,
    run: Path,
    *,
    step: int | None = None,
    routing: Routing = Routing.CAUSAL,
    heads: float = HEADS,
    name: str | None = None,
    workers: int = 1,
    reporter: Reporter,
) -> dict[str, Any]:
    """Write a score of each training document to scores/NAME.npy, and of its modalities to scores/NAME_MODALITY.npy.

    A document without a trained label has no score (NaN), nor has it one of a modality that it lacks.

    Args:
        folder: a prepared data set.
        kind: a key of `RUN_SCORES`.
        run: a run folder.
        step: the checkpoint; None: the newest.
        routing: mode by which experts are assigned to tokens.
        heads: share of the attention heads that influence masks.
        name: of the score; default: the kind.
        workers: processes, each with a model of its own, and with a GPU of its own if there are several.
        reporter: shows the progress.

    Returns:
        As `write_scores`; and `run`, `step`, `routing`, `trained_on` (whether the run's data settings name this data
        set, or its weights were trained on it before), for influence also `heads` and their `retrieval` scores.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        DataError: the data set is damaged, or was made with other tokenizers; or a process was killed.
        UsageError: the checkpoint does not support that routing, or the name is invalid.
    """
    name = name or kind
    manifest = read_manifest(folder)
    names = [name, *(f"{name}_{modality}" for modality in manifest.modalities)]
    check_names(folder, names)
    with open_run(run, step=step) as model:
        model.require(routing)
        check_tokenizers(folder, manifest.tokenizers, model.tokenizers, where=f"step {model.step} of {run}")
        source = Source(folder, split=TRAIN, vocabulary=model.vocabulary)
        made: dict[str, Any] = {"by": f"{kind}:{run}", "run": str(run), "step": model.step, "routing": routing.value}
        chosen: list[tuple[int, int]] = []
        if RUN_SCORES[kind].masks:
            found = retrieval_scores(model, routing=routing)
            chosen = best_heads(found, share=heads)
            made |= {"heads": chosen, "retrieval": [round(float(found[one]), 4) for one in chosen]}
        identity, before = identity_of(folder, manifest), {read for _, read in model.trained_before}
        own = any(Path(one.path).resolve() == folder.resolve() for one in model.config.data.sources)
        trained_on = own or identity in before
        cache = _SliceCache(folder, name, [identity, _digest(model), routing.value, chosen])
        passes = [[], chosen] if chosen else [[]]
        shape = (len(source), len(model.vocabulary.names))
        work = _SliceWork(folder, run, model.step, routing, cache)
        jobs = [job for heads in passes for job in _missing(cache, heads, shape)]
        several = min(workers, len(jobs)) > 1
        if not several:
            _do(jobs, lambda job: work.keep(model, source, job), reporter)
    if several:  # this process needs its model no longer
        with reporter.bar("slices of documents", len(jobs)) as advance:
            threads = max(1, (os.cpu_count() or 1) // workers)
            for done, _ in enumerate(
                map_in_processes(partial(_in_process, work, threads), jobs, workers, begin=device.see_only)
            ):
                advance(done + 1)
    sums = [_kept(cache, heads, shape) for heads in passes]
    value = VALUES[kind]
    scores = {name: value(sums[0].sum(axis=1), sums[-1].sum(axis=1))}
    for number, modality in enumerate(manifest.modalities):
        scores[f"{name}_{modality}"] = value(sums[0][:, number], sums[-1][:, number])
    result = write_scores(folder, scores, made=made, lacking=True)
    cache.remove()
    return result | made | {"trained_on": trained_on}


@dataclass(frozen=True)
class _Slice:
    """Documents whose sums are kept in one file, and the attention heads that are masked."""

    heads: tuple[tuple[int, int], ...]
    first: int
    stop: int

    @property
    def file(self) -> str:
        return f"{'masked' if self.heads else 'all'}-{self.first}.npy"


@dataclass(frozen=True)
class _SliceWork:
    """The inputs of all slices.

    Attributes:
        folder: the data set.
        run: the run's folder.
        step: the checkpoint.
        routing: mode by which experts are assigned to tokens.
        cache: receives the sums.
    """

    folder: Path
    run: Path
    step: int
    routing: Routing
    cache: _SliceCache

    def keep(self, model: RunModel, source: Source, job: _Slice) -> None:
        """Compute the sums of a slice."""
        numbers = np.arange(job.first, job.stop)
        rows = source.rows(numbers)
        documents = np.split(source.read(numbers, rows), np.cumsum(rows.lengths)[:-1])
        with masked_heads(model, job.heads):
            self.cache.write(job.file, document_sums(model, documents, rows.trained, routing=self.routing))


_open = contextlib.ExitStack()  # in a process of a pool, which computes several slices
_opened: list[tuple[RunModel, Source]] = []


def _in_process(work: _SliceWork, threads: int, job: _Slice) -> None:
    """Compute the sums of a slice in a process of a pool, which keeps the model until it ends."""
    if not _opened:
        torch.set_num_threads(threads)
        model = _open.enter_context(open_run(work.run, step=work.step))
        _opened.append((model, Source(work.folder, split=TRAIN, vocabulary=model.vocabulary)))
    work.keep(*_opened[0], job)


def _slices(heads: Sequence[tuple[int, int]], documents: int) -> list[_Slice]:
    """All slices."""
    return [_Slice(tuple(heads), first, min(first + SLICE, documents)) for first in range(0, documents, SLICE)]


def _missing(cache: _SliceCache, heads: Sequence[tuple[int, int]], shape: tuple[int, int]) -> list[_Slice]:
    """Slices without sums; `shape`: documents and modalities."""
    return [job for job in _slices(heads, shape[0]) if cache.read(job.file, (job.stop - job.first, shape[1])) is None]


def _do(jobs: Sequence[_Slice], work: Callable[[_Slice], None], reporter: Reporter) -> None:
    """Compute slices one by one."""
    done = 0
    with reporter.bar("documents", sum(job.stop - job.first for job in jobs)) as advance:
        for job in jobs:
            work(job)
            done += job.stop - job.first
            advance(done)


def _kept(cache: _SliceCache, heads: Sequence[tuple[int, int]], shape: tuple[int, int]) -> Sums:
    """Sums of all documents with masked heads, float64 [D, K, 3].

    Raises:
        DataError: a slice is gone.
    """
    found = []
    for job in _slices(heads, shape[0]):
        sums = cache.read(job.file, (job.stop - job.first, shape[1]))
        if sums is None:
            raise DataError(f"data: the sums {job.file} were removed meanwhile", remedy="run the command again")
        found.append(sums)
    return np.concatenate(found)


class _SliceCache:
    """Sums of slices that earlier commands finished.

    Args:
        folder: the data set.
        name: of the score; slices of other settings under the same name are removed.
        settings: everything that determines the sums, plain JSON.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path, name: str, settings: list[Any]) -> None:
        key = hashlib.sha256(json.dumps([SLICE, *settings]).encode()).hexdigest()[:16]
        self._folder = folder / _CACHE / name / key
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, self._folder) from error
        for other in self._folder.parent.iterdir():
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)

    def read(self, file: str, shape: tuple[int, ...]) -> Sums | None:
        """The sums [n, K, 3] of a slice; None: they are not there, or damaged."""
        try:
            found = read_array(self._folder / file)
        except (OSError, ValueError):
            return None
        return found if found.shape == (*shape, 3) and found.dtype == np.float64 else None

    def write(self, file: str, sums: Sums) -> None:
        """Keep the sums of a slice.

        Raises:
            DataError: the disk is full.
        """
        content = io.BytesIO()
        np.save(content, sums)
        try:
            write_atomic(self._folder / file, content.getvalue())
        except OSError as error:
            raise write_error(error, self._folder / file) from error

    def remove(self) -> None:
        """Remove all slices; the scores are written."""
        shutil.rmtree(self._folder.parent, ignore_errors=True)


def _digest(model: RunModel) -> str:
    """A hash of everything of the model that affects sums: settings, parameters and buffers."""
    config = model.config
    settings = (config.model.model_dump_json(), config.train.micro_batch_size, config.precision.model_dump_json())
    state = xxhash.xxh3_128(repr(settings).encode())
    for name, tensor in [*model.module.named_parameters(), *model.module.named_buffers()]:
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
