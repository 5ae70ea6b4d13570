"""Linears with weights for each modality whose products are Transformer-Engine's grouped ones.

Imported only if Transformer-Engine is usable. Parameters and checkpoints are those of untied.py. GroupedLinear takes
the sizes of its groups as a list, so it is used where the host knows them: not in Mixture-of-Depths layers, whose
tokens are chosen on the device. There, and if only some modalities are trained, torch's product is used.

No FP8 (config/model/rules.py), and no fused gradient accumulation: a weight whose micro-batches take different ways
would lose gradients, since Transformer-Engine marks it as accumulated for all of them.
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import te
from torch import Tensor

from mmscale.model.untied import Rows, UntiedColumnLinear, UntiedLinear, UntiedRowLinear


class _Grouped(UntiedLinear):
    """The product of both linears."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        outputs, inputs = self.weights[0].shape
        kernels = te.pytorch.GroupedLinear(
            len(self.weights), inputs, outputs, bias=False, params_dtype=self.weights[0].dtype, device="meta"
        )
        for number, weight in enumerate(self.weights):
            setattr(kernels, f"weight{number}", weight)
        self._kernels = (kernels,)  # in a tuple: no submodule, so its parameters have one name only

    def _multiply(self, tokens: Tensor, rows: Rows) -> Tensor:
        # Transformer-Engine asks the first weight only whether gradients are needed.
        trained = {weight.requires_grad for weight in self.weights}
        if rows.counts is None or len(trained) > 1:
            return super()._multiply(tokens, rows)
        grouped = self._kernels[0](tokens.index_select(0, rows.order), rows.counts)
        found: Tensor = grouped.index_select(0, rows.back)
        return found


class GroupedColumnLinear(_Grouped, UntiedColumnLinear):
    """[S / CP / TP, B, in] -> [S / CP, B, out / TP]."""


class GroupedRowLinear(_Grouped, UntiedRowLinear):
    """[S / CP, B, in / TP] -> [S / CP / TP, B, out]."""
