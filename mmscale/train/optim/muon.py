"""`Muon`: momentum orthogonalised by Newton-Schulz for matrices of hidden layers, AdamW for all other parameters.

Keller Jordan's Muon with Nesterov momentum, and Moonlight's scale (arXiv 2502.16982, section 2.2): an update has the
root mean square of AdamW's, 0.2, so that learning rate and weight decay are those of AdamW. For a matrix of R rows and
C columns and its gradient G:

    M <- momentum * M + (1 - momentum) * G
    U  = momentum * M + (1 - momentum) * G        (Nesterov; otherwise U = M)
    W <- W - lr * (rms * sqrt(max(R, C)) * orthogonalised(U) + weight_decay * W)

The momentum is an average, not a sum; the direction of an orthogonalised update does not depend on that factor. It has
the form and the name of Adam's first moment, so each of the two optimizers can read the other's checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmscale.config import MuonConfig
from mmscale.model.build import DTYPES
from mmscale.train.optim.adam_compact import CompactAdam, read, write
from mmscale.train.optim.matrix_exchange import MatrixExchange
from mmscale.train.optim.newton_schulz import orthogonalized

MOMENTUM = "exp_avg"


class Muon(CompactAdam):
    """Muon for matrices, AdamW for the rest. Matrices are unknown until `hold` is called.

    Args:
        params: Parameters or parameter groups.
        settings: of Muon.
        moments: storage of the momentum, and of AdamW's moments of other matrices, as for CompactAdam; or fp32.
        options: As HostFusedAdam's.
    """

    def __init__(self, params: Iterable[Any], *, settings: MuonConfig, moments: str, **options: Any) -> None:
        super().__init__(params, moments=moments, **options)
        self.settings = settings
        self._exchanges: Sequence[MatrixExchange] = ()
        self._shards: dict[Tensor, Tensor] = {}  # this rank's fp32 shard of each parameter that Muon updates
        self._matrices: set[Tensor] = set()

    def hold(self, exchanges: Sequence[MatrixExchange], shards: Mapping[Tensor, Tensor]) -> None:
        """Take over the update of matrices.

        Args:
            exchanges: the matrices of all ranks.
            shards: this rank's fp32 shard of each of the exchanges' parameters.
        """
        self._exchanges, self._shards, self._matrices = exchanges, dict(shards), set(shards.values())
        for shard in self._matrices:
            self.places[shard] = replace(self.place(shard), moments=(MOMENTUM,))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter; every data-parallel and tensor-parallel rank calls it."""
        loss = super().step(closure)
        for exchange in self._exchanges:
            wanted = {parameter: self._direction(self._shards[parameter]) for parameter in exchange.parameters}
            self._apply(exchange.apply(wanted, self._orthogonalized))
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        super()._update(group, [param for param in params if param not in self._matrices])

    def _direction(self, shard: Tensor) -> Tensor:
        """Update the momentum of a shard, and return what is orthogonalised."""
        assert shard.grad is not None
        state, place, factor = self._state(shard), self.place(shard), self.settings.momentum
        gradient = shard.grad.reshape(-1)
        momentum = read(state, MOMENTUM, place, 0, shard.numel()).lerp_(gradient, 1 - factor)
        write(state, MOMENTUM, place, 0, momentum)
        return torch.lerp(gradient, momentum, factor) if self.settings.nesterov else momentum

    def _orthogonalized(self, stack_BRC: Tensor) -> Tensor:
        """The update of matrices, without the learning rate."""
        settings = self.settings
        found = orthogonalized(
            stack_BRC, steps=settings.steps, coefficients=settings.coefficients, dtype=DTYPES[settings.dtype]
        )
        return found.mul_(settings.rms * math.sqrt(max(stack_BRC.shape[-2:])))

    def _apply(self, updates: Mapping[Tensor, Tensor]) -> None:
        """Apply this rank's parts of the updates, with decoupled weight decay."""
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for parameter, update in updates.items():
            shard = self._shards[parameter]
            group = groups[shard]
            shard.mul_(1 - group["lr"] * group["weight_decay"])
            shard.add_(update.view_as(shard), alpha=-group["lr"])
