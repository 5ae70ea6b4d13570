"""Per-token data of a micro-batch besides hidden states: modality, position and document of every token.

The data are passed in megatron-core's `packed_seq_params`, the only argument that reaches every layer with several
micro-batches in flight: by closure under recompute, by keyword otherwise (transformer_block.py, _checkpointed_forward).
Storing them on modules instead would be silently wrong: the recompute in backward would read the ids of the last
micro-batch.

Shapes: S tokens of a sequence, B sequences of the micro-batch, K tokens that a Mixture-of-Depths layer selected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from mmscale.model.capacity import TokenCounts
from mmscale.model.context import ContextSplit
from mmscale.model.ragged import Pieces, begins_of, ends_of, padded_sequences, pieces_of
from mmscale.model.step_sums import Loads
from mmscale.tables.routings import Routing

T = TypeVar("T")

if TYPE_CHECKING:
    from mmscale.model.auxiliary import RouterLearning
    from mmscale.model.choices import Choices
    from mmscale.model.thresholds import Cutoffs


class MicroBatchSum:
    """The sum of a tensor over a step's micro-batches, in the memory of two of them.

    Layers see micro-batches in the order of their numbers. What is reported again of the newest one replaces the
    former; an earlier one can only be repeated, by recompute, and is not added twice.
    """

    def __init__(self, micro_batch: int, value: Tensor) -> None:
        self._before: Tensor | None = None  # of all micro-batches but the newest one
        self._newest, self._value = micro_batch, value

    def put(self, micro_batch: int, value: Tensor) -> None:
        """Add the tensor of a micro-batch, of the same shape each time."""
        if micro_batch < self._newest:
            return
        if micro_batch > self._newest:
            self._before, self._newest = self.total, micro_batch
        self._value = value

    @property
    def total(self) -> Tensor:
        """Sum over all micro-batches so far."""
        return self._value if self._before is None else self._before + self._value


class RoutingStats:
    """Collects detached routing metrics of a step's micro-batches, by (layer, name).

    What is reported again of the same micro-batch counts once: recompute repeats it, and a Mixture-of-Depths layer
    reports the norms of all tokens after the layer inside it has reported those of its own.

    Args:
        modalities: number of modalities that the counts of every layer are split by; 0: no counts are collected.
    """

    def __init__(self, *, modalities: int = 0) -> None:
        self.modalities = modalities
        self._figures: dict[tuple[int, str], MicroBatchSum] = {}
        self._counts: dict[tuple[int, str], MicroBatchSum] = {}

    def clear(self) -> None:
        """Forget everything; called before a step's micro-batches are computed, the first time or again."""
        self._figures.clear()
        self._counts.clear()

    def add(self, layer: int, name: str, value: Tensor, *, micro_batch: int, weight: Tensor | None = None) -> None:
        """Add a scalar tensor. Does not synchronise with the host.

        Args:
            layer: number of the layer, from 1.
            name: of the metric.
            value: of this micro-batch.
            micro_batch: its number, which is larger for every later micro-batch of the step.
            weight: a scalar, such as the number of tokens that `value` is a mean of; 0 where there are none. None: 1.
        """
        value = value.detach().double()
        weight = torch.ones_like(value) if weight is None else weight.detach().double()
        _put(self._figures, (layer, name), micro_batch, torch.stack((value * weight, weight)))

    def count(self, layer: int, name: str, value: Tensor, *, micro_batch: int) -> None:
        """Add a tensor of sums, which may be added up over ranks that hold other tokens. Arguments as for `add`."""
        _put(self._counts, (layer, name), micro_batch, value.detach().double())

    @property
    def counts(self) -> dict[tuple[int, str], Tensor]:
        """Sums over micro-batches and tokens."""
        return {key: found.total for key, found in self._counts.items()}

    def read(self) -> dict[tuple[int, str], tuple[float, float]]:
        """The sum of value times weight and that of weights, over micro-batches; waits for the device once.

        Ranks with other tokens may add theirs. A metric with a weight of 0 was not measured.
        """
        if not self._figures:
            return {}
        pairs = torch.stack([found.total for found in self._figures.values()]).tolist()
        return {key: (weighted, weight) for key, (weighted, weight) in zip(self._figures, pairs, strict=True)}


def _put(sums: dict[tuple[int, str], MicroBatchSum], key: tuple[int, str], micro_batch: int, value: Tensor) -> None:
    if key in sums:
        sums[key].put(micro_batch, value)
    else:
        sums[key] = MicroBatchSum(micro_batch, value)


def means_over_layers(ranks: Iterable[Mapping[tuple[int, str], tuple[float, float]]]) -> dict[str, float]:
    """Mean over layers of each metric, by its name; a layer in which no rank has measured it does not count.

    Args:
        ranks: `RoutingStats.read` of each. Tensor-parallel ranks have the same tokens, which changes no mean.
    """
    sums: dict[tuple[int, str], tuple[float, float]] = {}
    for figures in ranks:
        for key, (weighted, weight) in figures.items():
            before = sums.get(key, (0.0, 0.0))
            sums[key] = before[0] + weighted, before[1] + weight
    found: dict[str, list[float]] = {}
    for (_, name), (weighted, weight) in sorted(sums.items()):
        if weight > 0:
            found.setdefault(name, []).append(weighted / weight)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


@dataclass
class MixedModalParams(PackedSeqParams):
    """Per-token data of a micro-batch, for the full sequence on every tensor- and context-parallel rank.

    Attributes:
        modality_ids: [S, B] int8, index of the token's modality, -1 for padding, which is not routed.
        position_ids: [S, B] int64, restarting at every document.
        document_ids: [S, B] int32; a token attends to earlier tokens of its own document only. A document's tokens are
            contiguous, and neighbouring documents have different numbers.
        noise_key: number of the micro-batch, the same under every layout; it seeds router noise together with the seed.
        stats: collects routing metrics; None on steps that are not logged.
        routing: mode by which experts are assigned to tokens.
        learning: receives the true choices, for auxiliary routers; None: no router learns.
        cutoffs: receives cut-offs, for moving averages; None: none are kept.
        loads: receives the tokens of every expert, for the biases of token choice; None: biases stay.
        choices: records choices, or repeats recorded ones; None in normal training.
        documents: upper bound of the number of documents, known on the host; None: it is read from the device when
            needed. Kernels are called with a rounded number, see `padded_sequences`.
        counts: tokens of each modality, known on the host; None: unknown, so that capacities cannot depend on them.
        context: which tokens this context-parallel rank computes; None: all of them.
    """

    modality_ids: Tensor = None  # type: ignore[assignment]  # the base class has defaults
    position_ids: Tensor = None  # type: ignore[assignment]
    document_ids: Tensor = None  # type: ignore[assignment]
    noise_key: int = 0
    stats: RoutingStats | None = None
    routing: Routing = Routing.BATCH
    learning: RouterLearning | None = None
    cutoffs: Cutoffs | None = None
    loads: Loads | None = None
    choices: Choices | None = None
    documents: int | None = None
    counts: TokenCounts | None = None
    context: ContextSplit | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    _lengths: list[int] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        *,
        modality_ids: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        noise_key: int = 0,
        stats: RoutingStats | None = None,
        routing: Routing = Routing.BATCH,
        documents: int | None = None,
        counts: TokenCounts | None = None,
        context: ContextSplit | None = None,
    ) -> MixedModalParams:
        """Make an instance from the loader's [B, S] tensors."""
        length = modality_ids.shape[1]
        # max_seqlen_* must be set: get_rotary_seq_len takes their maximum (rotary_pos_embedding.py) and fails on None.
        return cls(
            qkv_format="sbhd",
            max_seqlen_q=length,
            max_seqlen_kv=length,
            modality_ids=modality_ids.t().contiguous(),
            position_ids=position_ids.t().contiguous(),
            document_ids=document_ids.t().contiguous(),
            noise_key=noise_key,
            stats=stats,
            routing=routing,
            documents=documents,
            counts=counts,
            context=context,
        )

    def local(self, tensor: Tensor) -> Tensor:
        """This context-parallel rank's rows of a tensor of all tokens: [S, B, ...] -> [S / CP, B, ...]."""
        return tensor if self.context is None else self.context.local(tensor)

    def gather(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """[S / CP, B, ...] of all context-parallel ranks -> [S, B, ...] in the sequence's order; see `ContextSplit`."""
        if self.context is None:
            assert group.size() == 1, "the batch was not split over context-parallel ranks"
            return tensor
        return self.context.gather(tensor, group)

    def scatter_sum(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """Partial [S, B, ...] of all context-parallel ranks -> [S / CP, B, ...], this rank's rows of their sum."""
        return tensor if self.context is None else self.context.scatter_sum(tensor, group)

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """A value that all layers of the micro-batch need; `make` is called once."""
        if key not in self._cache:
            with torch.no_grad():
                self._cache[key] = make()
        found: T = self._cache[key]
        return found

    def forget(self) -> None:
        """Free what `cached` keeps; it is made again when it is needed."""
        self._cache.clear()

    def tokens_of(self, modalities: tuple[int, ...]) -> Tensor:
        """[S, B] bool: the token belongs to one of these modalities."""

        def make() -> Tensor:
            mask = self.modality_ids == modalities[0]
            for modality in modalities[1:]:
                mask = mask | (self.modality_ids == modality)
            return mask

        return self.cached(("tokens_of", modalities), make)

    def attention_bias(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, S / CP, S] additive mask: 0 where a query (row) may attend to a key (column), -inf elsewhere.

        Made once for all layers of a micro-batch. Every token may attend to itself, so no row is all -inf.
        """

        def make() -> Tensor:
            documents = self.document_ids.t()
            places = torch.arange(documents.shape[1], device=documents.device)
            same = self.local(self.document_ids).t().unsqueeze(2) == documents.unsqueeze(1)
            own = places.unsqueeze(0) if self.context is None else self.context.own.t()
            causal = own.unsqueeze(2) >= places
            bias = torch.zeros(same.shape, dtype=dtype, device=documents.device)
            return bias.masked_fill_(~(same & causal), float("-inf")).unsqueeze(1)

        return self.cached(("attention_bias", dtype), make)

    def document_lengths(self) -> list[int]:
        """Lengths of the documents, one sequence after another. Reads from the device."""
        if self._lengths is None:
            first = begins_of(self.document_ids.t()).reshape(-1).nonzero().squeeze(1)
            ends = torch.cat((first[1:], first.new_tensor([self.document_ids.numel()])))
            self._lengths = (ends - first).tolist()
        return self._lengths

    def document_ends(self) -> Tensor:
        """[documents + 1] int32: 0, then the end of every document, one sequence after another.

        These are the `cu_seqlens` of kernels for ragged sequences. If `documents` is set, nothing is read from the
        device and the array has `padded_sequences` + 1 entries: empty documents follow the last one.
        """

        def make() -> Tensor:
            bound = len(self.document_lengths()) if self.documents is None else padded_sequences(self.documents)
            return ends_of(begins_of(self.document_ids.t()), bound)

        return self.cached("document_ends", make)

    def pieces(self) -> Pieces:
        """This context-parallel rank's queries and their keys as ragged sequences."""

        def make() -> Pieces:
            assert self.context is not None, "without context parallelism there are documents, not pieces of them"
            documents = len(self.document_lengths()) if self.documents is None else self.documents
            return pieces_of(self.document_ids, self.context, bound=padded_sequences(2 * documents))

        return self.cached("pieces", make)

    def rotary(self, table: Tensor) -> Tensor:
        """Angles of this rank's tokens, [S / CP, B, 1, D], from megatron-core's table [max position, 1, 1, D]."""
        return self.cached("rotary", lambda: table[:, 0, 0, :][self.local(self.position_ids)].unsqueeze(2))

    def select(
        self, index: Tensor, valid: Tensor | None = None, *, quotas: tuple[int, ...] | None = None
    ) -> MixedModalParams:
        """The same data for the tokens at index [K, B] (ascending along K, so order and causality are kept).

        Args:
            index: [K, B].
            valid: [K, B] bool, true for a prefix of each sequence; the rest becomes padding. None: all are valid.
            quotas: tokens of each modality that were selected first, if there were quotas.
        """
        length = index.shape[0]
        modality_ids, document_ids = self.modality_ids.gather(0, index), self.document_ids.gather(0, index)
        if valid is not None:
            modality_ids = modality_ids.masked_fill(~valid, -1)
            document_ids = document_ids.masked_fill(~valid, torch.iinfo(document_ids.dtype).max)
        return MixedModalParams(
            qkv_format=self.qkv_format,
            max_seqlen_q=length,
            max_seqlen_kv=length,
            modality_ids=modality_ids,
            position_ids=self.position_ids.gather(0, index),
            document_ids=document_ids,
            noise_key=self.noise_key,
            stats=self.stats,
            routing=self.routing,
            learning=self.learning,
            cutoffs=self.cutoffs,
            loads=self.loads,
            choices=self.choices,
            counts=None if self.counts is None else self.counts.kept(length, quotas),
            # The padding at the end of a sequence counts as another document.
            documents=None if self.documents is None else self.documents + (0 if valid is None else index.shape[1]),
            context=None if self.context is None else self.context.dealt(length),
        )
