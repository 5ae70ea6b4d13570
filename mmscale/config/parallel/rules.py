"""Rules about the layout of the model and the batch over ranks, about recomputation and about overlap.

A comment next to each rule gives its reason; file names without a path are of megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config import derived
from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config
from mmscale.tables.settings import LOSSES


def _layout(config: Config) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.ep > 1 and not config.model.has_experts:
        yield Problem(
            f"parallel.ep = {parallel.ep}, but model.kind = {config.model.kind} has no experts to spread",
            "use parallel.ep=1",
        )
    if parallel.vpp is not None and (parallel.pp == 1 or parallel.vpp == 1):
        yield Problem(
            f"parallel.vpp = {parallel.vpp} with parallel.pp = {parallel.pp}: interleaving needs two stages and two "
            "chunks of each",
            "use parallel.vpp=null or more stages and chunks",
        )
    chunks = parallel.pp * (parallel.vpp or 1)
    if parallel.pp_layers is None:
        if layers % chunks:
            yield Problem(
                f"model.num_layers = {layers} is not divisible by parallel.pp * vpp = {parallel.pp} * "
                f"{parallel.vpp or 1} = {chunks}",
                "change one of them, or set the number of layers of each stage with parallel.pp_layers",
            )
    elif len(parallel.pp_layers) != chunks or sum(parallel.pp_layers) != layers:
        yield Problem(
            f"parallel.pp_layers has {len(parallel.pp_layers)} numbers that sum to {sum(parallel.pp_layers)}; "
            f"parallel.pp * vpp = {parallel.pp} * {parallel.vpp or 1} stages and chunks hold model.num_layers = "
            f"{layers}",
            "give one number for each, or leave it at null",
        )
    yield from _pipeline_sends(config)


def _context(config: Config) -> Iterator[Problem]:
    parallel, model, cp = config.parallel, config.model, config.parallel.cp
    if cp == 1:
        return
    if config.data.document_multiple % (2 * cp):
        yield Problem(
            f"parallel.cp = {cp} with data.document_multiple = {config.data.document_multiple}: every document is cut "
            f"into 2 * cp = {2 * cp} equal pieces",
            f"set data.document_multiple to a multiple of {2 * cp}; it changes packing, so keep it for all layouts",
        )
    if model.seq_length % (2 * cp * parallel.tp):
        yield Problem(
            f"model.seq_length = {model.seq_length} is not divisible by 2 * parallel.cp * parallel.tp = "
            f"{2 * cp * parallel.tp}: sequences are split over context-parallel, then tensor-parallel ranks",
            "change one of them",
        )
    if model.depth is not None and derived.depth_tokens(config) % (2 * cp * parallel.tp):
        yield Problem(
            f"model.depth selects {derived.depth_tokens(config)} tokens of a sequence, which are split into 2 * "
            f"parallel.cp * parallel.tp = {2 * cp * parallel.tp} parts",
            f"make model.depth.multiple a multiple of {2 * cp * parallel.tp}",
        )
    if parallel.ep % cp and cp % parallel.ep:
        # Ranks of an exchange use as many slots as the fullest of them needs, and all ranks of a sequence must use the
        # same number.
        yield Problem(
            f"parallel.cp = {cp} with parallel.ep = {parallel.ep}: neither divides the other, so the ranks of a "
            "sequence would exchange tokens with different ranks' sequences",
            "make one of them a multiple of the other",
        )
    if derived.sends_keys_around(config):
        yield from _ring(config)


def _ring(config: Config) -> Iterator[Problem]:
    """What Transformer-Engine's context parallelism cannot do (dot_product_attention/context_parallel.py)."""
    model, precision = config.model, config.precision
    instead = "use parallel.cp_attention=gather"
    if model.depth is not None:
        yield Problem(
            "parallel.cp_attention = ring with model.depth: the ring cuts every document into 2 * parallel.cp pieces, "
            "and the tokens that a Mixture-of-Depths layer selects of a document have any number",
            instead,
        )
    if model.backend == "torch" or precision.emulated or model.untie:
        what = "model.backend = torch"
        if model.backend != "torch":
            what = "precision.fp8_emulate" if precision.emulated else "model.untie"
        yield Problem(f"parallel.cp_attention = ring with {what}: the ring is Transformer-Engine's", instead)
    if precision.dtype == "fp32":
        yield Problem(
            "parallel.cp_attention = ring with precision.dtype = fp32: Transformer-Engine's attention takes bf16",
            f"{instead}, or precision.dtype=bf16",
        )


def _pipeline_sends(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    overlap, batch = derived.overlap_p2p(config), derived.batch_p2p(config)
    if parallel.pp > 1 and overlap and parallel.vpp is None:
        yield Problem(
            "parallel.overlap_p2p needs interleaving (mcore's schedules.py refuses it)", "set parallel.vpp or drop it"
        )
    if overlap and batch:
        yield Problem(
            "parallel.overlap_p2p and parallel.batch_p2p exclude each other: batched sends wait for their receives",
            "set parallel.batch_p2p=false",
        )
    elif parallel.pp == 2 and parallel.vpp is not None and batch:
        # With batched messages and two stages both neighbours are the same peer, and messages are matched in the wrong
        # order: the losses would be silently wrong.
        yield Problem(
            "parallel.batch_p2p with parallel.pp = 2 and vpp mixes up the two directions to the only neighbour: "
            "losses are wrong",
            "leave parallel.overlap_p2p and parallel.batch_p2p at null",
        )


def world(config: Config, world_size: int) -> list[Problem]:
    """Violated rules about the number of ranks."""
    parallel, train = config.parallel, config.train
    model_ranks = parallel.tp * parallel.pp
    sequence_ranks = model_ranks * parallel.cp
    if world_size % sequence_ranks:
        names, sizes = "tp * pp", f"{parallel.tp} * {parallel.pp}"
        if parallel.cp > 1:
            names, sizes = f"{names} * cp", f"{sizes} * {parallel.cp}"
        cause = f"parallel.{names} = {sizes} = {sequence_ranks} does not divide the {world_size} ranks"
        return [Problem(cause, "`mmscale plan CONFIG --gpus N` lists layouts that do")]
    problems = []
    replicas, holders = derived.data_parallel_size(config, world_size), derived.dense_replicas(config, world_size)
    if holders % parallel.ep:
        kind = "data-parallel" if parallel.cp == 1 else "context- and data-parallel"
        cause = (
            f"parallel.ep = {parallel.ep} does not divide the {holders} {kind} ranks ({world_size} ranks / tp "
            f"* pp = {model_ranks}); experts are spread over {kind} ranks"
        )
        problems.append(Problem(cause, "`mmscale plan CONFIG --gpus N` lists layouts that do"))
    portion = train.micro_batch_size * replicas
    if train.global_batch_size % portion:
        cause = (
            f"train.global_batch_size = {train.global_batch_size} is not divisible by train.micro_batch_size * "
            f"data-parallel ranks = {train.micro_batch_size} * {replicas} = {portion}"
        )
        problems.append(Problem(cause, f"use a multiple of {portion}, or other numbers of ranks"))
    elif parallel.vpp is not None and derived.micro_batches_per_step(config, world_size) % parallel.pp:
        per_step = derived.micro_batches_per_step(config, world_size)
        cause = (
            f"the interleaved schedule (parallel.vpp) runs micro-batches in rounds of parallel.pp = {parallel.pp}; "
            f"{per_step} per step is not divisible"
        )
        problems.append(Problem(cause, "change train.global_batch_size or train.micro_batch_size"))
    return problems


def _recomputed(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.recompute != "selective":
        return
    if not parallel.recompute_modules:
        yield Problem(
            "parallel.recompute = selective with parallel.recompute_modules = []: nothing would be recomputed",
            "name core_attn, mlp or both, or use parallel.recompute=none",
        )
    if "mlp" in parallel.recompute_modules and config.model.experts.cuda_graph:
        yield Problem(
            "model.experts.cuda_graph with mlp in parallel.recompute_modules: graphs keep activations permanently, "
            "so recomputing experts would save no memory",
            "use parallel.recompute_modules=[core_attn], or model.experts.cuda_graph=false",
        )


def _loss_chunks(config: Config) -> Iterator[Problem]:
    if config.parallel.loss_chunk and config.train.loss not in LOSSES:
        yield Problem(
            f"parallel.loss_chunk with train.loss = {config.train.loss}: a plug-in gets the logits of all tokens",
            "use parallel.loss_chunk=0 or train.loss=cross_entropy",
        )


def _overlap(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.overlap_param_gather and parallel.overlap_grad_reduce is False:
        yield Problem(
            "parallel.overlap_param_gather needs parallel.overlap_grad_reduce: both work on the same buckets",
            "set parallel.overlap_grad_reduce=true",
        )
    if parallel.overlap_experts and parallel.ep == 1:
        yield Problem(
            "parallel.overlap_experts is set, but with parallel.ep = 1 no tokens are exchanged",
            "set parallel.ep or drop parallel.overlap_experts",
        )


def _user_buffers(config: Config) -> Iterator[Problem]:
    """Limits of Transformer-Engine's user buffers (transformer_engine/pytorch/module/base.py)."""
    parallel, model, precision = config.parallel, config.model, config.precision
    if not parallel.overlap_tensor:
        return
    if parallel.tp == 1:
        yield Problem(
            "parallel.overlap_tensor is set, but with parallel.tp = 1 there are no tensor-parallel messages",
            "set parallel.tp or drop parallel.overlap_tensor",
        )
    if model.backend == "torch":
        yield Problem(
            "parallel.overlap_tensor with model.backend = torch: the user buffers are Transformer-Engine's",
            "use model.backend=te or drop parallel.overlap_tensor",
        )
    elif precision.emulated:
        yield Problem(
            "parallel.overlap_tensor with precision.fp8_emulate: emulation runs in torch, and the user buffers are "
            "Transformer-Engine's",
            "drop one of them",
        )
    if precision.dtype == "fp32":
        yield Problem(
            "parallel.overlap_tensor with precision.dtype = fp32: user buffers hold bf16 or FP8",
            "use precision.dtype=bf16 or drop parallel.overlap_tensor",
        )
    if precision.fp8 in ("blockwise", "mxfp8", "nvfp4"):
        yield Problem(
            f"parallel.overlap_tensor with precision.fp8 = {precision.fp8}: user buffers carry no scales of blocks",
            "use precision.fp8=tensorwise or delayed, or drop parallel.overlap_tensor",
        )
    if model.depth is not None:
        yield Problem(
            "parallel.overlap_tensor with model.depth: user buffers have one shape for all layers, and "
            "Mixture-of-Depths layers send fewer tokens",
            "drop one of them",
        )


RULES: tuple[Rule, ...] = (
    _layout,
    _context,
    _recomputed,
    _loss_chunks,
    _overlap,
    _user_buffers,
)
