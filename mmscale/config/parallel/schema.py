"""Settings of the layout over ranks, of recomputation and of overlap (`parallel`)."""

from __future__ import annotations

from typing import Literal

from mmscale.config.section import Count, Index, Section, setting


class ParallelConfig(Section):
    """The layout of model and batch over ranks. Data parallelism uses the ranks that the other dimensions leave."""

    tp: Count = setting("Tensor-parallel ranks; above 1 sequence parallelism is always on.", 1, unit="ranks")
    pp: Count = setting("Pipeline stages.", 1, unit="ranks")
    vpp: Count | None = setting("Model chunks per pipeline stage (interleaved schedule).", None, unit="chunks")
    pp_layers: tuple[Count, ...] | None = setting(
        "Layers of each pipeline stage; with vpp, of each chunk in the order of the model's layers. Default: equal "
        "numbers. A shorter first or last stage compensates for the embedding or the output layer.",
        None,
        unit="layers",
        source="mcore pipeline_model_parallel_layout",
    )
    ep: Count = setting(
        "Expert-parallel ranks, which share the experts of every group; if the number of experts is not divisible, "
        "some ranks have one expert less.",
        1,
        unit="ranks",
    )
    cp: Count = setting(
        "Context-parallel ranks, which share the tokens of every sequence. Experts and depth layers still choose among "
        "all of its tokens. Needs data.document_multiple.",
        1,
        unit="ranks",
    )
    cp_attention: Literal["gather", "ring"] = setting(
        "How attention gets the keys and values of other context-parallel ranks. gather: every rank gathers all of "
        "them. ring: Transformer-Engine sends them from rank to rank while it computes, and a rank keeps only its own; "
        "needs Transformer-Engine, bf16 and no Mixture-of-Depths.",
        "gather",
        source="mcore cp_comm_type",
    )
    recompute: Literal["none", "full", "selective"] = setting(
        "Recompute activations in the backward pass. full: whole layers; selective: the parts in recompute_modules.",
        "none",
    )
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = setting(
        "selective: parts to recompute. core_attn: attention between its projections; mlp: the feed-forward sub-layer, "
        "with experts and their exchange.",
        ("core_attn",),
        source="mcore recompute_modules",
    )
    loss_chunk: Index = setting(
        "Compute output layer and loss in chunks of this many tokens, so that logits exist only for one chunk at a "
        "time. The backward pass computes the logits again. 0: all tokens at once.",
        0,
        unit="tokens",
    )
    overlap_grad_reduce: bool | None = setting(
        "Reduce gradients during the backward pass; default: on with NCCL, off with gloo.", None
    )
    overlap_param_gather: bool | None = setting(
        "Gather updated parameters during the forward pass; default: the value of overlap_grad_reduce.", None
    )
    overlap_experts: bool = setting(
        "Exchange the tokens of each group separately, while other groups and shared experts compute; needs ep > 1.",
        False,
    )
    overlap_tensor: bool = setting(
        "Overlap tensor-parallel messages of attention with its products through Transformer-Engine's user buffers; "
        "needs tp > 1, model.backend=te and no Mixture-of-Depths.",
        False,
        source="mcore tp_comm_overlap",
    )
    overlap_p2p: bool | None = setting("Overlap pipeline sends with compute; default: when vpp is set.", None)
    batch_p2p: bool | None = setting("Batch pipeline sends and receives; default: when they are not overlapped.", None)
