"""The settings of a part of a run that has one order of its data, as checkpoints keep them. segments.py uses them.

No data is opened here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from mmscale.config import Config
from mmscale.config.derived import blend_phases, data_seed
from mmscale.data.prepared.identity import SourceIdentity
from mmscale.data.stream.causal_masking import Masking, masking_of

Key = tuple[str, int]  # identity of a source, and its number among equal ones


class SegmentSource(BaseModel):
    """A source of a segment.

    The sequences of a source that a closed segment has read are numbers 0 to taken - 1 of the source's stream, and
    taken + n for each n in `more`.

    Attributes:
        path, identity, selection, retrieval: as in `SourceIdentity`.
        share: of the sequences.
        taken: once the segment is over, sequences of the source's stream that were read without a gap.
        more: numbers of further ones that were read, counted from `taken`.
        max_epochs: as in `SourceIdentity`.
        limit: sequences of the source's stream that this allows, if the run was going to read as many.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    identity: str
    share: float
    taken: int = 0
    more: tuple[int, ...] = ()
    selection: str = ""
    retrieval: str = ""
    max_epochs: int | None = None
    limit: int | None = None


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
        masking: causal masking of the documents; None: none.
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
    masking: Masking | None = None  # no older version had it

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
        parts = [
            (part.identity, part.selection, part.retrieval, round(part.share, 12), part.max_epochs)
            for part in self.parts
        ]
        return settings, parts


def segment_of(config: Config, data: Sequence[SourceIdentity], *, window: int, order: str) -> Segment:
    """The segment of a run that begins with this configuration.

    Args:
        config: of the run.
        data: its sources.
        window: sequences that are dealt together.
        order: of the documents, a name in `DATA_ORDERS`.
    """
    total = sum(source.weight for source in data)
    return Segment(
        start=0,
        window=window,
        parts=tuple(
            SegmentSource(
                path=one.path,
                identity=one.identity,
                share=one.weight / total,
                selection=one.selection,
                retrieval=one.retrieval,
                max_epochs=one.max_epochs,
            )
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
        masking=masking_of(config),
    )
