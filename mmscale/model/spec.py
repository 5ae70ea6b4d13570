"""Selects the class for each slot of megatron-core's TransformerLayer, layer by layer.

Extends megatron-core by ModuleSpec; nothing of TransformerBlock is overridden, and one method of GPTModel (output.py).
The torch backend's classes are named here, Transformer-Engine's in spec_te.py; everything else is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset

from mmscale.config import Config
from mmscale.config.derived import depth_tokens, expert_groups, sends_keys_around, shared_width, ungated_groups
from mmscale.config.precision.fp8 import capacity_multiple, row_multiple
from mmscale.errors import ConfigError
from mmscale.model.attention import DocumentAttention
from mmscale.model.expert_compute import chosen
from mmscale.model.fp8_emulate import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from mmscale.model.layer import DepthLayer, DepthSettings, MixedModalLayer
from mmscale.model.moma import MoMaMLP
from mmscale.model.moma_settings import ExpertGroup, MoMaSettings, TokenChoiceSettings
from mmscale.model.norm import Residual, RMSNorm
from mmscale.model.slot_parts import Parts
from mmscale.model.untied import UntiedColumnLinear, UntiedMLP, UntiedRMSNorm, UntiedRowLinear
from mmscale.runtime import transformer_engine

TORCH = Parts(
    column=ColumnParallelLinear,
    row=RowParallelLinear,
    norm_column=None,
    norm=RMSNorm,
    attention=DocumentAttention,
    untied_column=UntiedColumnLinear,
    untied_row=UntiedRowLinear,
)
EMULATED_FP8 = replace(TORCH, column=Fp8ColumnParallelLinear, row=Fp8RowParallelLinear)


def backend(config: Config) -> Literal["te", "torch"]:
    """Resolves `model.backend` for this machine.

    Raises:
        ConfigError: Transformer-Engine is requested but cannot run here.
    """
    if config.model.backend == "te":
        transformer_engine.require("model.backend = te")
        return "te"
    if config.precision.emulated or (config.model.untie and config.precision.fp8 == "off"):
        return "torch"
    return "te" if config.model.backend == "auto" and transformer_engine.usable() else "torch"


def parts(config: Config, transformer: TransformerConfig) -> Parts:
    """The classes of this machine's backend.

    Raises:
        ConfigError: `parallel.cp_attention = ring` without Transformer-Engine, or without a kernel of it.
    """
    ring = sends_keys_around(config)
    if ring:
        transformer_engine.require("parallel.cp_attention = ring")
    if backend(config) == "torch":
        return EMULATED_FP8 if config.precision.emulated else TORCH
    # Cannot be imported without Transformer-Engine.
    from mmscale.model.spec_te import parts as te_parts

    return te_parts(transformer, ring=ring)


def untied_parts(config: Config, classes: Parts, part: str) -> Parts:
    """The classes for a part of the layer: those with weights for each modality where `model.untie` names the part.

    Args:
        config: the run's configuration.
        classes: those of the backend.
        part: one of UNTIED.
    """
    if part not in config.model.untie:
        return classes
    return replace(classes, column=classes.untied_column, row=classes.untied_row, norm_column=None, norm=UntiedRMSNorm)


def _norm_column(config: Config, own: Parts) -> type | None:
    """The module that is a norm and the linear after it, if the backend has one and nothing of it is untied."""
    return own.norm_column if config.model.norm_placement.before and "norms" not in config.model.untie else None


def nominal_share(config: Config) -> dict[str, float]:
    """Nominal share of each modality in the tokens.

    Raises:
        ConfigError: the share is still `auto`; the code that opens the data should have replaced it by the measured
            share.
    """
    share = config.model.experts.share
    if share == "auto":
        raise ConfigError(
            "model.experts.share is 'auto' but no data set is at hand to measure it",
            remedy="give data.path, or the shares themselves: model.experts.share={text: 0.5, image: 0.5}",
        )
    return share


def moma_settings(config: Config) -> MoMaSettings:
    """Settings of the expert layers for a configuration."""
    experts = config.model.experts
    share = nominal_share(config) if config.model.per_modality else {}
    given = experts.token_choice
    return MoMaSettings(
        groups=tuple(ExpertGroup(*group, share.get(group.name, 1.0)) for group in expert_groups(config)),
        ungated=tuple(ExpertGroup(*group, share[group.name]) for group in ungated_groups(config)),
        per_sequence=experts.scope == "sequence",
        actual=experts.capacity == "actual",
        capacity_factor=experts.capacity_factor,
        capacity_multiple=capacity_multiple(config),
        choice=experts.choice,
        token_choice=None if given is None else TokenChoiceSettings(given.scores, given.top_k, given.capacity_factor),
        gumbel=experts.noise == "gumbel",
        noise_seed=config.run.seed,
        norm_experts=config.model.normalizes_experts,
        shared_width=shared_width(config),
        # Of Mixture-of-Depths layers only, if tokens choose.
        auxiliary_width=config.model.auxiliary_width if config.model.experts_choose else None,
        thresholds=config.model.keeps_thresholds and config.model.experts_choose,
        compute=chosen(config),
        overlap=config.parallel.overlap_experts,
    )


def depth_settings(config: Config) -> DepthSettings:
    """Settings of the Mixture-of-Depths layers for a configuration."""
    assert config.model.depth is not None
    keep, quotas = depth_tokens(config), None
    if config.model.depth.choice == "per_modality":
        share = nominal_share(config)
        quotas = tuple(int(share[name] * keep + 1e-9) for name in config.vocab.names)
    return DepthSettings(
        keep=keep,
        quotas=quotas,
        modalities=config.vocab.names,
        auxiliary_width=config.model.auxiliary_width,
        thresholds=config.model.keeps_thresholds,
        row_multiple=row_multiple(config),
    )


@dataclass(frozen=True)
class FeedForward:
    """The module in the feed-forward slot of a layer.

    Attributes:
        spec: the module.
        has_norm: the norm before it is part of its first linear, which alone reads the norm's output.
    """

    spec: ModuleSpec
    has_norm: bool


def _dense(config: Config, groups: ProcessGroupCollection, classes: Parts) -> FeedForward:
    """One SwiGLU for all tokens, or one for each modality."""
    own = untied_parts(config, classes, "ffn")
    fused = _norm_column(config, own)
    submodules = MLPSubmodules(linear_fc1=fused or own.column, linear_fc2=own.row)
    if own is classes:
        return FeedForward(ModuleSpec(module=MLP, submodules=submodules), has_norm=fused is not None)
    # megatron-core passes the group to its own class only.
    spec = ModuleSpec(module=UntiedMLP, submodules=submodules, params={"tp_group": groups.tp})
    return FeedForward(spec, has_norm=False)


def _experts(config: Config, groups: ProcessGroupCollection, _: Parts) -> FeedForward:
    """Groups of experts."""
    spec = ModuleSpec(module=MoMaMLP, params={"settings": moma_settings(config), "groups": groups})
    return FeedForward(spec, has_norm=False)


# The module of each kind of layer (`model.kind`); its tensors are in mmscale.layers.feed_forward.
FEED_FORWARDS: Mapping[str, Callable[[Config, ProcessGroupCollection, Parts], FeedForward]] = {
    "dense": _dense,
    "moe": _experts,
    "moma": _experts,
}


def layer_spec(
    config: Config,
    transformer: TransformerConfig,
    layer: int,
    groups: ProcessGroupCollection,
    *,
    classes: Parts | None = None,
) -> ModuleSpec:
    """The spec of one layer.

    Args:
        config: the run's configuration.
        transformer: the corresponding TransformerConfig.
        layer: global index, from 0.
        groups: process groups of this rank.
        classes: fill the slots; None: those of this machine's backend.
    """
    classes = classes or parts(config, transformer)
    attention = untied_parts(config, classes, "attention")
    norm_class = untied_parts(config, classes, "norms").norm
    pre = config.model.norm_placement.before
    norm = norm_class if pre else IdentityOp
    # A norm whose output only one linear reads is fused into that linear, if the backend has such a module.
    fused = _norm_column(config, attention)
    feed_forward = FEED_FORWARDS[config.model.kind](config, groups, classes)
    qk_norm = norm_class if config.model.qk_norm else IdentityOp
    # Normalised experts contain their own norms, so the residual connection after them has none.
    attention_residual = ModuleSpec(
        module=Residual, params={"norm_config": None if pre else transformer, "norm_class": norm_class}
    )
    mlp_residual = (
        ModuleSpec(module=Residual, params={"norm_config": None})
        if config.model.normalizes_experts
        else attention_residual
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=IdentityOp if fused else norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=fused or attention.column,
                core_attention=classes.attention,
                linear_proj=attention.row,
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        ),
        self_attn_bda=attention_residual,
        pre_mlp_layernorm=IdentityOp if feed_forward.has_norm else norm,
        mlp=feed_forward.spec,
        mlp_bda=mlp_residual,
        sharded_state_dict_keys_map=classes.keys,
    )
    if config.model.is_depth_layer(layer):
        return ModuleSpec(module=DepthLayer, params={"depth": depth_settings(config)}, submodules=submodules)
    return ModuleSpec(module=MixedModalLayer, submodules=submodules)


def block_spec(
    config: Config, transformer: TransformerConfig, groups: ProcessGroupCollection, *, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The specs of the layers of this pipeline stage (and chunk); megatron-core does not slice a list of specs.

    Args:
        config: the model's settings.
        transformer: megatron-core's view of the model.
        groups: process groups.
        vp_stage: number of the chunk on this stage; None: stages are not divided into chunks.
    """
    offset = get_transformer_layer_offset(transformer, vp_stage, groups.pp.rank())
    count = get_num_layers_to_build(transformer, vp_stage, groups.pp.rank())
    classes = parts(config, transformer)
    specs = [layer_spec(config, transformer, offset + index, groups, classes=classes) for index in range(count)]
    norm = untied_parts(config, classes, "final_norm").norm
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)
