"""Builds the model chunks of this rank from a configuration. Only this module creates a TransformerConfig.

mmscale.train wraps chunks in Float16Module and DDP, and handles gradients.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from mmscale.config import Config, ParallelConfig
from mmscale.config.derived import batch_p2p, expert_counts, overlap_p2p
from mmscale.errors import ConfigError
from mmscale.model.fp8_emulate import attach
from mmscale.model.fp8_settings import fp8_settings
from mmscale.model.init import initialize
from mmscale.model.output import LogitsModel
from mmscale.model.rope import lengthen, scale_angles
from mmscale.model.spec import backend, block_spec
from mmscale.model.untied import pass_modalities_to_final_norm
from mmscale.runtime import device, doctor, transformer_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _recompute(parallel: ParallelConfig) -> dict[str, Any]:
    """megatron-core's fields for `parallel.recompute`."""
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    return {}


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's TransformerConfig of a configuration that has passed mmscale.config.rules."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.precision.dtype]
    fusion = gradient_fusion(config)
    transformer = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        hidden_dropout=model.dropout,
        attention_dropout=0.0,
        attention_backend=AttnBackend[transformer_engine.attention_backend()],
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        # finalize_model_grads looks for the q and k norms (by name) only if this is set.
        qk_layernorm=model.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        # Required for EP > 1 (transformer_config.py); mmscale's experts do not read it.
        num_moe_experts=sum(expert_counts(config).values()) or None,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.tp > 1,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        pipeline_model_parallel_layout=_pipeline_layout(config),
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.tp,
        context_parallel_size=parallel.cp,
        overlap_p2p_comm=overlap_p2p(config),
        batch_p2p_comm=batch_p2p(config),
        tp_comm_overlap=parallel.overlap_tensor,
        # On gloo an output's storage would be freed while isend still reads it (schedules.py,
        # deallocate_output_tensor).
        deallocate_pipeline_outputs=device.has_cuda(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        # init.py fills the weights. megatron-core must still "initialise", because it marks tensor-parallel parameters
        # only there; of an unmarked parameter the gradient norm counts one shard (tensor_parallel/layers.py).
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        hetereogenous_dist_checkpoint=True,
        gradient_accumulation_fusion=fusion.everywhere,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **_recompute(parallel),
        **fp8_settings(config),
    )
    lengthen(transformer, model)
    # Not fields of megatron-core; linear_te.py and untied.py read them.
    transformer.te_gradient_accumulation_fusion = fusion.te
    transformer.untied_modalities = config.vocab.names
    return transformer


def _pipeline_layout(config: Config) -> list[list[str]] | None:
    """The layers of every pipeline chunk by megatron-core's names; None if all chunks have equally many layers."""
    if config.parallel.pp_layers is None:
        return None
    chunks = [["decoder"] * number for number in config.parallel.pp_layers]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


@dataclass(frozen=True)
class GradientFusion:
    """Which linears add their weight gradients to the fp32 buffer within the matrix product.

    Attributes:
        everywhere: all of them, including the output layer, through apex's kernel.
        te: Transformer-Engine's linears, through their own kernels.
    """

    everywhere: bool
    te: bool


def gradient_fusion(config: Config) -> GradientFusion:
    """Resolves `model.gradient_accumulation_fusion` for this machine.

    This function checks for apex itself: megatron-core does so only when it creates its output layer, with a
    RuntimeError, and it does not distinguish a Python-only installation of apex from a complete one.

    Raises:
        ConfigError: it is requested but not possible here.
    """
    wanted, status = config.model.gradient_accumulation_fusion, doctor.apex_status()
    everywhere = device.has_cuda() and status == "ok"
    te = backend(config) == "te"
    if wanted == "on" and not (everywhere or te):
        found = "there is no CUDA device" if not device.has_cuda() else f"apex is {_APEX[status]}"
        raise ConfigError(
            f"model.gradient_accumulation_fusion = on: the backend is torch, and {found}",
            remedy="leave it at auto, use model.backend=te, or build NVIDIA apex: docs/install.md",
        )
    return GradientFusion(everywhere=everywhere and wanted != "off", te=te and wanted != "off")


_APEX = {
    "absent": "not installed",
    "wrong": "not NVIDIA's, but an unrelated package of that name",
    "python-only": "built without its CUDA extensions",
    "ok": "built",
}


def build_chunks(
    config: Config, groups: ProcessGroupCollection, *, transformer: TransformerConfig | None = None
) -> list[GPTModel]:
    """The model chunks of this rank (one without interleaving), initialised, on the rank's device."""
    transformer = transformer or transformer_config(config)
    chunks = []
    stages, stage = groups.pp.size(), groups.pp.rank()
    virtual = config.parallel.vpp or 1
    for chunk in range(virtual):
        vp_stage = chunk if config.parallel.vpp is not None else None
        with _quiet_layers():
            model = LogitsModel(
                config=transformer,
                transformer_layer_spec=block_spec(config, transformer, groups, vp_stage=vp_stage),
                vocab_size=config.vocab.padded_size,
                max_sequence_length=config.model.seq_length,
                pre_process=stage == 0 and chunk == 0,
                post_process=stage == stages - 1 and chunk == virtual - 1,
                parallel_output=True,
                share_embeddings_and_output_weights=config.model.tie_embeddings,
                position_embedding_type="rope",
                rotary_base=int(config.model.rope_base),
                pg_collection=groups,
                vp_stage=vp_stage,
            )
        scale_angles(model.rotary_pos_emb, config.model)
        # With the group set, the module would return only the angles of this context-parallel rank's part of a
        # sequence. Positions restart with every document, so every rank needs the whole table.
        model.rotary_pos_emb.cp_group = None
        pass_modalities_to_final_norm(model.decoder, groups.tp.rank())
        attach(model, config, groups)
        initialize(model, seed=config.run.seed, std=config.model.init_std, num_layers=config.model.num_layers)
        chunks.append(model.to(device.taken()))
    return chunks


@contextlib.contextmanager
def _quiet_layers() -> Iterator[None]:
    """Suppress megatron-core's warning 'Unknown MLP type', which it prints for every layer with groups of experts."""
    logger = logging.getLogger("megatron.core.transformer.transformer_layer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
