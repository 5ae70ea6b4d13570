"""How each weight of an upcycled model is made from one of the old model. No values: upcycle.py reads those.

Letters: E experts, F inner width, H hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from mmscale.config import Config
from mmscale.layers import LayerTensor, Routers, TensorPart, layer_tensors
from mmscale.layers.whole import final_norm


@dataclass(frozen=True)
class WeightRecipe:
    """How one weight of the new model is made.

    Attributes:
        shape: of the new tensor.
        source: the old weight that it is made from; None: it is new.
        form: converts the old tensor to the new one, or to one of its experts; a view.
        like: an old weight of the same type.
        fresh: "router": drawn; "cutoffs": initial values of averaged cut-offs; "": zeros.
        is_expert: its optimizer moments are dropped unless `keep_moments`.
        is_parameter: the optimizer has state for it.
    """

    shape: tuple[int, ...]
    like: str
    source: str | None = None
    form: Callable[[Tensor], Tensor] = lambda tensor: tensor
    fresh: str = ""
    is_expert: bool = False
    is_parameter: bool = True


def final_norms(old: Config, new: Config) -> Iterator[tuple[str, WeightRecipe]]:
    """Each modality's copy of a tied norm before the output layer, if the new model unties it."""
    (tied, *others), made = final_norm(old), final_norm(new)
    if not others and len(made) > 1:
        yield from ((tensor.name, WeightRecipe(tensor.shape, tied.name, tied.name)) for tensor in made)


def recipes(
    old: Config, new: Config, layer: str, *, experts: bool, split: int | None
) -> Iterator[tuple[str, WeightRecipe]]:
    """The tensors of one layer that are new or changed.

    Args:
        old: the configuration before.
        new: the configuration after.
        layer: the prefix of their names.
        experts: whether there are new experts.
        split: number of parts of the FFN that become experts; None: experts are copies of the whole FFN.
    """
    made = _Layer(old, new, layer, split)
    routers = Routers(None, new.model.keeps_thresholds)
    for tensor in layer_tensors(new, depth=False, routers=routers):
        recipe = made.untied(tensor) or (made.of(tensor) if experts else None)
        if recipe is not None:
            yield layer + tensor.name, recipe


class _Layer:
    """Makes the recipes of one layer. Arguments as for `recipes`."""

    def __init__(self, old: Config, new: Config, layer: str, split: int | None) -> None:
        before = layer_tensors(old, depth=False)
        self._layer, self._split = layer, split
        self._there = {tensor.name for tensor in before}
        # Gate and up projection, down projection; of every modality if they are untied. Of a model with experts there
        # are none: an ungated group keeps its own.
        self._ffn = [] if old.model.has_experts else [one for one in before if one.part is TensorPart.FFN]
        self._like = layer + next(tensor.name for tensor in before if tensor.part is TensorPart.ATTENTION)
        self._per_norm = "norms" in old.model.untie
        self._norm_experts = new.model.normalizes_experts
        self._makers: dict[TensorPart, Callable[[LayerTensor], WeightRecipe | None]] = {
            TensorPart.EXPERTS: self._expert,
            TensorPart.ROUTER: lambda tensor: WeightRecipe(tensor.shape, self._like, fresh="router"),
            TensorPart.BIAS: lambda tensor: WeightRecipe(tensor.shape, self._like, is_parameter=False),
            TensorPart.CUTOFF: lambda tensor: WeightRecipe(
                tensor.shape, self._like, fresh="cutoffs", is_parameter=False
            ),
            TensorPart.EXPERT_NORM: self._norm,
            TensorPart.NORM: self._norm,
            TensorPart.FFN: self._whole,
            TensorPart.SHARED: self._whole,
        }

    def untied(self, tensor: LayerTensor) -> WeightRecipe | None:
        """A modality's copy of a tied weight."""
        tied = f"{tensor.name.removesuffix(f'.{tensor.modality}')}.weight"
        if not tensor.untied or tensor.name in self._there or tied not in self._there:
            return None
        return WeightRecipe(tensor.shape, self._layer + tied, self._layer + tied)

    def of(self, tensor: LayerTensor) -> WeightRecipe | None:
        """A tensor of a feed-forward layer with experts."""
        make = self._makers.get(tensor.part)
        return None if make is None else make(tensor)

    def _source(self, tensor: LayerTensor) -> str:
        """The projection of the tensor's modality that a tensor `w1` or `w2` is made of."""
        own = [one.name for one in self._ffn if one.modality in (None, tensor.modality)]
        return self._layer + own[0 if tensor.name.endswith(".w1") else 1]

    def _whole(self, tensor: LayerTensor) -> WeightRecipe | None:
        """The whole FFN as an ungated or a shared expert, [1, ...]."""
        if not self._ffn or tensor.name in self._there:
            return None
        source = self._source(tensor)
        return WeightRecipe(tensor.shape, source, source, _WHOLE[tensor.name[-2:]])

    def _expert(self, tensor: LayerTensor) -> WeightRecipe:
        """Copies of the FFN, of the only expert, or of the parts of the FFN, one after another."""
        if not self._ffn:
            return WeightRecipe(
                tensor.shape, self._layer + tensor.name, self._layer + tensor.name, _only, is_expert=True
            )
        source, form = self._source(tensor), _WHOLE[tensor.name[-2:]]
        if self._split is not None:
            form = functools.partial(_PARTS[tensor.name[-2:]], parts=self._split, experts=tensor.shape[0])
            # Their outputs are zero at first: by the norm behind each of them, else by the down projection.
            if tensor.name.endswith(".w2") and not self._norm_experts:
                form = functools.partial(_zeros, shape=tensor.shape)
        return WeightRecipe(tensor.shape, source, source, form, is_expert=True)

    def _norm(self, tensor: LayerTensor) -> WeightRecipe | None:
        """The norm of experts' outputs, from the norm behind the FFN; zero for parts of it."""
        if not self._ffn or tensor.name in self._there or not tensor.name.startswith("mlp."):
            return None
        norm = f"{self._layer}mlp_bda.norm.{tensor.modality if self._per_norm else 'weight'}"
        zero = self._split is not None and tensor.part is TensorPart.EXPERT_NORM
        if zero:
            return WeightRecipe(tensor.shape, norm, norm, functools.partial(_zeros, shape=tensor.shape))
        return WeightRecipe(tensor.shape, norm, norm)


def _zeros(tensor: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    return tensor.new_zeros(()).expand(shape)


def _dense_w1(fc1: Tensor) -> Tensor:
    """[2F, H], gate over up -> [H, 2, F]."""
    return fc1.view(2, -1, fc1.shape[1]).permute(2, 0, 1)


def _dense_w2(fc2: Tensor) -> Tensor:
    """[H, F] -> [F, H]."""
    return fc2.t()


def _only(experts: Tensor) -> Tensor:
    """The only expert of [1, ...]."""
    return experts[0]


def _parts_w1(fc1: Tensor, *, parts: int, experts: int) -> Tensor:
    """[2F, H], gate over up -> [E, H, 2, F / parts]; expert e has part e modulo `parts`."""
    each = fc1.view(2, parts, -1, fc1.shape[1]).permute(1, 3, 0, 2)
    return each.repeat(experts // parts, 1, 1, 1)


def _parts_w2(fc2: Tensor, *, parts: int, experts: int) -> Tensor:
    """[H, F] -> [E, F / parts, H]."""
    each = fc2.view(fc2.shape[0], parts, -1).permute(1, 2, 0)
    return each.repeat(experts // parts, 1, 1)


_WHOLE: dict[str, Callable[[Tensor], Tensor]] = {"w1": _dense_w1, "w2": _dense_w2}
_PARTS: dict[str, Callable[..., Tensor]] = {"w1": _parts_w1, "w2": _parts_w2}
