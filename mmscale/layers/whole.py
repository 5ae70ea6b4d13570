"""All tensors of a layer, and of a model, in the order in which exports hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mmscale.config import Config
from mmscale.layers.attention_tensors import attention_tensors
from mmscale.layers.feed_forward import FEED_FORWARDS
from mmscale.layers.layer_tensor import LayerTensor, Routers, TensorPart, auxiliary_tensors, by_modality


def layer_tensors(config: Config, *, depth: bool, routers: Routers | None = None) -> list[LayerTensor]:
    """The tensors of one layer, with names within the layer.

    Args:
        config: gives the model.
        depth: whether it is a Mixture-of-Depths layer.
        routers: its tensors for causal routing; None: those of the configuration.
    """
    routers = routers or Routers.of(config)
    found = [*attention_tensors(config), *_norms(config), *FEED_FORWARDS[config.model.kind](config, routers)]
    return [*found, *_depth(config, routers)] if depth else found


def model_tensors(config: Config, *, routers: Routers | None = None) -> list[LayerTensor]:
    """All tensors of a model, with their full names. A tied output layer is not listed.

    Arguments as for `layer_tensors`.
    """
    model = config.model
    rows, hidden = config.vocab.padded_size, model.hidden_size
    found = [
        LayerTensor(
            name="embedding.word_embeddings.weight",
            shape=(rows, hidden),
            part=TensorPart.EMBEDDING,
            hf=("model.embed_tokens.weight",),
            tp_axis=0,
        )
    ]
    kinds = {depth: layer_tensors(config, depth=depth, routers=routers) for depth in (False, True)}
    for number in range(model.num_layers):
        prefix, hf = f"decoder.layers.{number}.", f"model.layers.{number}."
        found += [
            replace(tensor, name=prefix + tensor.name, hf=tuple(hf + name for name in tensor.hf))
            for tensor in kinds[model.is_depth_layer(number)]
        ]
    found += final_norm(config)
    if not model.tie_embeddings:
        found.append(
            LayerTensor(
                name="output_layer.weight",
                shape=(rows, hidden),
                part=TensorPart.OUTPUT,
                hf=("lm_head.weight",),
                tp_axis=0,
            )
        )
    return found


def final_norm(config: Config) -> list[LayerTensor]:
    """The norm before the output layer, one for each modality if `model.untie` names it."""
    norm = LayerTensor(
        name="decoder.final_layernorm.weight",
        shape=(config.model.hidden_size,),
        part=TensorPart.FINAL_NORM,
        hf=("model.norm.weight",),
    )
    return list(by_modality(config, "final_norm", norm))


def _norms(config: Config) -> Iterator[LayerTensor]:
    """Norms of both sub-layers, at the positions of the norm placement."""
    placement = config.model.norm_placement
    if placement.before:
        names = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    else:
        names = {"self_attn_bda.norm": "attention_output_norm", "mlp_bda.norm": "mlp_output_norm"}
        if config.model.normalizes_experts:  # the experts' outputs are normalised instead of the sub-layer's
            del names["mlp_bda.norm"]
    for name, hf in names.items():
        norm = LayerTensor(
            name=f"{name}.weight", shape=(config.model.hidden_size,), part=TensorPart.NORM, hf=(f"{hf}.weight",)
        )
        yield from by_modality(config, "norms", norm)


def _depth(config: Config, routers: Routers) -> Iterator[LayerTensor]:
    """The additional tensors of a Mixture-of-Depths layer."""
    hidden = config.model.hidden_size
    yield LayerTensor(name="depth_router", shape=(hidden,), part=TensorPart.DEPTH_ROUTER, hf=("depth_router",))
    if routers.auxiliary_width is not None:
        yield from auxiliary_tensors(
            "depth_auxiliary.", "depth_auxiliary.", outputs=1, hidden=hidden, width=routers.auxiliary_width
        )
    if routers.thresholds:
        yield LayerTensor(name="depth_threshold.logit", shape=(1,), part=TensorPart.CUTOFF, hf=("depth_threshold",))
