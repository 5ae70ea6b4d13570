"""The place of a run in its data, through every change of settings: what was read of each source stays read.

A stream of micro-batches is a pure function of its settings and of a number (mixture.py). With other settings the same
number means other documents. So a run's stream is a list of segments: each has its settings, the sequences that were
consumed before it, and, once it is over, which sequences of each source it has read. A new segment begins with what is
left of the epochs that earlier ones began. Checkpoints keep the list (`progress["stream"]`); as long as nothing changes
it has one segment, which begins at 0.

No process groups, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from mmscale.config import Config
from mmscale.data.identity import SourceIdentity, identity_of
from mmscale.data.manifest import read_manifest
from mmscale.data.mixture import Mixture
from mmscale.data.packing import blended
from mmscale.data.packing_cache import START, Begin, PackedStream
from mmscale.data.source import Source
from mmscale.data.vocab import Vocabulary
from mmscale.errors import MmscaleError

SPLIT = "train"
Key = tuple[str, int]  # identity of a source, and which of several equal ones it is


class Part(BaseModel):
    """A source of a segment.

    Attributes:
        path, identity: as in `SourceIdentity`.
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


class Segment(BaseModel):
    """A stretch of a run with one order of its data.

    Attributes:
        start: sequences that were consumed before it.
        window: sequences that are dealt together.
        parts: the sources in their order.
        seq_length, micro_batch_size, seed, balance, pack_window, deal_window: as in `Mixture`.
    """

    model_config = ConfigDict(frozen=True)

    start: int
    window: int
    parts: tuple[Part, ...]
    seq_length: int
    micro_batch_size: int
    seed: int
    balance: bool
    pack_window: int
    deal_window: int

    @property
    def keys(self) -> list[Key]:
        """What its sources are known by in other segments."""
        seen: Counter[str] = Counter()
        found = []
        for part in self.parts:
            found.append((part.identity, seen[part.identity]))
            seen[part.identity] += 1
        return found

    def same_order(self, other: Segment) -> bool:
        """Whether the same numbers mean the same documents, wherever those lie."""
        return self._order() == other._order()

    def _order(self) -> tuple[Any, ...]:
        settings = self.model_dump(exclude={"start", "window", "parts"})
        return settings, [(part.identity, round(part.share, 12)) for part in self.parts]


@dataclass(frozen=True)
class Place:
    """Where a run goes on.

    Attributes:
        mixture: its stream.
        segments: the list that checkpoints keep from here on, as plain data.
        lines: what changed for the reader of the terminal; empty if nothing did.
    """

    mixture: Mixture
    segments: list[dict[str, Any]]
    lines: list[str]


def go_on(
    config: Config,
    mixture: Mixture,
    *,
    data: Sequence[SourceIdentity],
    consumed: int,
    segments: Sequence[Mapping[str, Any]],
    saved: Mapping[str, Any] | None = None,
    known: Sequence[SourceIdentity] | None = None,
) -> Place:
    """The stream of a run from its place on.

    Args:
        config: this attempt's configuration.
        mixture: the stream of this configuration from its beginning.
        data: its sources.
        consumed: sequences that the run has consumed.
        segments: what the checkpoint kept; empty in a new run, and in checkpoints from before it was kept.
        saved: the checkpoint's configuration, where it kept no segments.
        known: its sources likewise.

    Raises:
        DataError: data that is to be read is damaged.
    """
    wanted = _segment(config, data, window=mixture.window)
    past = [Segment.model_validate(segment) for segment in segments]
    if not past:
        before = _before(saved, known) if saved is not None and consumed else None
        past = [before or wanted]
    open_, closed = past[-1], past[:-1]
    if wanted.same_order(open_):
        place = _at(config, mixture, closed, open_.model_copy(update={"parts": wanted.parts}))
        return Place(place, [segment.model_dump() for segment in (*closed, open_)], [])
    done = max(0, consumed - open_.start) // open_.micro_batch_size * open_.micro_batch_size
    over, twice = _closed(open_, closed, done, config, mixture, data)
    new = wanted.model_copy(update={"start": consumed})
    place = _at(config, mixture, [*closed, over], new)
    new = new.model_copy(update={"window": place.window})
    return Place(
        place, [segment.model_dump() for segment in (*closed, over, new)], _lines(place, open_, new, twice=twice)
    )


def _segment(config: Config, data: Sequence[SourceIdentity], *, window: int) -> Segment:
    total = sum(source.weight for source in data)
    return Segment(
        start=0,
        window=window,
        parts=tuple(Part(path=one.path, identity=one.identity, share=one.weight / total) for one in data),
        seq_length=config.model.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
        balance=config.data.balance,
        pack_window=config.data.pack_window,
        deal_window=config.data.deal_window,
    )


def _before(saved: Mapping[str, Any], known: Sequence[SourceIdentity] | None) -> Segment | None:
    """The only segment of a run that kept none; None if it cannot be told what it read."""
    old = Config.model_validate(saved)
    if known is None:
        known = []
        for source in old.data.sources:
            try:
                identity = identity_of(Path(source.path), read_manifest(Path(source.path)), split=SPLIT)
            except MmscaleError:
                return None
            known.append(SourceIdentity(path=source.path, weight=source.weight, identity=identity))
    size = old.train.micro_batch_size
    return _segment(old, known, window=max(1, old.data.deal_window // size) * size) if known else None


def _at(config: Config, mixture: Mixture, closed: Sequence[Segment], segment: Segment) -> Mixture:
    """The stream of a segment, behind those that are over."""
    begins = [
        _begin(key, source, closed, cache=config.data.cache)
        for key, source in zip(segment.keys, mixture.sources, strict=True)
    ]
    if segment.start == 0 and all(begin is START for begin in begins):
        return mixture
    return _stream(segment, mixture.sources, mixture.vocabulary, begins, cache=config.data.cache)


def _stream(
    segment: Segment, sources: Sequence[Source], vocabulary: Vocabulary, begins: Sequence[Begin], *, cache: str | None
) -> Mixture:
    return Mixture(
        sources,
        vocabulary,
        seq_length=segment.seq_length,
        micro_batch_size=segment.micro_batch_size,
        seed=segment.seed,
        weights=[part.share for part in segment.parts],
        balance=segment.balance,
        pack_window=segment.pack_window,
        deal_window=segment.deal_window,
        cache=None if cache is None else Path(cache),
        begins=begins,
        start=segment.start,
    )


def _begin(key: Key, source: Source, closed: Sequence[Segment], *, cache: str | None) -> Begin:
    """Where a source goes on after the segments that have read it."""
    begin = START
    for segment in closed:
        if key not in segment.keys:
            continue
        position = segment.keys.index(key)
        part = segment.parts[position]
        if not part.taken and not part.more:
            continue
        stream = PackedStream(
            source,
            position=position,
            seq_length=segment.seq_length,
            seed=segment.seed,
            window=segment.pack_window,
            shuffle=True,
            once=False,
            cache=source.folder / ".cache" if cache is None else Path(cache),
            begin=begin,
        )
        begin = stream.behind(part.taken, part.taken + np.array(part.more, np.int64))
    return begin


def _closed(
    segment: Segment,
    closed: Sequence[Segment],
    done: int,
    config: Config,
    mixture: Mixture,
    data: Sequence[SourceIdentity],
) -> tuple[Segment, int]:
    """The segment with what it has read, and how many of its sequences are going to be read twice.

    The sequences in hand are known exactly where all of its sources are still there; otherwise its last window counts
    as not read.
    """
    sources = _sources(segment, mixture, data)
    if sources is None:
        taken = blended(np.array([part.share for part in segment.parts]), count=done // segment.window * segment.window)
        read = [(int(count), np.zeros(0, np.int64)) for count in taken]
        twice = done % segment.window
    else:
        begins = [
            _begin(key, source, closed, cache=config.data.cache)
            for key, source in zip(segment.keys, sources, strict=True)
        ]
        read = _stream(segment, sources, mixture.vocabulary, begins, cache=config.data.cache).read(done)
        twice = 0
    parts = tuple(
        part.model_copy(update={"taken": taken, "more": tuple((more - taken).tolist())})
        for part, (taken, more) in zip(segment.parts, read, strict=True)
    )
    return segment.model_copy(update={"parts": parts}), twice


def _sources(segment: Segment, mixture: Mixture, data: Sequence[SourceIdentity]) -> list[Source] | None:
    """The sources of a segment where they are today; None if one is gone or holds other documents."""
    here = {one.identity: source for one, source in zip(data, mixture.sources, strict=True)}
    found = []
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
        found.append(source)
    return found


def _lines(mixture: Mixture, old: Segment, new: Segment, *, twice: int) -> list[str]:
    again = f"up to {twice} sequences of its last window are read twice" if twice else "no document is read twice"
    lines = [f"data: another order from sequence {new.start} on; epochs that were begun are read to their end, {again}"]
    for part, source, begin in zip(new.parts, mixture.sources, mixture.begins, strict=True):
        if part.identity not in {one.identity for one in old.parts} and begin is START:
            lines.append(f"data: {part.path} is read from its beginning, {len(source)} documents")
        else:
            left = f"{begin.unread} of its {len(source)} documents are left, then " if begin.leftovers else ""
            lines.append(f"data: {part.path}: {left}epoch {begin.epoch + 1}")
    return lines
