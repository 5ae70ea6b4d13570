# AdamW whose moments take 2.19 (FP8) or 4 (bf16) bytes per parameter instead of 8. Plain torch, on any device.
# Not Transformer-Engine's: that one is reached through megatron-core's precision-aware optimizer (optim.py).
"""`CompactAdam`: moments are stored small, and are fp32 for the moment in which they are used.

Parameters are updated in pieces, so that never more than a piece's moments exist in fp32. Vectors (norms, biases) keep
fp32 moments: they are few and sensitive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmscale.train.adam import HostFusedAdam
from mmscale.train.adam_moments import GROUP, TRIPLE, from_groups, group_count, pack, to_groups, unpack

MOMENTS = ("exp_avg", "exp_avg_sq")
# Elements whose moments are in fp32 at once. A host's cache holds what belongs to 2^16 of them; a device wants more.
_PIECE_HOST, _PIECE_DEVICE = 1 << 16, 1 << 24
Format = Literal["bf16", "fp8_coat"]


def triples_of(moment: str) -> str:
    """Name of the state that holds the scales of a moment in FP8."""
    return f"{moment}_scale"


@dataclass(frozen=True)
class Place:
    """Where a rank's shard stands in its parameter.

    Attributes:
        lead: elements between the border of a group and the shard's first element.
        format: of its moments; None: fp32.
    """

    lead: int = 0
    format: Format | None = None

    @classmethod
    def at(cls, start: int, stored: Format | None) -> Place:
        """The place of a shard that begins with this element of its parameter."""
        return cls(start % GROUP, stored)


class CompactAdam(HostFusedAdam):
    """AdamW with small moments; arithmetic of HostFusedAdam, in fp32.

    Args:
        params: Parameters or parameter groups.
        moments: bf16, rounded to nearest; fp8_coat: adam_moments.py.
        options: As HostFusedAdam's.

    Attributes:
        places: what is known of shards; of a parameter that is not named here, matrices are stored small.
    """

    def __init__(self, params: Iterable[Any], *, moments: Format, **options: Any) -> None:
        super().__init__(params, **options)
        self.moments: Format = moments
        self.places: dict[Tensor, Place] = {}

    def place(self, param: Tensor) -> Place:
        """How the moments of a parameter, or of a shard of one, are stored."""
        default = Place(format=self.moments if param.ndim >= 2 else None)
        return self.places.get(param, default)

    def layout(self, param: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of everything that is kept for a parameter."""
        place, numel = self.place(param), param.numel()
        if place.format == "fp8_coat":
            kept: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
            for moment in MOMENTS:
                kept[moment] = (torch.uint8, (numel,))
                kept[triples_of(moment)] = (torch.float32, (group_count(numel, place.lead), TRIPLE))
            return kept
        dtype = torch.float32 if place.format is None else torch.bfloat16
        return {moment: (dtype, tuple(param.shape)) for moment in MOMENTS}

    def initialize(self) -> None:
        """Moments of zero for every parameter that has none yet."""
        for group in self.param_groups:
            for param in group["params"]:
                self._state(param)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if len(state) == 0:
            for name, (dtype, shape) in self.layout(param).items():
                # The triple of a group of zeros may be anything but zero and infinite.
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

    def _update_in_pieces(self, group: dict[str, Any], param: Tensor, place: Place) -> None:
        assert param.grad is not None
        state = self._state(param)
        values, grads, numel = param.view(-1), param.grad.reshape(-1), param.numel()
        most = _PIECE_HOST if param.is_cpu else _PIECE_DEVICE
        begin = 0
        while begin < numel:
            end = min(numel, begin + most - (place.lead + begin) % GROUP)  # ends with a group
            moments = {name: read(state, name, place, begin, end) for name in MOMENTS}
            piece = values[begin:end], grads[begin:end]
            self._apply(group, [piece[0]], [piece[1]], [moments["exp_avg"]], [moments["exp_avg_sq"]])
            for name, value in moments.items():
                write(state, name, place, begin, value)
            begin = end

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """As torch's, but types stay: torch would make every state as wide as its parameter."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            if number in state_dict["state"]:
                found = state_dict["state"][number]
                self.state[param] = {name: value.to(device=param.device) for name, value in found.items()}


def read(state: Mapping[str, Tensor], moment: str, place: Place, begin: int, end: int) -> Tensor:
    """Elements [begin, end) of a shard's moment in fp32: a copy.

    Args:
        state: what the optimizer keeps of the shard.
        moment: one of `MOMENTS`.
        place: of the shard.
        begin: if it is FP8, the shard's first element or a group's.
        end: one behind the last element.
    """
    stored = state[moment].view(-1)[begin:end]
    if place.format != "fp8_coat":
        return stored.to(torch.float32, copy=True)
    lead = (place.lead + begin) % GROUP
    first = (place.lead + begin) // GROUP
    triples = state[triples_of(moment)][first : first + group_count(end - begin, lead)]
    return from_groups(unpack(to_groups(stored, lead), triples), lead, end - begin)


def write(state: Mapping[str, Tensor], moment: str, place: Place, begin: int, values: Tensor) -> None:
    """Store fp32 values from element `begin` on; the counterpart of `read`."""
    stored = state[moment].view(-1)[begin : begin + values.numel()]
    if place.format != "fp8_coat":
        stored.copy_(values)
        return
    lead = (place.lead + begin) % GROUP
    first = (place.lead + begin) // GROUP
    packed = pack(to_groups(values, lead), keep_positive=moment == "exp_avg_sq")
    stored.copy_(from_groups(packed.codes, lead, values.numel()))
    state[triples_of(moment)][first : first + packed.triples.shape[0]] = packed.triples
