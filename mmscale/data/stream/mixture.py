"""Micro-batches by number: blended, packed, dealt to nearly equal modality shares. A pure function of the number.

All of its state can be recomputed. loader.py decides which rank reads which number, and when.

b sequences of a micro-batch, s tokens of a sequence, K modalities.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.config.derived import data_seed, first_weights
from mmscale.data.prepared.manifest import common_tokenizers, has_documents, named_sources, read_manifest
from mmscale.data.stream.blend_phases import BlendPhases, Phases, later_phases
from mmscale.data.stream.cache_files import fallback_cache
from mmscale.data.stream.causal_masking import Masking, masking_of
from mmscale.data.stream.composites import open_source
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.orders import open_stream
from mmscale.data.stream.packing import padded_lengths
from mmscale.data.stream.sequences import START, PackSettings, StreamStart
from mmscale.data.stream.source import Source
from mmscale.data.stream.windows import Dealing, Window, deal_window
from mmscale.data.vocab import NO_MODALITY, PAD, Vocabulary
from mmscale.errors import DataError

_WINDOWS_IN_MEMORY = 2


class Mixture:
    """A stream of micro-batches that never ends, or one pass over the sources.

    For each source and epoch, whole documents are shuffled and packed into sequences. The sequences of all sources are
    blended into one stream, of which windows are dealt into micro-batches of nearly equal modality shares ("pack, then
    deal"). Sources are blended before dealing, not micro-batch by micro-batch: text-only and image-rich sources then
    share micro-batches, which keeps static expert capacity full. A window is never longer than an epoch of the sources,
    and may cross its end, so no document is left over there.

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
        document_multiple: documents are padded to a multiple of this, which divides seq_length.
        masking: causal masking of the documents; default: none.
        order: of each source's documents, a name in `DATA_ORDERS`.
        cache: folder of packing indices; default: .cache inside each source's folder.
        spare: folder for the indices of large sources if they cannot be written there.
        shuffle: False keeps the stored order of documents and, with balance off, of sequences.
        once: one pass instead of an endless stream.
        begins: position in each source after reading it under other settings; default: the beginning.
        phases: sequences of this stream at which the weights change, with the new weights; see `BlendPhases`.
        start: sequences that were consumed before this stream, over all sources; its micro-batch 0 follows them.
        max_epochs: of each source, passes after which it is not read any more, those before `begins` included; None:
            no limit; default: none for all. Ignored with `once`.

    Attributes:
        tokenizers: fingerprints of those that made the ids of all sources.
        sources, begins, start, order, max_epochs: as they were given.
        streams: sequences of each source.

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
        document_multiple: int = 1,
        masking: Masking | None = None,
        order: str = "epochs",
        cache: Path | None = None,
        spare: Path | None = None,
        shuffle: bool = True,
        once: bool = False,
        begins: Sequence[StreamStart] | None = None,
        phases: Phases = (),
        start: int = 0,
        max_epochs: Sequence[int | None] | None = None,
    ) -> None:
        options = {name: given for name, given in locals().items() if name not in ("self", "sources", "vocabulary")}
        self._options: dict[str, Any] = options
        assert sources
        assert begins is None or len(begins) == len(sources)
        assert weights is None or len(weights) == len(sources)
        self.vocabulary = vocabulary
        self.tokenizers = common_tokenizers(
            {source.folder: source.tokenizers for source in sources},
            like=max(sources, key=lambda one: len(one.tokenizers)).folder,
        )
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.document_multiple = document_multiple
        self.once = once
        self.start = start
        self.order = order
        self.sources = tuple(sources)
        self.max_epochs = tuple(max_epochs) if max_epochs is not None else (None,) * len(sources)
        self.begins = tuple(begins) if begins is not None else (START,) * len(sources)
        self._seed = seed
        self._balance = balance
        self._shuffle = shuffle
        self.streams = [
            open_stream(
                source,
                PackSettings(
                    position=position,
                    seq_length=seq_length,
                    seed=seed,
                    window=pack_window,
                    shuffle=shuffle,
                    once=once,
                    multiple=document_multiple,
                    masking=masking,
                ),
                order=order,
                caches=(cache or source.folder / ".cache", *([spare] if spare else [])),
                begin=self.begins[position],
            )
            for position, source in enumerate(sources)
        ]
        self._given_weights, self._phases, self._deal_window = weights, tuple(phases), deal_window
        self._windows: OrderedDict[int, Window] = OrderedDict()

    def like(self, sources: Sequence[Source] | None = None, **changes: Any) -> Mixture:
        """A stream with the same arguments except for the given ones."""
        return Mixture(self.sources if sources is None else sources, self.vocabulary, **{**self._options, **changes})

    def __getstate__(self) -> dict[str, Any]:
        """The state without recomputable parts, for worker processes that do not fork."""
        return {**self.__dict__, "_windows": OrderedDict()}

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """Sequences of the first whole epoch of each source; for a pass over a large one all blocks are counted."""
        return np.array([stream.first_epoch for stream in self.streams])

    @cached_property
    def _shares(self) -> NDArray[np.float64]:
        """Share of each source in the sequences, not yet normalised."""
        # One pass: with weights equal to the sizes all sources end at the same time.
        return np.array(self._sizes if self.once else self._given_weights or [1.0] * len(self.sources), float)

    @cached_property
    def _blend(self) -> BlendPhases:
        if self.once:
            return BlendPhases([(0, self._shares.tolist())])
        limits = [
            None if passes is None else partial(stream.sequences_of, passes)
            for stream, passes in zip(self.streams, self.max_epochs, strict=True)
        ]
        return BlendPhases([(0, self._shares.tolist()), *self._phases], limits)

    @cached_property
    def _sequences(self) -> int:
        return int(self._sizes[self._blend.read].sum())

    @cached_property
    def _groups(self) -> int:
        """Micro-batches of a window."""
        return max(1, min(self._deal_window, self._sequences) // self.micro_batch_size)

    @property
    def _dealing(self) -> Dealing:
        return Dealing(
            groups=self._groups,
            micro_batch_size=self.micro_batch_size,
            modalities=len(self.vocabulary.names),
            balance=self._balance,
            shuffle=self._shuffle,
            seed=self._seed,
        )

    @property
    def window(self) -> int:
        """Sequences that are dealt together: micro-batches of a window, times their sequences."""
        return self._groups * self.micro_batch_size

    def len_epoch(self) -> int:
        """Micro-batches of one pass over all sources: the exact number with `once`, otherwise approximate."""
        return -(-self._sequences // self.micro_batch_size)

    def passes(self, sequences: int) -> list[float]:
        """How many times each source is read in this many sequences, counted from the start of training."""
        counts = self._blend.counts(sequences)
        return [int(count) / int(size) if size else 0.0 for count, size in zip(counts, self._sizes, strict=True)]

    def end(self, within: int) -> int | None:
        """Sequences of this stream, in whole micro-batches, if they are at most `within`; None: there are more.

        Only a stream whose sources all have `max_epochs` ends. To find the end can mean to pack all that it reads.
        """
        end = self._blend.end(within)
        return None if end is None else end // self.micro_batch_size * self.micro_batch_size

    def limits(self, within: int) -> list[int | None]:
        """Sequences of each source's stream, if its `max_epochs` ends it in this many sequences; None: it does not."""
        self._blend.end(within)
        return [self._blend.spent.get(source) for source in range(len(self.sources))]

    def described_limits(self) -> str:
        """Sources that have `max_epochs`, for messages."""
        pairs = zip(self.sources, self.max_epochs, strict=True)
        return ", ".join(f"{source.folder}: {passes}" for source, passes in pairs if passes)

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
        return [(source, documents) for source, documents, _ in self._rows(index)]

    def _rows(self, index: int) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """The same with the epoch of each document."""
        window, group = self._find(index)
        packing = window.packing
        epochs = np.zeros_like(packing.documents) if packing.epochs is None else packing.epochs
        found = []
        for n in range(group * self.micro_batch_size, (group + 1) * self.micro_batch_size):
            own = slice(packing.starts[n], packing.starts[n + 1])
            found.append((int(window.sources[n]), packing.documents[own], epochs[own]))
        return found

    def read(self, sequences: int) -> list[tuple[int, NDArray[np.int64]]]:
        """Which sequences of each source are among the first sequences of this stream.

        Args:
            sequences: how many, a multiple of `micro_batch_size`.

        Returns:
            How many sequences of the source's stream were read without a gap, and the numbers of further ones,
            ascending. There may be gaps, because dealing changes the order inside a window.
        """
        number, more = divmod(sequences, self.window)
        taken = self._blend.counts(number * self.window)
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
        rows = self._rows(index)
        shape = (len(rows), self.seq_length)
        tokens = np.full(shape, PAD, np.int64)
        labels = np.full(shape, PAD, np.int64)
        mask = np.zeros(shape, np.float32)
        positions = np.empty(shape, np.int64)
        document_ids = np.empty(shape, np.int32)
        modalities = np.full(shape, NO_MODALITY, np.int8)
        label_counts = np.zeros(len(self.vocabulary.names), np.int64)
        for row, (number, documents, epochs) in enumerate(rows):
            used = 0
            if len(documents):
                read = self.streams[number].reader.read(documents, epochs, vocabulary=self.vocabulary)
                ids, modality, lengths = read.ids, read.modality, read.lengths
                ends = np.cumsum(lengths)
                of_token = np.repeat(np.arange(len(documents)), lengths)
                following = np.roll(modality, -1)
                # The first token of a document is never trained on, so the last one has no label.
                trained = np.roll(read.trained, -1)
                # The padding of a document up to the multiple belongs to the document.
                padded = padded_lengths(lengths, self.document_multiple)
                used = int(padded.sum())
                of_place = np.repeat(np.arange(len(documents)), padded)
                first = np.cumsum(padded) - padded
                positions[row, :used] = np.arange(used) - first[of_place]
                document_ids[row, :used] = of_place
                place = np.arange(len(ids)) + (first - (ends - lengths))[of_token]
                tokens[row, place] = ids
                labels[row, place[:-1]] = ids[1:]
                labels[row, place[ends - 1]] = PAD
                mask[row, place] = trained
                modalities[row, place] = modality
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
            sources=np.array([number for number, _, _ in rows]),
            index=index + self.start // self.micro_batch_size,
        )

    def _find(self, index: int) -> tuple[Window, int]:
        """The window of a micro-batch, and the micro-batch's place in it."""
        number, group = divmod(index, self._groups)
        if number not in self._windows:
            window = self._deal(number)
            while len(self._windows) >= _WINDOWS_IN_MEMORY:
                self._windows.popitem(last=False)
            self._windows[number] = window
        if not self.once and group >= self._windows[number].filled:
            raise DataError(
                f"data: all sources have been read as often as max_epochs allows ({self.described_limits()})",
                remedy="raise max_epochs of a source in data.blend, or lower train.steps",
            )
        return self._windows[number], group

    def _deal(self, number: int) -> Window:
        """Take a window out of the blended stream and deal it into micro-batches."""
        start, count = number * self.window, self.window
        if self.once:
            count = min(count, max(0, self._sequences - start))
        else:
            end = self.end(start + count)  # that of limits; no micro-batch is partly empty there
            count = count if end is None else max(0, end - start)
        of_source, place = self._blend.stretch(start, count)
        return deal_window(number, self._dealing, streams=self.streams, of_source=of_source, place=place)


def open_mixture(config: Config, split: str, *, vocabulary: Vocabulary, folder: Path | None = None) -> Mixture:
    """The stream of a run: endless for the split "train", one pass for any other.

    In a blend, a pass over another split covers the data sets that have it. With `folder` it covers that data set only.

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
        [open_source(config, one, split, vocabulary=vocabulary, weighted=train) for one in folders],
        vocabulary,
        seq_length=config.model.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        seed=data_seed(config) if train else 0,
        weights=first_weights(config) if train else None,
        phases=later_phases(config) if train else (),
        max_epochs=[entry.max_epochs for entry in named_sources(config)] if train else None,
        balance=data.balance,
        pack_window=data.pack_window,
        deal_window=data.deal_window,
        document_multiple=data.document_multiple,
        masking=masking_of(config) if train else None,
        order=data.order,
        cache=Path(data.cache) if data.cache is not None else None,
        spare=fallback_cache(config),
        once=not train,
    )
