"""Tensors of self-attention."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config import Config
from mmscale.layers.layer_tensor import Form, LayerTensor, TensorPart, by_modality


def attention_tensors(config: Config) -> Iterator[LayerTensor]:
    """Projections, their biases, and the norms of queries and keys."""
    model = config.model
    hidden, head = model.hidden_size, model.head_dim
    queries = model.num_attention_heads * head
    rows = queries + 2 * model.query_groups * head
    for kind, shape in (("weight", (rows, hidden)), *((("bias", (rows,)),) if model.qkv_bias else ())):
        projection = LayerTensor(
            name=f"self_attention.linear_qkv.{kind}",
            shape=shape,
            part=TensorPart.ATTENTION,
            hf=tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv"),
            form=Form.QKV,
            tp_axis=0,
        )
        yield from by_modality(config, "attention", projection)
    output = LayerTensor(
        name="self_attention.linear_proj.weight",
        shape=(hidden, queries),
        part=TensorPart.ATTENTION,
        hf=("self_attn.o_proj.weight",),
        tp_axis=1,
    )
    yield from by_modality(config, "attention", output)
    for name in "qk" if model.qk_norm else "":
        norm = LayerTensor(
            name=f"self_attention.{name}_layernorm.weight",
            shape=(head,),
            part=TensorPart.NORM,
            hf=(f"self_attn.{name}_norm.weight",),
        )
        yield from by_modality(config, "norms", norm)
