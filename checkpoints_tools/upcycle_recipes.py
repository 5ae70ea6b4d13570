"""How each weight of an upcycled model is made from one of the old model. No values: upcycle.py reads those.

Letters: F inner width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from mmscale.config import Config
from mmscale.layers import Routers, TensorPart, layer_tensors


@dataclass(frozen=True)
class Recipe:
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


def recipes(old: Config, new: Config, layer: str, *, experts: bool) -> Iterator[tuple[str, Recipe]]:
    """The tensors of one layer that are new or changed.

    Args:
        old: the configuration before.
        new: the configuration after.
        layer: the prefix of their names.
        experts: whether there are new experts.
    """
    before = layer_tensors(old, depth=False)
    ffn = [tensor for tensor in before if tensor.part is TensorPart.FFN]  # gate and up projection, down projection
    there = {tensor.name for tensor in before}
    like = next(tensor.name for tensor in before if tensor.part is TensorPart.ATTENTION)
    routers = Routers(None, new.model.keeps_thresholds)
    for tensor in layer_tensors(new, depth=False, routers=routers):
        name = layer + tensor.name
        first = tensor.name.endswith(".w1")
        if tensor.untied and tensor.name not in there:
            tied = layer + f"{tensor.name.removesuffix(f'.{tensor.modality}')}.weight"
            yield name, Recipe(tensor.shape, tied, tied)
        elif not experts:
            continue
        elif tensor.part is TensorPart.EXPERTS:
            own = [one.name for one in ffn if one.modality in (None, tensor.modality)]
            source = layer + own[0 if first else 1] if own else name
            form = (_dense_w1 if first else _dense_w2) if ffn else _only
            yield name, Recipe(tensor.shape, source, source, form, is_expert=True)
        elif tensor.part is TensorPart.ROUTER:
            yield name, Recipe(tensor.shape, layer + like, fresh="router")
        elif tensor.part is TensorPart.BIAS:
            yield name, Recipe(tensor.shape, layer + like, is_parameter=False)
        elif tensor.part is TensorPart.CUTOFF:
            yield name, Recipe(tensor.shape, layer + like, fresh="cutoffs", is_parameter=False)
        elif tensor.part is TensorPart.EXPERT_NORM and ffn:
            norm = f"{layer}mlp_bda.norm.{tensor.modality if 'norms' in old.model.untie else 'weight'}"
            yield name, Recipe(tensor.shape, norm, norm)


def _dense_w1(fc1: Tensor) -> Tensor:
    """[2F, H], gate over up -> [H, 2, F]."""
    return fc1.view(2, -1, fc1.shape[1]).permute(2, 0, 1)


def _dense_w2(fc2: Tensor) -> Tensor:
    """[H, F] -> [F, H]."""
    return fc2.t()


def _only(experts: Tensor) -> Tensor:
    """The only expert of [1, ...]."""
    return experts[0]
