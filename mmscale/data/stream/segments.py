"""The position of a run in its data across changes of settings: documents that were read are not read again.

A stream of micro-batches is a pure function of its settings and of a number (mixture.py). With other settings the same
number means other documents. So a run's stream is a list of segments. Each has its settings, the sequences consumed
before it, and, once it is over, the sequences of each source that it has read. A new segment starts with the rest of
the epochs that earlier ones have started. Checkpoints store the list (`progress["stream"]`); as long as no setting
changes it has one segment, which starts at 0.

No process groups, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.config import Config
from mmscale.config.derived import first_weights
from mmscale.data.prepared.identity import SourceIdentity, identity_of
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.stream.blend_phases import BlendPhases
from mmscale.data.stream.cache_files import fallback_cache
from mmscale.data.stream.composites import read_as
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.orders import open_stream
from mmscale.data.stream.segment_settings import Key, Segment, segment_of
from mmscale.data.stream.sequences import START, PackSettings, StreamStart
from mmscale.data.stream.source import Source
from mmscale.errors import DataError, MmscaleError
from mmscale.tables.settings import DATA_ORDERS

SPLIT = "train"


@dataclass(frozen=True)
class Place:
    """The position from which a run continues.

    Attributes:
        mixture: its stream.
        segments: the list that checkpoints store from now on, as plain data.
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
    ahead: int = 0,
    saved: Mapping[str, Any] | None = None,
    known: Sequence[SourceIdentity] | None = None,
) -> Place:
    """The stream of a run, starting at its position.

    Args:
        config: this attempt's configuration.
        mixture: the stream of this configuration from its beginning.
        data: its sources.
        consumed: sequences that the run has consumed.
        step: that it has reached, with those of the stage before.
        segments: from the checkpoint; empty in a new run, and in checkpoints from before segments were kept.
        ahead: sequences that it is going to consume.
        saved: the checkpoint's configuration, if it kept no segments.
        known: its sources likewise.

    Raises:
        DataError: the data is damaged, or `max_epochs` leave fewer sequences than are going to be consumed.
    """
    past = [Segment.model_validate(segment) for segment in segments]
    order = _order_of(past, consumed=consumed, default=config.data.order)
    if mixture.order != order:
        mixture = mixture.like(order=order)
    wanted = segment_of(config, data, window=mixture.window, order=order)
    if not past:
        before = _before(saved, known) if saved is not None and consumed else None
        past = [before or wanted]
    open_, closed = past[-1], past[:-1]
    if wanted.same_order(open_):
        place = _at(config, mixture, closed, open_.model_copy(update={"parts": wanted.parts}))
        open_ = _limited(open_, place, consumed=consumed, ahead=ahead, batch=wanted.batch)
        return Place(place, [segment.model_dump() for segment in (*closed, open_)], [])
    done = max(0, consumed - open_.start) // open_.micro_batch_size * open_.micro_batch_size
    over, twice = _closed(open_, closed, done, config, mixture, data)
    # Phases count steps, so the offset is computed from the step and not from the segments: without phases a change of
    # the batch alone does not begin a segment, so a segment may contain steps of different batches.
    new = wanted.model_copy(update={"start": consumed, "offset": consumed - step * wanted.batch})
    place = _at(config, mixture, [*closed, over], new)
    new = _limited(new, place, consumed=consumed, ahead=ahead, batch=wanted.batch)
    new = new.model_copy(update={"window": place.window})
    return Place(
        place, [segment.model_dump() for segment in (*closed, over, new)], _lines(place, open_, new, twice=twice)
    )


def _limited(segment: Segment, mixture: Mixture, *, consumed: int, ahead: int, batch: int) -> Segment:
    """The segment with the limits that it will reach.

    Raises:
        DataError: it ends before all sequences are consumed that are going to be.
    """
    done = consumed - mixture.start
    end = mixture.end(done + ahead)
    if end is not None and end < done + ahead:
        raise DataError(
            f"data: no source may be read more often than max_epochs says ({mixture.described_limits()}), which leaves "
            f"data for {max(0, end - done) // batch} of the {ahead // batch} steps to come",
            remedy="raise max_epochs of a source in data.blend, or lower train.steps",
        )
    limits = mixture.limits(done + ahead)
    parts = [part.model_copy(update={"limit": limit}) for part, limit in zip(segment.parts, limits, strict=True)]
    return segment.model_copy(update={"parts": tuple(parts)})


def _order_of(past: Sequence[Segment], *, consumed: int, default: str) -> str:
    """The order with which a run began; that of the configuration for a new run.

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


def _before(saved: Mapping[str, Any], known: Sequence[SourceIdentity] | None) -> Segment | None:
    """The only segment of a run whose checkpoint has none; None if it is unknown what it read."""
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
    return segment_of(old, known, window=max(1, old.data.deal_window // size) * size, order="epochs") if known else None


def _at(config: Config, mixture: Mixture, closed: Sequence[Segment], segment: Segment) -> Mixture:
    """The stream of a segment, after the closed ones."""
    begins = [_begin(key, source, closed, config) for key, source in zip(segment.keys, mixture.sources, strict=True)]
    if segment.start == 0 and all(begin is START for begin in begins):
        return mixture
    return _stream(segment, mixture.sources, begins, mixture)


def _stream(segment: Segment, sources: Sequence[Source], begins: Sequence[StreamStart], mixture: Mixture) -> Mixture:
    """The stream of a segment; `mixture` gives vocabulary and caches."""
    return mixture.like(
        sources,
        seq_length=segment.seq_length,
        micro_batch_size=segment.micro_batch_size,
        seed=segment.seed,
        weights=[part.share for part in segment.parts],
        phases=segment.blend[1:],
        max_epochs=[part.max_epochs for part in segment.parts],
        balance=segment.balance,
        pack_window=segment.pack_window,
        deal_window=segment.deal_window,
        document_multiple=segment.document_multiple,
        masking=segment.masking,
        order=segment.order,
        begins=begins,
        start=segment.start,
    )


def _begin(key: Key, source: Source, closed: Sequence[Segment], config: Config) -> StreamStart:
    """The position in a source after the segments that have read it."""
    begin, cache, today = START, config.data.cache, source
    for segment in closed:
        if key not in segment.keys:
            continue
        position = segment.keys.index(key)
        part = segment.parts[position]
        if not part.taken and not part.more:
            continue
        source = read_as(today, part.selection, part.retrieval)
        begin = _left(begin, source)
        stream = open_stream(
            source,
            PackSettings(
                position=position,
                seq_length=segment.seq_length,
                seed=segment.seed,
                window=segment.pack_window,
                multiple=segment.document_multiple,
                masking=segment.masking,
            ),
            order=segment.order,
            caches=(source.folder / ".cache" if cache is None else Path(cache), fallback_cache(config)),
            begin=begin,
        )
        begin = stream.position_after(part.taken, part.taken + np.array(part.more, np.int64))
    return _left(begin, today)


def _left(begin: StreamStart, source: Source) -> StreamStart:
    """The same without leftovers that today's weights exclude."""
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

    If all of its sources still exist, the unread sequences are known exactly; otherwise its last window counts as not
    read.
    """
    sources = _sources(segment, mixture, data)
    if sources is None:
        limits = [None if part.limit is None else partial(_if_at_most, part.limit) for part in segment.parts]
        taken = BlendPhases(segment.blend, limits).counts(done // segment.window * segment.window)
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


def _if_at_most(number: int, most: int) -> int | None:
    return number if number <= most else None


def _sources(segment: Segment, mixture: Mixture, data: Sequence[SourceIdentity]) -> list[Source] | None:
    """The sources of a segment at their present places; None if one is gone or holds other documents."""
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
        found.append(read_as(source, part.selection, part.retrieval))
    return found


def _lines(mixture: Mixture, old: Segment, new: Segment, *, twice: int) -> list[str]:
    again = f"up to {twice} sequences of its last window are read twice" if twice else "no document is read twice"
    lines = [f"data: another order from sequence {new.start} on; epochs that were begun are read to their end, {again}"]
    for part, source, begin in zip(new.parts, mixture.sources, mixture.begins, strict=True):
        if part.identity not in {one.identity for one in old.parts} and begin is START:
            lines.append(f"data: {part.path} is read from its beginning, {len(source)} documents")
        else:
            of = f"{begin.begun} begun epochs of" if begin.begun > 1 else "its"
            left = f"{begin.unread} of {of} {len(source)} documents are left, then " if begin.unread else ""
            lines.append(f"data: {part.path}: {left}epoch {begin.epoch + 1}")
    return lines
