"""Rules about the layout: how the model and the batch are spread over ranks.

Why a rule exists stands next to it; file names without a path are of megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config import derived
from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config


def _layout(config: Config) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.cp > 1:
        yield Problem(
            f"parallel.cp = {parallel.cp}: context parallelism is refused: expert choice and Mixture-of-Depths rank "
            "the tokens of whole sequences, which no rank would see",
            "use parallel.cp=1; parallel.tp splits long sequences as well",
        )
    if parallel.ep > 1 and config.model.kind == "dense":
        yield Problem(
            f"parallel.ep = {parallel.ep}, but model.kind = dense has no experts to spread", "use parallel.ep=1"
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
                "change one of them, or say with parallel.pp_layers how many layers each stage has",
            )
    elif len(parallel.pp_layers) != chunks or sum(parallel.pp_layers) != layers:
        yield Problem(
            f"parallel.pp_layers has {len(parallel.pp_layers)} numbers that sum to {sum(parallel.pp_layers)}; "
            f"parallel.pp * vpp = {parallel.pp} * {parallel.vpp or 1} stages and chunks hold model.num_layers = "
            f"{layers}",
            "give one number for each, or leave it at null",
        )
    yield from _pipeline_sends(config)


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
        # Batched, both neighbours are the same peer and messages match in the wrong order: silently wrong losses.
        yield Problem(
            "parallel.batch_p2p with parallel.pp = 2 and vpp mixes up the two directions to the only neighbour: "
            "losses are wrong",
            "leave parallel.overlap_p2p and parallel.batch_p2p at null",
        )


def world(config: Config, world_size: int) -> list[Problem]:
    """Violated rules about the number of ranks."""
    parallel, train = config.parallel, config.train
    model_ranks = parallel.tp * parallel.pp
    if world_size % model_ranks:
        cause = (
            f"parallel.tp * pp = {parallel.tp} * {parallel.pp} = {model_ranks} does not divide the {world_size} ranks"
        )
        return [Problem(cause, "`mmscale plan CONFIG --gpus N` lists layouts that do")]
    problems = []
    replicas = derived.data_parallel_size(config, world_size)
    if replicas % parallel.ep:
        cause = (
            f"parallel.ep = {parallel.ep} does not divide the {replicas} data-parallel ranks ({world_size} ranks / tp "
            f"* pp = {model_ranks}); experts are spread over data-parallel ranks"
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


RULES: tuple[Rule, ...] = (_layout,)
