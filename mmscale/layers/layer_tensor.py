"""One row of the table of tensors, and the possible values of its columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, StrEnum

from mmscale.config import Config


class TensorPart(Enum):
    """What a tensor belongs to. Parameters and FLOPs are counted by part."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    FINAL_NORM = "final_norm"
    ATTENTION = "attention"
    FFN = "ffn"
    EXPERTS = "experts"
    SHARED = "shared"  # shared experts
    ROUTER = "router"
    EXPERT_NORM = "expert_norm"  # of the outputs of one group's experts
    NORM = "norm"  # all other norms of a layer
    DEPTH_ROUTER = "depth_router"
    AUXILIARY = "auxiliary"  # auxiliary routers
    BIAS = "bias"  # of token choice, by expert; buffers, not parameters
    CUTOFF = "cutoff"  # thresholds of auxiliary routers, and averaged cut-offs; buffers, not parameters


class Form(StrEnum):
    """How a tensor of a checkpoint is converted to tensors of a Hugging Face model.

    SAME: one tensor, unchanged.
    QKV: queries, keys and values, which a checkpoint stores head group by head group.
    HALVES: gate and up projection, one after the other along axis 0.
    JOINED: [E, H, 2, F] as [E, H, 2F].
    ONE_JOINED: [1, H, 2, F] as [H, 2F].
    ONE: [1, F, H] as [F, H].
    """

    SAME = "same"
    QKV = "qkv"
    HALVES = "halves"
    JOINED = "joined"
    ONE_JOINED = "one_joined"
    ONE = "one"


@dataclass(frozen=True, kw_only=True)
class LayerTensor:
    """One tensor of a model, unsharded.

    Attributes:
        name: in a checkpoint; within its layer, or in the model (`model_tensors`).
        shape: of the whole tensor.
        part: what it belongs to.
        hf: names of the corresponding tensors in an export; within their layer, or in the model.
        form: how it is converted to them.
        tp_axis: the axis that is sharded over tensor-parallel ranks; None: every rank holds the whole tensor.
        group: the group of experts; None: it belongs to none.
        modality: the only modality whose tokens use it; None: tokens of every modality do.
    """

    name: str
    shape: tuple[int, ...]
    part: TensorPart
    hf: tuple[str, ...]
    form: Form = Form.SAME
    tp_axis: int | None = None
    group: str | None = None
    modality: str | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_parameter(self) -> bool:
        """Whether it is trained and counted as a parameter; otherwise it is a buffer."""
        return self.part not in (TensorPart.CUTOFF, TensorPart.BIAS)

    @property
    def untied(self) -> bool:
        """Whether it is one modality's copy of a weight that `model.untie` names."""
        return self.modality is not None and self.group is None

    @property
    def spread(self) -> bool:
        """Whether axis 0, the experts of a group, is distributed over expert-parallel ranks."""
        return self.part is TensorPart.EXPERTS


@dataclass(frozen=True)
class Routers:
    """Tensors for causal routing that a model has besides its main weights.

    Attributes:
        auxiliary_width: inner width of the auxiliary routers; None: there are none.
        thresholds: whether it keeps averaged cut-offs.
    """

    auxiliary_width: int | None
    thresholds: bool

    @classmethod
    def of(cls, config: Config) -> Routers:
        """Those of the model that a configuration describes."""
        return cls(config.model.auxiliary_width, config.model.keeps_thresholds)


def by_modality(config: Config, part: str, tensor: LayerTensor) -> Iterator[LayerTensor]:
    """The tensor, or one like it for each modality where `model.untie` names its part of the layer.

    Args:
        config: gives the model and its modalities.
        part: a name of UNTIED in mmscale.tables.settings.
        tensor: a weight. The last component of its name becomes the modality's; exported names get one more.
    """
    if part not in config.model.untie:
        yield tensor
        return
    for modality in config.vocab.names:
        yield replace(
            tensor,
            name=f"{tensor.name.removesuffix('.weight')}.{modality}",
            hf=tuple(f"{name.removesuffix('.weight')}.{modality}.weight" for name in tensor.hf),
            modality=modality,
        )


def auxiliary_tensors(prefix: str, hf: str, *, outputs: int, hidden: int, width: int) -> list[LayerTensor]:
    """The tensors of one auxiliary router.

    Args:
        prefix: of the names in a checkpoint.
        hf: prefix of the names in an export.
        outputs: number of its decisions for each token.
        hidden: width of its input.
        width: its inner width.
    """
    shapes = {"hidden": (width, hidden), "out": (outputs, width), "threshold": (outputs,)}
    return [
        LayerTensor(
            name=prefix + name,
            shape=shape,
            part=TensorPart.CUTOFF if name == "threshold" else TensorPart.AUXILIARY,
            hf=(hf + name,),
        )
        for name, shape in shapes.items()
    ]
