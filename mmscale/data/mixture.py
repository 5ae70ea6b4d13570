"""Micro-batches by number: blended, packed, dealt to nearly equal modality shares; a pure function of the number.

It keeps no state but what can be made again. Which rank takes which number, and when, is loader.py's business.

b sequences of a micro-batch, s tokens of a sequence, K modalities.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.data.manifest import (
    check_vocabulary,
    common_tokenizers,
    has_documents,
    named_sources,
    parts_of,
    read_manifest,
)
from mmscale.data.packing import EMPTY_SEQUENCE, Packing, Purpose, blend, blended, deal, permutation
from mmscale.data.packing_cache import START, Begin, PackedStream
from mmscale.data.source import Source
from mmscale.data.vocab import NO_MODALITY, PAD, Vocabulary
from mmscale.errors import DataError

_WINDOWS_IN_MEMORY = 2
_NO_SOURCE = -1


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward and backward pass reads. Numpy, on the host; nothing here needs a device.

    A sequence holds whole documents and then padding, which counts as one more document, so that it attends to
    itself only. The label of a token is the next token of its document; the last token (EOS) has none, and neither
    has padding. So a sequence is exactly s input tokens, not s + 1, and EOS is learned as a label.

    Attributes:
        tokens: ids, PAD behind the documents, int64 [b, s].
        labels: next ids, PAD where there is none, int64 [b, s].
        loss_mask: 1 where the label is trained on, float32 [b, s].
        position_ids: position inside the document, int64 [b, s].
        document_ids: number of the document inside the sequence; a token sees its own document only, int32 [b, s].
        modality_ids: modality of the input token, -1 for padding, int8 [b, s].
        counts: tokens per modality.
        everyone: tokens per modality of each sequence of the micro-batches that the ranks of an expert-parallel group
            process at the same time, this one among them, int64 [R, b, K]; None: of this one alone, to be counted.
        label_counts: trained labels per modality of the label.
        sources: place in the blend of each sequence's source, -1 for an empty sequence, int64 [b].
        index: number of the micro-batch.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    document_ids: NDArray[np.int32]
    modality_ids: NDArray[np.int8]
    counts: tuple[int, ...]
    label_counts: tuple[int, ...]
    sources: NDArray[np.int64]
    index: int
    everyone: NDArray[np.int64] | None = None


class Numbered(Protocol):
    """Micro-batches by number, on every rank the same."""

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch with this number."""

    def sequence_counts(self, index: int) -> NDArray[np.int64]:
        """Tokens per modality of each of its sequences, int64 [b, K]."""


@dataclass(frozen=True, eq=False)
class _Window:
    """Sequences that are dealt together, in the order of the micro-batches."""

    sources: NDArray[np.int64]  # of each sequence
    places: NDArray[np.int64]  # its number inside its source's stream
    packing: Packing  # documents of each sequence, numbered inside its source
    counts: NDArray[np.int64]  # tokens of each sequence of each micro-batch [groups, b, K]
    labels: NDArray[np.int64]  # trained labels of each micro-batch [groups, K]


class Mixture:
    """A stream of micro-batches that never ends, or one pass over the sources.

    Per source and epoch, documents are shuffled and packed whole into sequences. Sequences of all sources are blended
    into one stream, of which windows are dealt into micro-batches of nearly equal modality shares ("pack, then deal").
    Sources are blended before dealing, not micro-batch by micro-batch: text-only and image-rich sources then share
    micro-batches, which keeps static expert capacity full. A window is never longer than an epoch of the sources, and
    no document is left over at an epoch's end: windows run across it.

    With `once` the sources are read a single time, each document exactly once; the last micro-batch is filled up with
    empty sequences, and all later ones are empty, so that any number of ranks can share a pass.

    Args:
        sources: prepared data.
        vocabulary: id ranges.
        seq_length: tokens of a sequence.
        micro_batch_size: sequences of a micro-batch.
        seed: seed of all orders.
        weights: relative number of sequences of each source, 0: none; default: equal. Ignored with `once`.
        balance: deal; otherwise micro-batches are consecutive sequences of the stream.
        pack_window: documents among which packing chooses.
        deal_window: sequences dealt together.
        cache: folder of packing indices; default: .cache inside each source's folder.
        shuffle: False keeps the stored order of documents and, with balance off, of sequences.
        once: one pass instead of an endless stream.
        begins: what was read of each source under other settings; default: nothing.
        start: sequences that were consumed before this stream, over all sources; its micro-batch 0 follows them.

    Attributes:
        tokenizers: fingerprints of those that made the ids of all sources.
        sources, begins, start: as they were given.
        window: sequences that are dealt together: micro-batches of a window, times their sequences.

    Raises:
        DataError: a document is longer than a sequence, or sources were made by different tokenizers.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        vocabulary: Vocabulary,
        *,
        seq_length: int,
        micro_batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        balance: bool = True,
        pack_window: int = 8192,
        deal_window: int = 2048,
        cache: Path | None = None,
        shuffle: bool = True,
        once: bool = False,
        begins: Sequence[Begin] | None = None,
        start: int = 0,
    ) -> None:
        assert sources
        assert begins is None or len(begins) == len(sources)
        assert weights is None or len(weights) == len(sources)
        self.vocabulary = vocabulary
        self.tokenizers = common_tokenizers({source.folder: source.tokenizers for source in sources})
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.once = once
        self.start = start
        self.sources = tuple(sources)
        self.begins = tuple(begins) if begins is not None else (START,) * len(sources)
        self._seed = seed
        self._balance = balance
        self._shuffle = shuffle
        self._streams = [
            PackedStream(
                source,
                position=position,
                seq_length=seq_length,
                seed=seed,
                window=pack_window,
                shuffle=shuffle,
                once=once,
                cache=cache or source.folder / ".cache",
                begin=self.begins[position],
            )
            for position, source in enumerate(sources)
        ]
        sizes = np.array([stream.first_epoch for stream in self._streams])
        # One pass: weights equal to the sizes use up all sources at the same moment.
        shares = np.array(sizes if once else weights or [1.0] * len(sources), float)
        self._weights = shares / shares.sum()
        self._sequences = int(sizes[shares > 0].sum())
        self._groups = max(1, min(deal_window, self._sequences) // micro_batch_size)  # micro-batches of a window
        self.window = self._groups * micro_batch_size
        self._windows: OrderedDict[int, _Window] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be made again, for worker processes that do not fork."""
        return {**self.__dict__, "_windows": OrderedDict()}

    def len_epoch(self) -> int:
        """Micro-batches of one pass over all sources: all that `once` gives, and about an epoch otherwise."""
        return -(-self._sequences // self.micro_batch_size)

    def counts(self, index: int) -> tuple[int, ...]:
        """Tokens per modality of a micro-batch, without reading tokens."""
        window, group = self._find(index)
        return tuple(window.counts[group].sum(axis=0).tolist())

    def sequence_counts(self, index: int) -> NDArray[np.int64]:
        """Tokens per modality of each sequence of a micro-batch, int64 [b, K], without reading tokens."""
        window, group = self._find(index)
        return window.counts[group]

    def label_counts(self, index: int) -> tuple[int, ...]:
        """Trained labels per modality of a micro-batch, without reading tokens."""
        window, group = self._find(index)
        return tuple(window.labels[group].tolist())

    def documents(self, index: int) -> list[tuple[int, NDArray[np.int64]]]:
        """Source and documents of each sequence of a micro-batch; source -1 for an empty sequence."""
        window, group = self._find(index)
        packing = window.packing
        return [
            (int(window.sources[n]), packing.documents[packing.starts[n] : packing.starts[n + 1]])
            for n in range(group * self.micro_batch_size, (group + 1) * self.micro_batch_size)
        ]

    def read(self, sequences: int) -> list[tuple[int, NDArray[np.int64]]]:
        """What the first sequences of this stream are, for each source.

        Args:
            sequences: how many, a multiple of `micro_batch_size`.

        Returns:
            How many sequences of the source's stream were read without a gap, and the numbers of others, ascending:
            a window is dealt in another order.
        """
        number, more = divmod(sequences, self.window)
        taken = blended(self._weights, count=number * self.window)
        if not more:
            return [(int(count), np.zeros(0, np.int64)) for count in taken]
        window, _ = self._find(number * self._groups)
        sources, places = window.sources[:more], window.places[:more]
        return [(int(count), np.sort(places[sources == source])) for source, count in enumerate(taken)]

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch with this number.

        Raises:
            DataError: the data is damaged.
        """
        rows = self.documents(index)
        shape = (len(rows), self.seq_length)
        tokens = np.full(shape, PAD, np.int64)
        labels = np.full(shape, PAD, np.int64)
        mask = np.zeros(shape, np.float32)
        positions = np.empty(shape, np.int64)
        document_ids = np.empty(shape, np.int32)
        modalities = np.full(shape, NO_MODALITY, np.int8)
        label_counts = np.zeros(len(self.vocabulary.names), np.int64)
        for row, (number, documents) in enumerate(rows):
            used = 0
            if len(documents):
                source = self._streams[number].source
                lengths = source.lengths[documents].astype(np.int64)
                ends = np.cumsum(lengths)
                used = int(ends[-1])
                of_token = np.repeat(np.arange(len(documents)), lengths)
                ids = source.read(documents)
                modality = self._checked_modality(ids, source, documents)
                following = np.roll(modality, -1)  # wrong at document ends, which the mask leaves out
                has_label = np.ones(used, bool)
                has_label[ends - 1] = False
                trained = has_label & source.trained[documents][of_token, following]
                tokens[row, :used] = ids
                labels[row, : used - 1] = ids[1:]
                labels[row, ends - 1] = PAD
                mask[row, :used] = trained
                positions[row, :used] = np.arange(used) - (ends - lengths)[of_token]
                document_ids[row, :used] = of_token
                modalities[row, :used] = modality
                label_counts += np.bincount(following[trained], minlength=len(label_counts))
            positions[row, used:] = np.arange(self.seq_length - used)
            document_ids[row, used:] = len(documents)
        assert tuple(label_counts.tolist()) == self.label_counts(index), "tables and tokens were just found to agree"
        return MicroBatch(
            tokens=tokens,
            labels=labels,
            loss_mask=mask,
            position_ids=positions,
            document_ids=document_ids,
            modality_ids=modalities,
            counts=self.counts(index),
            label_counts=self.label_counts(index),
            sources=np.array([number for number, _ in rows]),
            index=index + self.start // self.micro_batch_size,
        )

    def _checked_modality(
        self, ids: NDArray[np.int64], source: Source, documents: NDArray[np.int64]
    ) -> NDArray[np.int8]:
        """Modality of each token, after checking it against the table: capacities and loss weights rest on the table.

        Raises:
            DataError: tokens and table disagree.
        """
        lengths = source.lengths[documents].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        try:
            modality = self.vocabulary.modality_of(ids)
        except DataError as error:
            raise DataError(
                f"data: {source.folder}: {error.cause}",
                remedy="the files are damaged: copy the data set again, or prepare it again",
            ) from None
        one_hot = modality[:, None] == np.arange(len(self.vocabulary.names))
        found = np.add.reduceat(one_hot, starts, axis=0, dtype=np.int64)
        wrong = (found != source.counts[documents]).any(axis=1) | (modality[starts] != 0)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            document, start = int(documents[first]), int(modality[starts[first]])
            raise DataError(
                f"data: {source.where(document)} has {found[first].tolist()} tokens per modality, starting with one of "
                f"modality {start}; its table says {source.counts[document].tolist()}, starting with modality 0",
                remedy="the files are damaged: copy the data set again, or prepare it again",
            )
        return modality

    def _find(self, index: int) -> tuple[_Window, int]:
        """The window of a micro-batch, and the micro-batch's place in it."""
        number, group = divmod(index, self._groups)
        if number not in self._windows:
            window = self._deal(number)
            while len(self._windows) >= _WINDOWS_IN_MEMORY:
                self._windows.popitem(last=False)
            self._windows[number] = window
        return self._windows[number], group

    def _deal(self, number: int) -> _Window:
        """Take a window out of the blended stream and deal it into micro-batches."""
        size = self._groups * self.micro_batch_size
        start = number * size
        count = min(size, max(0, self._sequences - start)) if self.once else size
        of_source, place = blend(self._weights, start=start, count=count)
        modalities = len(self.vocabulary.names)
        counts = np.zeros((size, modalities), np.int64)
        labels = np.zeros((size, modalities), np.int64)
        sources = np.full(size, _NO_SOURCE, np.int64)
        sources[:count] = of_source
        parts: list[Packing] = []
        before = np.zeros(size, np.int64)  # place of each sequence among all parts
        taken = 0
        for position, stream in enumerate(self._streams):
            rows = np.flatnonzero(sources == position)
            if not len(rows):
                continue
            begin = 0
            for block, places in stream.stretch(int(place[rows[0]]), len(rows)):
                some = rows[begin : begin + len(places)]
                counts[some], labels[some] = block.counts[places], block.labels[places]
                before[some] = taken + np.arange(len(places))
                parts.append(block.packing.take(places))
                begin += len(places)
                taken += len(places)
        before[count:] = taken  # the empty sequence, for all of them
        packing = Packing.joined([*parts, EMPTY_SEQUENCE])

        groups = np.arange(size).reshape(self._groups, self.micro_batch_size)
        filled = -(-count // self.micro_batch_size)  # fewer than all at the end of `once` only
        if self._balance and filled:
            groups[:filled] = deal(counts[: filled * self.micro_batch_size], group=self.micro_batch_size)
        if self._shuffle:
            groups[:filled] = groups[
                permutation(filled, seed=self._seed, source=0, purpose=Purpose.GROUPS, number=number)
            ]
        order = groups.ravel()
        places = np.full(size, _NO_SOURCE, np.int64)
        places[:count] = place
        return _Window(
            sources=sources[order],
            places=places[order],
            packing=packing.take(before[order]),
            counts=counts[order].reshape(self._groups, -1, modalities),
            labels=labels[order].reshape(self._groups, -1, modalities).sum(axis=1),
        )


def open_mixture(config: Config, split: str, *, vocabulary: Vocabulary, folder: Path | None = None) -> Mixture:
    """The stream of a run: endless for the split "train", one pass for any other.

    Of a blend, any other split is that of the data sets that have one. With `folder` it is one pass over the split of
    that data set instead.

    The pass has a fixed shuffled order whatever the run's seed, so that an evaluation of a few batches sees a fair
    sample and runs with different seeds see the same one.

    Raises:
        ConfigError: no data set is named.
        DataError: a data set is missing, damaged, prepared with another vocabulary, or has too long documents.
    """
    train = split == "train" and folder is None
    data = config.data
    folders = [Path(entry.path) for entry in named_sources(config)] if folder is None else [folder]
    if not train and folder is None:
        folders = [one for one in folders if has_documents({one: read_manifest(one)}, split)] or folders
    return Mixture(
        [Source(one, split=split, vocabulary=vocabulary) for one in folders],
        vocabulary,
        seq_length=config.model.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed if train else 0,
        weights=[entry.weight for entry in data.sources] if train else None,
        balance=data.balance,
        pack_window=data.pack_window,
        deal_window=data.deal_window,
        cache=Path(data.cache) if data.cache is not None else None,
        once=not train,
    )


def nominal_share(config: Config) -> dict[str, float]:
    """Share of each modality in the training tokens, from which static expert capacities follow.

    A blend's weights count sequences, and packed sequences are nearly full, so they weigh the shares of the tokens.

    Raises:
        ConfigError: no data set is named.
        DataError: a data set is missing or damaged.
    """
    if config.model.experts.share != "auto":
        return dict(config.model.experts.share)
    entries = named_sources(config)
    total = sum(entry.weight for entry in entries)
    share = dict.fromkeys(config.vocab.names, 0.0)
    for entry in entries:
        folder = Path(entry.path)
        manifest = read_manifest(folder)
        check_vocabulary(folder, manifest, Vocabulary.from_config(config.vocab))
        parts_of(folder, manifest, "train")
        for name, part in manifest.share("train").items():
            share[name] += entry.weight / total * part
    return share


@dataclass(frozen=True)
class SlotUsage:
    """How a micro-batch fits static capacities, per modality [tokens]."""

    overflow: tuple[int, ...]  # tokens beyond the nominal count: no expert has a slot for them
    unused: tuple[int, ...]  # nominal slots that no token fills


def slot_usage(batch: MicroBatch, *, nominal: tuple[int, ...], scope: Literal["sequence", "micro_batch"]) -> SlotUsage:
    """Tokens over the nominal counts and slots left empty, on the host, for logging.

    Args:
        batch: the micro-batch.
        nominal: nominal tokens of each modality in one sequence (scope "sequence") or in the micro-batch.
        scope: among which tokens experts choose, as in model.experts.scope.
    """
    rows = batch.modality_ids if scope == "sequence" else batch.modality_ids.reshape(1, -1)
    found = (rows[:, :, None] == np.arange(len(nominal))).sum(axis=1)
    over = found - np.array(nominal)
    return SlotUsage(
        overflow=tuple(np.maximum(over, 0).sum(axis=0).tolist()),
        unused=tuple(np.maximum(-over, 0).sum(axis=0).tolist()),
    )
