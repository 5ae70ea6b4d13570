"""Opens the stream of a source in the order of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmscale.data.stream.blocks import BlockStream
from mmscale.data.stream.packing_cache import PackedStream
from mmscale.data.stream.sequences import START, PackSettings, SequenceStream, StreamStart
from mmscale.data.stream.source import Source
from mmscale.tables.settings import DATA_ORDERS


def open_stream(
    source: Source, packing: PackSettings, *, order: str, caches: Sequence[Path], begin: StreamStart = START
) -> SequenceStream:
    """The sequences of a source.

    Args:
        source: the documents.
        packing: how they are packed into sequences.
        order: name in `DATA_ORDERS`.
        caches: folders for indices, the preferred one first.
        begin: what was read before.

    Raises:
        DataError: a document is longer than a sequence.
    """
    sizes = DATA_ORDERS[order]
    if sizes.block and len(source) > sizes.above:
        return BlockStream(source, packing, order=sizes, folders=caches, begin=begin)
    return PackedStream(source, packing, cache=caches[0], begin=begin)
