"""Linears and norms with weights of their own for each modality (Mixture-of-Transformers, arXiv 2411.04996).

Shipped beside the weights. A token's modality follows from its id, so what a token is multiplied by is known as soon as
it is generated.
"""

from collections.abc import Callable

import torch
from torch import nn

from .configuration_moma import MomaConfig


class MomaUntied(nn.ModuleDict):
    """One module for each modality, by its name; every token gets the result of its own modality's.

    All modules see all tokens, and a token keeps one result: shapes do not depend on the ids, every parameter gets a
    gradient, and the work is that of the tied module times the number of modalities.
    """

    def forward(self, tokens: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        """Apply each token's own module.

        Args:
            tokens: [..., more, width], where the leading dimensions are those of `modality`.
            modality: [...], index of each token's modality; -1, padding, is of the last.

        Returns:
            [..., more, width of the modules' output].
        """
        first, *others = self.values()
        own = modality.view(*modality.shape, *(1,) * (tokens.dim() - modality.dim()))
        out = first(tokens)
        for index, module in enumerate(others, start=1):
            last = index == len(others)
            out = torch.where((own == index) | (own < 0) if last else own == index, module(tokens), out)
        return out


def untied(config: MomaConfig, part: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A module of the layer, or one for each modality where `config.untie` names its part."""
    if part not in (config.untie or []):
        return make()
    return MomaUntied({name: make() for name, _, _ in config.modalities or []})


def apply(module: nn.Module, tokens: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
    """Call a module that `untied` made; shapes as in `MomaUntied.forward`."""
    found: torch.Tensor = module(tokens, modality) if isinstance(module, MomaUntied) else module(tokens)
    return found


__all__ = ["MomaUntied", "apply", "untied"]
