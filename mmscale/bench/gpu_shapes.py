"""Sizes of `mmscale bench gpu` and computations with them: FLOPs, bytes, floors and predictions.

No tensor is created here. FLOPs and parameters come from mmscale.plan; a floor is the time that the device's best
matrix product or copy needs for the same work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmscale.config import Config
from mmscale.plan import count_parameters, flops_per_token
from mmscale.plan.compute import layer_flops
from mmscale.tables.settings import KINDS


@dataclass(frozen=True)
class Ceilings:
    """The largest measured speed of a device: products [FLOP/s] and copies, counting reads and writes [B/s]."""

    bf16: float
    fp8: float
    copy: float


# Expected for one H100 SXM before any measurement: bf16 and copies from published measurements, FP8 twice bf16.
EXPECTED = Ceilings(bf16=798e12, fp8=1.6e15, copy=3.0e12)


@dataclass(frozen=True)
class Shape:
    """The 1.4B class of MoMa with widths that FP8 supports (the paper's 5,461 is odd): half text, half image.

    Attributes:
        hidden, inner, heads: width, SwiGLU width, attention heads.
        seq, micro_batch: tokens of a sequence, sequences of a micro-batch.
        experts: of both modalities together, the same number of each.
        vocabulary: ids, image codes included.
        dense_layers, moma_layers: layers of the stacks that fit one device of 80 GB without recomputation.
        square: side of the matrices of the ceilings.
        copied: bytes of the copy.
    """

    hidden: int = 2048
    inner: int = 5632
    heads: int = 16
    seq: int = 4096
    micro_batch: int = 4
    experts: int = 8
    vocabulary: int = 65_536
    dense_layers: int = 16
    moma_layers: int = 6
    square: int = 8192
    copied: int = 2 << 30

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.seq * self.micro_batch

    @property
    def capacity(self) -> int:
        """Tokens of each expert; with expert choice all slots are used."""
        return self.tokens // self.experts

    @property
    def stacks(self) -> tuple[tuple[str, int], ...]:
        """Kind and layers of the stacks that are trained."""
        return (("dense", self.dense_layers), ("dense", self.moma_layers), ("moma", self.moma_layers))

    def expert_flops(self) -> float:
        """Forward of the experts of one layer.

        With the same number of tokens each, they have the FLOPs of a dense FFN.
        """
        return layer_flops(self._counted("dense", 1), depth=False).ffn * self.tokens

    def layer_flops(self, *, depth: bool = False) -> float:
        """Forward of one layer, or of one that processes a quarter of each sequence."""
        return layer_flops(self._counted("dense", 2, depth=True), depth=depth).forward * self.tokens

    def step_flops(self, kind: str, layers: int) -> float:
        """Forward and backward of a stack with its output layer."""
        return flops_per_token(self._counted(kind, layers)).training * self.tokens

    def parameters(self, kind: str, layers: int) -> int:
        """Weights of a stack."""
        return count_parameters(self._counted(kind, layers)).total

    def _counted(self, kind: str, layers: int, *, depth: bool = False) -> Config:
        """A configuration for counting, for which the dtype does not matter."""
        return self.config(kind, layers=layers, dtype="bf16", depth=depth)

    def adam_bytes(self, parameters: float) -> float:
        """Bytes of an update: fp32 weight and two moments read and written, fp32 gradient read, bf16 weight written."""
        return parameters * (2 * 3 * 4 + 4 + 2)

    def swiglu_bytes(self, *, backward: bool) -> float:
        """Traffic of an unfused silu(gate) * up in bf16: 5 tensors of inner width forward, 8 more backward."""
        return (13 if backward else 5) * 2.0 * self.inner * self.tokens

    def config(
        self,
        kind: str,
        *,
        layers: int,
        dtype: str,
        backend: str = "auto",
        fp8: str = "off",
        depth: bool = False,
        fusion: str = "auto",
    ) -> Config:
        """The configuration of a model of this shape.

        Args:
            kind: "dense" or "moma".
            layers: number of layers.
            dtype: precision.dtype.
            backend: model.backend.
            fp8: precision.fp8.
            depth: layer 0 processes a quarter of the tokens.
            fusion: model.gradient_accumulation_fusion; "off" without gradient buffers.
        """
        image = self.vocabulary // 8
        half = self.experts // 2
        model: dict[str, Any] = {
            "kind": kind,
            "num_layers": layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.inner,
            "num_attention_heads": self.heads,
            "seq_length": self.seq,
            "backend": backend,
            "gradient_accumulation_fusion": fusion,
            "depth": {"every": layers, "capacity": 0.25, "multiple": 16} if depth else None,
        }
        if KINDS[kind].experts:
            model["experts"] = {
                "counts": {"text": half, "image": half},
                "share": {"text": 0.5, "image": 0.5},
                "capacity_multiple": 16,
            }
        return Config.model_validate(
            {
                "vocab": {
                    "modalities": [
                        {"name": "text", "size": self.vocabulary - image},
                        {"name": "image", "size": image},
                    ]
                },
                "model": model,
                "train": {"micro_batch_size": self.micro_batch, "global_batch_size": self.micro_batch},
                "precision": {"dtype": dtype, "fp8": fp8},
            }
        )


FULL = Shape()
# Runs every line of the benchmark in seconds on a CPU; the numbers have no meaning.
TINY = Shape(
    hidden=64,
    inner=64,
    heads=4,
    seq=64,
    micro_batch=2,
    experts=4,
    vocabulary=512,
    dense_layers=3,
    moma_layers=2,
    square=128,
    copied=1 << 20,
)


def predicted(shape: Shape) -> dict[str, float]:
    """Seconds by row, predicted for one H100 before anything was measured."""
    best = EXPECTED
    forward, both = shape.expert_flops() / best.bf16, 3 * shape.expert_flops() / best.bf16
    unfused = {way: shape.swiglu_bytes(backward=way) / best.copy for way in (False, True)}
    casts = 0.46e-3 * shape.tokens / FULL.tokens  # activations, forward and backward
    weights = 0.37e-3 * (shape.hidden * shape.inner) / (FULL.hidden * FULL.inner)  # in the first micro-batch of a step
    fp8 = 3 * shape.expert_flops() / best.fp8 * 1.15 + casts + unfused[True]
    rows = {
        "product bf16": 2.0 * shape.square**3 / best.bf16,
        "product fp8": 2.0 * shape.square**3 / 1.375e15,
        "copy": 2.0 * shape.copied / best.copy,
        "experts loop forward": 1.05 * (1.15 * forward + unfused[False]),
        "experts loop both": 1.05 * (1.15 * both + unfused[True]),
        "experts bmm forward": 1.15 * forward + unfused[False],
        "experts bmm both": 1.15 * both + unfused[True],
        "experts te bf16": 1.15 * both + unfused[True],
        "depth layer": 0.27 * 1.25 * shape.layer_flops() / best.bf16,
        "routing": 0.2e-3,
        "token choice": 1.15 * forward + unfused[False] + 0.1e-3,
    }
    for recipe in ("delayed", "tensorwise", "blockwise"):
        rows[f"experts te {recipe} first"] = fp8 + weights
        rows[f"experts te {recipe} cached"] = fp8
    for kind, layers in shape.stacks:
        update = shape.adam_bytes(shape.parameters(kind, layers)) / best.copy
        bf16 = shape.step_flops(kind, layers) / best.bf16 / 0.6 + update
        rows[f"stack {kind} {layers} bf16"] = bf16
        for recipe in ("delayed", "blockwise"):
            rows[f"stack {kind} {layers} {recipe}"] = bf16 / 1.25
    return rows
