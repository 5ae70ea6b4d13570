"""The position of a run in its data across changes of settings: documents that were read are not read again.

A stream of micro-batches is a pure function of its settings and of a number (mixture.py). With other settings the same
number means other documents. So a run's stream is a list of segments. Each has its settings, the sequences consumed
before it, and, once it is over, the sequences of each source that it has read. A new segment starts with the rest of
the epochs that earlier ones have started. Checkpoints keep the list (`progress["stream"]`); while nothing changes it
has one segment, which starts at 0.

No process groups, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from mmscale.config import Config
from mmscale.config.derived import blend_phases, data_seed, first_weights
from mmscale.data.prepared.identity import SourceIdentity, identity_of
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.stream.blend_phases import BlendPhases
from mmscale.data.stream.cache_files import spare_cache
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.orders import open_stream
from mmscale.data.stream.sequences import START, Begin, PackSettings
from mmscale.data.stream.source import Source
from mmscale.errors import DataError, MmscaleError
from mmscale.tables.settings import DATA_ORDERS

SPLIT = "train"
Key = tuple[str, int]  # identity of a source, and its number among equal ones


class SegmentSource(BaseModel):
    """A source of a segment.

    The sequences of a source that a closed segment has read are numbers 0 to taken - 1 of the source's stream, and
    taken + n for each n in `more`.

    Attributes:
        path, identity, selection: as in `SourceIdentity`.
        share: of the sequences.
        taken: once the segment is over, sequences of the source's stream that were read without a gap.
        more: numbers of further ones that were read, counted from `taken`.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    identity: str
    share: float
    taken: int = 0
    more: tuple[int, ...] = ()
    selection: str = ""


class Segment(BaseModel):
    """A part of a run with one order of its data.

    Attributes:
        start: sequences that were consumed before it.
        window: sequences that are dealt together.
        parts: the sources in their order.
        seq_length, micro_batch_size, seed, balance, pack_window, deal_window, document_multiple, order: as in
            `Mixture`.
        phases: steps from which on the sources have other weights, and these.
        batch: sequences of a step.
        offset: sequences that were consumed before step 0 of the phases, below 0 if the steps before were larger.
    """

    model_config = ConfigDict(frozen=True)

    start: int
    window: int
    parts: tuple[SegmentSource, ...]
    seq_length: int
    micro_batch_size: int
    seed: int
    balance: bool
    pack_window: int
    deal_window: int
    document_multiple: int = 1
    order: str = "epochs"  # the only one before runs remembered theirs
    phases: tuple[tuple[int, tuple[float, ...]], ...] = ()
    batch: int = 0  # kept by no older version
    offset: int = 0

    @property
    def keys(self) -> list[Key]:
        """Keys by which its sources are found in other segments."""
        seen: Counter[str] = Counter()
        found = []
        for part in self.parts:
            found.append((part.identity, seen[part.identity]))
            seen[part.identity] += 1
        return found

    @property
    def blend(self) -> list[tuple[int, tuple[float, ...]]]:
        """Its phases as `BlendPhases` wants them, counted from its start."""
        first = min(0, *(self._sequence(step) for step, _ in self.phases)) if self.phases else 0
        later = [(self._sequence(step), weights) for step, weights in self.phases]
        return [(first, tuple(part.share for part in self.parts)), *later]

    def _sequence(self, step: int) -> int:
        return step * self.batch + self.offset - self.start

    def same_order(self, other: Segment) -> bool:
        """Whether the same numbers mean the same documents, independent of paths."""
        return self._order() == other._order()

    def _order(self) -> tuple[Any, ...]:
        left_out = {"start", "window", "parts", "offset"} | (set() if self.phases else {"batch"})
        settings = self.model_dump(exclude=left_out)
        return settings, [(part.identity, part.selection, round(part.share, 12)) for part in self.parts]


@dataclass(frozen=True)
class Place:
    """The position from which a run continues.

    Attributes:
        mixture: its stream.
        segments: the list that checkpoints keep from here on, as plain data.
        lines: changes to print on the terminal; empty if there are none.
    """

    mixture: Mixture
    segments: list[dict[str, Any]]
    lines: list[str]


def resume_stream(
    config: Config,
    mixture: Mixture,
    *,
    data: Sequence[SourceIdentity],
    consumed: int,
    step: int,
    segments: Sequence[Mapping[str, Any]],
    saved: Mapping[str, Any] | None = None,
    known: Sequence[SourceIdentity] | None = None,
) -> Place:
    """The stream of a run from its position on.

    Args:
        config: this attempt's configuration.
        mixture: the stream of this configuration from its beginning.
        data: its sources.
        consumed: sequences that the run has consumed.
        step: that it has reached, with those of the stage before.
        segments: from the checkpoint; empty in a new run, and in checkpoints from before segments were kept.
        saved: the checkpoint's configuration, if it kept no segments.
        known: its sources likewise.

    Raises:
        DataError: the data is damaged.
    """
    past = [Segment.model_validate(segment) for segment in segments]
    order = _order_of(past, consumed=consumed, default=config.data.order)
    if mixture.order != order:
        mixture = mixture.like(order=order)
    wanted = _segment(config, data, window=mixture.window, order=order)
    if not past:
        before = _before(saved, known) if saved is not None and consumed else None
        past = [before or wanted]
    open_, closed = past[-1], past[:-1]
    if wanted.same_order(open_):
        place = _at(config, mixture, closed, open_.model_copy(update={"parts": wanted.parts}))
        return Place(place, [segment.model_dump() for segment in (*closed, open_)], [])
    done = max(0, consumed - open_.start) // open_.micro_batch_size * open_.micro_batch_size
    over, twice = _closed(open_, closed, done, config, mixture, data)
    # Phases count steps. The step decides, not the segments: their batch is not that of every step before, as a change
    # of the batch alone begins no segment while there are no phases.
    new = wanted.model_copy(update={"start": consumed, "offset": consumed - step * wanted.batch})
    place = _at(config, mixture, [*closed, over], new)
    new = new.model_copy(update={"window": place.window})
    return Place(
        place, [segment.model_dump() for segment in (*closed, over, new)], _lines(place, open_, new, twice=twice)
    )


def _order_of(past: Sequence[Segment], *, consumed: int, default: str) -> str:
    """The order that a run began with; that of the configuration for a new run.

    Raises:
        DataError: a newer version of mmscale began it in an order that this one does not have.
    """
    began = past[0].order if past else "epochs" if consumed else default
    if began not in DATA_ORDERS:
        raise DataError(
            f"data: the run reads its documents in the order {began!r}; this version has {', '.join(DATA_ORDERS)}",
            remedy="go on with the version of mmscale that the checkpoint was written with, or a newer one",
        )
    return began


def _segment(config: Config, data: Sequence[SourceIdentity], *, window: int, order: str) -> Segment:
    total = sum(source.weight for source in data)
    return Segment(
        start=0,
        window=window,
        parts=tuple(
            SegmentSource(path=one.path, identity=one.identity, share=one.weight / total, selection=one.selection)
            for one in data
        ),
        seq_length=config.model.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        seed=data_seed(config),
        balance=config.data.balance,
        pack_window=config.data.pack_window,
        deal_window=config.data.deal_window,
        document_multiple=config.data.document_multiple,
        order=order,
        phases=tuple(blend_phases(config)[1:]),
        batch=config.train.global_batch_size,
    )


def _before(saved: Mapping[str, Any], known: Sequence[SourceIdentity] | None) -> Segment | None:
    """The only segment of a run that kept none; None if it cannot be told what it read."""
    old = Config.model_validate(saved)
    if known is None:
        known = []
        for source, weight in zip(old.data.sources, first_weights(old), strict=True):
            try:
                identity = identity_of(Path(source.path), read_manifest(Path(source.path)), split=SPLIT)
            except MmscaleError:
                return None
            known.append(SourceIdentity(path=source.path, weight=weight, identity=identity))
    size = old.train.micro_batch_size
    return _segment(old, known, window=max(1, old.data.deal_window // size) * size, order="epochs") if known else None


def _at(config: Config, mixture: Mixture, closed: Sequence[Segment], segment: Segment) -> Mixture:
    """The stream of a segment, behind those that are over."""
    begins = [_begin(key, source, closed, config) for key, source in zip(segment.keys, mixture.sources, strict=True)]
    if segment.start == 0 and all(begin is START for begin in begins):
        return mixture
    return _stream(segment, mixture.sources, begins, mixture)


def _stream(segment: Segment, sources: Sequence[Source], begins: Sequence[Begin], mixture: Mixture) -> Mixture:
    """The stream of a segment; `mixture` gives vocabulary and caches."""
    return mixture.like(
        sources,
        seq_length=segment.seq_length,
        micro_batch_size=segment.micro_batch_size,
        seed=segment.seed,
        weights=[part.share for part in segment.parts],
        phases=segment.blend[1:],
        balance=segment.balance,
        pack_window=segment.pack_window,
        deal_window=segment.deal_window,
        document_multiple=segment.document_multiple,
        order=segment.order,
        begins=begins,
        start=segment.start,
    )


def _begin(key: Key, source: Source, closed: Sequence[Segment], config: Config) -> Begin:
    """The position of a source after the segments that have read it."""
    begin, cache, today = START, config.data.cache, source
    for segment in closed:
        if key not in segment.keys:
            continue
        position = segment.keys.index(key)
        part = segment.parts[position]
        if not part.taken and not part.more:
            continue
        source = today.under(part.selection)
        begin = _left(begin, source)
        stream = open_stream(
            source,
            PackSettings(
                position=position,
                seq_length=segment.seq_length,
                seed=segment.seed,
                window=segment.pack_window,
                multiple=segment.document_multiple,
            ),
            order=segment.order,
            caches=(source.folder / ".cache" if cache is None else Path(cache), spare_cache(config)),
            begin=begin,
        )
        begin = stream.behind(part.taken, part.taken + np.array(part.more, np.int64))
    return _left(begin, today)


def _left(begin: Begin, source: Source) -> Begin:
    """Without those leftovers that the weights of today leave out."""
    if source.selection is None or not begin.leftovers:
        return begin
    kept = [(epoch, left[source.selection.weights(left) > 0.0]) for epoch, left in begin.leftovers]
    return replace(begin, leftovers=tuple((epoch, left) for epoch, left in kept if len(left)))


def _closed(
    segment: Segment,
    closed: Sequence[Segment],
    done: int,
    config: Config,
    mixture: Mixture,
    data: Sequence[SourceIdentity],
) -> tuple[Segment, int]:
    """The segment with the sequences it has read, and how many of its sequences will be read twice.

    If all of its sources still exist, the pending sequences are known exactly; otherwise its last window counts as not
    read.
    """
    sources = _sources(segment, mixture, data)
    if sources is None:
        taken = BlendPhases(segment.blend).counts(done // segment.window * segment.window)
        read = [(int(count), np.zeros(0, np.int64)) for count in taken]
        twice = done % segment.window
    else:
        begins = [_begin(key, source, closed, config) for key, source in zip(segment.keys, sources, strict=True)]
        read = _stream(segment, sources, begins, mixture).read(done)
        twice = 0
    parts = tuple(
        part.model_copy(update={"taken": taken, "more": tuple((more - taken).tolist())})
        for part, (taken, more) in zip(segment.parts, read, strict=True)
    )
    return segment.model_copy(update={"parts": parts}), twice


def _sources(segment: Segment, mixture: Mixture, data: Sequence[SourceIdentity]) -> list[Source] | None:
    """The sources of a segment where they are today; None if one is gone or holds other documents."""
    here = {one.identity: source for one, source in zip(data, mixture.sources, strict=True)}
    found: list[Source] = []
    for part in segment.parts:
        source = here.get(part.identity)
        if source is None:
            folder = Path(part.path)
            try:
                if identity_of(folder, read_manifest(folder), split=SPLIT) != part.identity:
                    return None
                source = Source(folder, split=SPLIT, vocabulary=mixture.vocabulary)
            except MmscaleError:
                return None
        found.append(source.under(part.selection))
    return found


def _lines(mixture: Mixture, old: Segment, new: Segment, *, twice: int) -> list[str]:
    again = f"up to {twice} sequences of its last window are read twice" if twice else "no document is read twice"
    lines = [f"data: another order from sequence {new.start} on; epochs that were begun are read to their end, {again}"]
    for part, source, begin in zip(new.parts, mixture.sources, mixture.begins, strict=True):
        if part.identity not in {one.identity for one in old.parts} and begin is START:
            lines.append(f"data: {part.path} is read from its beginning, {len(source)} documents")
        else:
            left = f"{begin.unread} of its {len(source)} documents are left, then " if begin.unread else ""
            lines.append(f"data: {part.path}: {left}epoch {begin.epoch + 1}")
    return lines
