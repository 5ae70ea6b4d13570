"""Which class fills which slot of megatron-core's TransformerLayer, layer by layer.

Extends megatron-core by ModuleSpec only; nothing of GPTModel or TransformerBlock is overridden. The torch backend
has its classes named here, Transformer-Engine in spec_te.py; everything else is the same for both.
"""

from __future__ import annotations

from dataclasses import replace
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
from mmscale.config.derived import depth_tokens
from mmscale.config.fp8 import capacity_multiple, row_multiple
from mmscale.errors import ConfigError
from mmscale.model.attention import DocumentAttention
from mmscale.model.expert_compute import chosen
from mmscale.model.fp8_emulate import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from mmscale.model.layer import DepthLayer, DepthSettings, MixedModalLayer
from mmscale.model.moma import ExpertGroup, MoMaMLP, MoMaSettings
from mmscale.model.norm import Residual, RMSNorm
from mmscale.model.parts import Parts
from mmscale.runtime import transformer_engine

TORCH = Parts(
    column=ColumnParallelLinear, row=RowParallelLinear, norm_column=None, norm=RMSNorm, attention=DocumentAttention
)
EMULATED_FP8 = replace(TORCH, column=Fp8ColumnParallelLinear, row=Fp8RowParallelLinear)


def backend(config: Config) -> Literal["te", "torch"]:
    """What `model.backend` means on this machine.

    Raises:
        ConfigError: Transformer-Engine is asked for and cannot run here.
    """
    if config.model.backend == "te":
        transformer_engine.require("model.backend = te")
        return "te"
    if config.precision.emulated:
        return "torch"
    return "te" if config.model.backend == "auto" and transformer_engine.usable() else "torch"


def parts(config: Config, transformer: TransformerConfig) -> Parts:
    """The classes of this machine's backend."""
    if backend(config) == "torch":
        return EMULATED_FP8 if config.precision.emulated else TORCH
    # Cannot be imported without Transformer-Engine.
    from mmscale.model.spec_te import parts as te_parts

    return te_parts(transformer)


def nominal_share(config: Config) -> dict[str, float]:
    """Nominal share of each modality in the tokens.

    Raises:
        ConfigError: the share is still `auto`; whoever opens the data puts the measured one into the configuration.
    """
    share = config.model.experts.share
    if share == "auto":
        raise ConfigError(
            "model.experts.share is 'auto' but no data set is at hand to measure it",
            remedy="give data.path, or the shares themselves: model.experts.share={text: 0.5, image: 0.5}",
        )
    return share


def moma_settings(config: Config) -> MoMaSettings:
    """Groups of experts that a configuration asks for."""
    experts = config.model.experts
    names = config.vocab.names
    groups: tuple[ExpertGroup, ...]
    if config.model.kind == "moe":
        groups = tuple(
            ExpertGroup(name, tuple(range(len(names))), count, 1.0) for name, count in experts.counts.items()
        )
    else:
        share = nominal_share(config)
        # In the vocabulary's order, whatever the order in the file: ranks and checkpoints must agree.
        groups = tuple(
            ExpertGroup(name, (index,), experts.counts[name], share[name]) for index, name in enumerate(names)
        )
    return MoMaSettings(
        groups=groups,
        per_sequence=experts.scope == "sequence",
        actual=experts.capacity == "actual",
        capacity_factor=experts.capacity_factor,
        capacity_multiple=capacity_multiple(config),
        choice=experts.choice,
        gumbel=experts.noise == "gumbel",
        noise_seed=config.run.seed,
        norm_experts=config.model.norm == "post_per_expert",
        shared_width=experts.shared * (experts.shared_ffn_hidden_size or config.model.ffn_hidden_size),
        auxiliary_width=config.model.auxiliary_width,
        thresholds=config.model.keeps_thresholds,
        compute=chosen(config),
        overlap=config.parallel.overlap_experts,
    )


def depth_settings(config: Config) -> DepthSettings:
    """Tokens that the Mixture-of-Depths layers of a configuration process."""
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
        transformer: megatron-core's view of it.
        layer: global index, from 0.
        groups: process groups of this rank.
        classes: what fills the slots; those of this machine's backend if None.
    """
    classes = classes or parts(config, transformer)
    pre, moma = config.model.norm == "pre", config.model.kind != "dense"
    norm = classes.norm if pre else IdentityOp
    # A norm whose output only one linear reads is part of that linear, where the backend has such a thing.
    fused = classes.norm_column if pre else None
    qk_norm = classes.norm if config.model.qk_norm else IdentityOp
    # Normalised experts carry their own norms, so the residual connection of that sub-layer has none.
    attention_residual = ModuleSpec(
        module=Residual, params={"norm_config": None if pre else transformer, "norm_class": classes.norm}
    )
    mlp_residual = (
        ModuleSpec(module=Residual, params={"norm_config": None})
        if moma and config.model.norm == "post_per_expert"
        else attention_residual
    )
    mlp = (
        ModuleSpec(module=MoMaMLP, params={"settings": moma_settings(config), "pg_collection": groups})
        if moma
        else ModuleSpec(
            module=MLP, submodules=MLPSubmodules(linear_fc1=fused or classes.column, linear_fc2=classes.row)
        )
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=IdentityOp if fused else norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=fused or classes.column,
                core_attention=classes.attention,
                linear_proj=classes.row,
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        ),
        self_attn_bda=attention_residual,
        pre_mlp_layernorm=IdentityOp if fused and not moma else norm,
        mlp=mlp,
        mlp_bda=mlp_residual,
        sharded_state_dict_keys_map=classes.keys,
    )
    if config.model.is_depth_layer(layer):
        return ModuleSpec(module=DepthLayer, params={"depth": depth_settings(config)}, submodules=submodules)
    return ModuleSpec(module=MixedModalLayer, submodules=submodules)


def block_spec(
    config: Config, transformer: TransformerConfig, groups: ProcessGroupCollection, *, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The specs of the layers of this pipeline stage (and chunk); megatron-core does not slice a list by itself."""
    offset = get_transformer_layer_offset(transformer, vp_stage, groups.pp.rank())
    count = get_num_layers_to_build(transformer, vp_stage, groups.pp.rank())
    classes = parts(config, transformer)
    specs = [layer_spec(config, transformer, offset + index, groups, classes=classes) for index in range(count)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=classes.norm)
