"""`CompactAdam`: moments are stored in bf16 or FP8 and expanded to fp32 only while a chunk is updated.

AdamW whose moments take 2.19 (FP8) or 4 (bf16) bytes per parameter instead of 8. Plain torch, on any device.
Transformer-Engine's own version is used through megatron-core's precision-aware optimizer (optimizer.py).

Parameters are updated in chunks, so that only one chunk's moments exist in fp32. Vectors (norms, biases) keep fp32
moments, because they are few and sensitive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmscale.tables.settings import MOMENTS as MOMENT_FORMATS
from mmscale.train.optim.adam import HostFusedAdam
from mmscale.train.optim.adam_moments import GROUP, TRIPLE, from_groups, group_count, pack, to_groups, unpack

MOMENTS = ("exp_avg", "exp_avg_sq")
# Elements of a chunk. The data of 2^16 elements fit into a host's cache; a device needs larger chunks.
_PIECE_HOST, _PIECE_DEVICE = 1 << 16, 1 << 24


def triples_of(moment: str) -> str:
    """Name of the state that holds the scales of a moment in FP8."""
    return f"{moment}_scale"


@dataclass(frozen=True)
class ShardPlace:
    """The place of a rank's shard in its parameter.

    Attributes:
        lead: elements between the start of a group of FP8 moments and the shard's first element.
        format: of its moments, a compact one of `optim.moments`; None: fp32.
        moments: those that are kept.
    """

    lead: int = 0
    format: str | None = None
    moments: tuple[str, ...] = MOMENTS

    @property
    def in_groups(self) -> bool:
        """Whether neighbouring elements share a scale."""
        return self.format is not None and MOMENT_FORMATS[self.format].in_groups

    @classmethod
    def at(cls, start: int, stored: str | None) -> ShardPlace:
        """The place of a shard that begins with this element of its parameter."""
        return cls(start % GROUP, stored)


class CompactAdam(HostFusedAdam):
    """AdamW with compact moments; arithmetic of HostFusedAdam, in fp32.

    Args:
        params: Parameters or parameter groups.
        moments: bf16, rounded to nearest; fp8_coat, see adam_moments.py; or fp32, which subclasses may use.
        options: As HostFusedAdam's.

    Attributes:
        places: known places of shards; the moments of matrices without an entry are compact.
    """

    def __init__(self, params: Iterable[Any], *, moments: str, **options: Any) -> None:
        super().__init__(params, **options)
        self.moments = moments
        self.places: dict[Tensor, ShardPlace] = {}

    def place(self, param: Tensor) -> ShardPlace:
        """How the moments of a parameter, or of a shard of one, are stored."""
        default = ShardPlace(format=self.compact if param.ndim >= 2 else None)
        return self.places.get(param, default)

    @property
    def compact(self) -> str | None:
        """The format of compact moments; None: all are fp32."""
        return self.moments if MOMENT_FORMATS[self.moments].compact else None

    def layout(self, param: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every state tensor of a parameter."""
        place, numel = self.place(param), param.numel()
        if place.in_groups:
            kept: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
            for moment in place.moments:
                kept[moment] = (torch.uint8, (numel,))
                kept[triples_of(moment)] = (torch.float32, (group_count(numel, place.lead), TRIPLE))
            return kept
        dtype = torch.float32 if place.format is None else torch.bfloat16
        return {moment: (dtype, tuple(param.shape)) for moment in place.moments}

    def initialize(self) -> None:
        """Create moments of zero for every parameter that has none yet."""
        for group in self.param_groups:
            for param in group["params"]:
                self._state(param)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if len(state) == 0:
            for name, (dtype, shape) in self.layout(param).items():
                # The scale, exponent and middle of a group of zeros may have any value except zero and infinity.
                make = torch.ones if name in map(triples_of, MOMENTS) else torch.zeros
                state[name] = make(shape, dtype=dtype, device=param.device)
        return state

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        whole = [param for param in params if self.place(param).format is None]
        if whole:
            super()._update(group, whole)
        for param in params:
            place = self.place(param)
            if place.format is not None:
                self._update_in_pieces(group, param, place)

    def _update_in_pieces(self, group: dict[str, Any], param: Tensor, place: ShardPlace) -> None:
        assert param.grad is not None
        state = self._state(param)
        values, grads, numel = param.view(-1), param.grad.reshape(-1), param.numel()
        most = _PIECE_HOST if param.is_cpu else _PIECE_DEVICE
        begin = 0
        while begin < numel:
            end = min(numel, begin + most - (place.lead + begin) % GROUP)  # the chunk ends at the end of a group
            moments = {name: read(state, name, place, begin, end) for name in MOMENTS}
            piece = values[begin:end], grads[begin:end]
            self.update(group, [piece[0]], [piece[1]], [moments["exp_avg"]], [moments["exp_avg_sq"]])
            for name, value in moments.items():
                write(state, name, place, begin, value)
            begin = end

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """As torch's, but dtypes are kept: torch would convert every state to the dtype of its parameter."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            if number in state_dict["state"]:
                found = state_dict["state"][number]
                self.state[param] = {name: value.to(device=param.device) for name, value in found.items()}


def read(state: Mapping[str, Tensor], moment: str, place: ShardPlace, begin: int, end: int) -> Tensor:
    """Elements [begin, end) of a shard's moment in fp32: a copy.

    Args:
        state: the optimizer's state of the shard.
        moment: one of `MOMENTS`.
        place: of the shard.
        begin: for FP8 moments, the first element of the shard or of a group.
        end: one past the last element.
    """
    stored = state[moment].view(-1)[begin:end]
    if not place.in_groups:
        return stored.to(torch.float32, copy=True)
    lead = (place.lead + begin) % GROUP
    first = (place.lead + begin) // GROUP
    triples = state[triples_of(moment)][first : first + group_count(end - begin, lead)]
    return from_groups(unpack(to_groups(stored, lead), triples), lead, end - begin)


def write(state: Mapping[str, Tensor], moment: str, place: ShardPlace, begin: int, values: Tensor) -> None:
    """Store fp32 values in a shard's moment; the counterpart of `read`.

    Args:
        state: the optimizer's state of the shard.
        moment: one of `MOMENTS`.
        place: of the shard.
        begin: first element; for FP8 moments, of the shard or of a group.
        values: fp32 [n].
    """
    stored = state[moment].view(-1)[begin : begin + values.numel()]
    if not place.in_groups:
        stored.copy_(values)
        return
    lead = (place.lead + begin) % GROUP
    first = (place.lead + begin) // GROUP
    packed = pack(to_groups(values, lead), keep_positive=moment == "exp_avg_sq")
    stored.copy_(from_groups(packed.codes, lead, values.numel()))
    state[triples_of(moment)][first : first + packed.triples.shape[0]] = packed.triples
