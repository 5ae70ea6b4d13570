"""How emulated FP8 and NVFP4 scale the tensors of a product: formats, histories and blocks of each recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from mmscale.config import Config
from mmscale.config.precision.fp8 import alignment_of
from mmscale.model import fp8_formats as formats
from mmscale.model.fp8_formats import Blocks

# The tensors of a product, as column numbers of `DelayedScales.state`: the order in which Transformer-Engine keeps
# delayed scales. Columns 2 and 4 (output, gradient of the input) are not used.
ROWS, WEIGHT, GRADIENT, COLUMNS = 0, 1, 3, 5


class OperandBlocks(NamedTuple):
    """Which values share a scale in the operands of a linear's three products.

    A block runs along the dimension that its product sums over, or along both.

    Attributes:
        rows: [M, K] in the product with the weight.
        weight: [K, N] in the product with the rows.
        gradient: [M, N] in the product that gives the gradient of the rows.
        weight_back: [K, N] in that product.
        rows_back: [M, K] in the product that gives the gradient of the weight.
        gradient_down: [M, N] in that product.
    """

    rows: Blocks
    weight: Blocks
    gradient: Blocks
    weight_back: Blocks
    rows_back: Blocks
    gradient_down: Blocks


_TENSORS = OperandBlocks(*6 * (Blocks.TENSOR,))
_BLOCKS = {
    "delayed": _TENSORS,
    "tensorwise": _TENSORS,
    "blockwise": OperandBlocks(Blocks.ROW, Blocks.TILE, Blocks.ROW, Blocks.TILE, Blocks.COLUMN, Blocks.COLUMN),
    "mxfp8": OperandBlocks(
        rows=Blocks.MX_ROW,
        weight=Blocks.MX_COLUMN,
        gradient=Blocks.MX_ROW,
        weight_back=Blocks.MX_ROW,
        rows_back=Blocks.MX_COLUMN,
        gradient_down=Blocks.MX_COLUMN,
    ),
    "nvfp4": OperandBlocks(
        rows=Blocks.FP4_ROW,
        weight=Blocks.FP4_TILE,
        gradient=Blocks.FP4_ROW,
        weight_back=Blocks.FP4_TILE,
        rows_back=Blocks.FP4_ROTATED,
        gradient_down=Blocks.FP4_ROTATED,
    ),
}


@dataclass(frozen=True)
class Recipe:
    """How tensors are scaled; attributes as in `precision.fp8_*`.

    Attributes:
        scaling: delayed, tensorwise, blockwise, mxfp8 or nvfp4.
        gradient: format of gradients; rows and weights use e4m3.
        margin: delayed scales are divided by 2^margin.
        history: number of steps whose amax values are kept.
        most_recent: use the newest amax value for the scale, not the largest one of the history.
        stochastic: nvfp4: round gradients stochastically.
        hadamard: nvfp4: rotate the factors of the weight's gradient.
        seed: of stochastic rounding.
    """

    scaling: Literal["delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"]
    gradient: torch.dtype = formats.E5M2
    margin: int = 0
    history: int = 1024
    most_recent: bool = False
    stochastic: bool = False
    hadamard: bool = True
    seed: int = 0

    @classmethod
    def of(cls, config: Config) -> Recipe:
        """The recipe of a configuration with emulated FP8."""
        precision = config.precision
        assert precision.fp8 != "off", "the caller asks `precision.emulated`"
        return cls(
            scaling=precision.fp8,
            gradient=formats.E5M2 if precision.fp8_format == "hybrid" else formats.E4M3,
            margin=precision.fp8_margin,
            history=precision.fp8_amax_history,
            most_recent=precision.fp8_amax_choice == "most_recent",
            stochastic=precision.fp8 == "nvfp4" and precision.fp4_stochastic_rounding,
            hadamard=precision.fp4_hadamard,
            seed=config.run.seed,
        )

    @property
    def blocks(self) -> OperandBlocks:
        """Which values share a scale."""
        found = _BLOCKS[self.scaling]
        if self.scaling == "nvfp4" and not self.hadamard:
            return found._replace(rows_back=Blocks.FP4_COLUMN, gradient_down=Blocks.FP4_COLUMN)
        return found

    @property
    def alignment(self) -> int:
        """Divisor of the sizes of a product."""
        return alignment_of(self.scaling)

    def format_of(self, role: int) -> torch.dtype:
        """FP8 format of one of a product's tensors."""
        return self.gradient if role >= GRADIENT else formats.E4M3
