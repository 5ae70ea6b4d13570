"""The complete plan of a configuration as plain data with stable keys; render.py converts it to text."""

from __future__ import annotations

from typing import Any

from mmscale.config import Config
from mmscale.config.derived import least_ranks, tokens_per_step
from mmscale.config.precision.fp8 import roundings
from mmscale.config.rules import check, violations
from mmscale.plan.activations import Kernels, on_gpu
from mmscale.plan.cluster_load import STORAGE_GB_S, cluster_load
from mmscale.plan.compute import flops_per_token
from mmscale.plan.layouts import USABLE, Layout, evaluate
from mmscale.plan.measured import figures_of
from mmscale.plan.memory import checkpoint_bytes
from mmscale.plan.parameters import count_parameters
from mmscale.plan.search import Search, is_own, search
from mmscale.plan.step_law import suggest
from mmscale.plan.timing import assumptions
from mmscale.tables.gpus import DEFAULT, Gpu

_SHOWN = 20


def plan(
    config: Config,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    gpu: str | None = None,
    *,
    storage_gb_s: float = STORAGE_GB_S,
) -> dict[str, Any]:
    """The plan of a configuration.

    Args:
        config: a loaded configuration.
        gpus: devices; None: only the configuration's own layout, on as few ranks as it needs.
        gpu_memory: memory of a device [GiB]; None: the GPU's, or unknown with neither `gpu` nor `gpus`.
        gpu: device whose figures times are computed with, by name or file of `mmscale bench calibrate`; None: h100.
        storage_gb_s: bandwidth of the shared file system [GB/s].

    Returns:
        `model`, `parameters`, `flops_per_token`, `tokens_per_step`, `tokens`, `training_flops`, `checkpoint_bytes`,
        `gpus`, `gpu`, `gpu_by_default` (nobody named it), `gpu_memory_gib`, `layouts` (the fastest VPP, recompute and
        micro-batch of each TP x PP x CP x EP, at most 20, the fastest of each CP, and the configuration's own; fastest
        first), `duration` of the whole training in the first layout (`days`, `gpu_hours`; null if none fits),
        `layouts_possible`, `layouts_tried`,
        `refused` (cause -> number of candidates), `rejected` (the same with an example each), `own_layout_refused`
        (cause or null), `step_law`, `cluster` (the run's load on file system and scheduler) and `assumptions`.

    Raises:
        ConfigError: without `gpus`, the configuration's own layout violates a rule.
        UsageError: no figures of the GPU.
    """
    figures = figures_of(gpu or DEFAULT)
    if gpu_memory is None and (gpu is not None or gpus is not None):
        gpu_memory = figures.memory
    parameters, flops = count_parameters(config), flops_per_token(config)
    ranks, refused_own = gpus, None
    if ranks is None:
        ranks = least_ranks(config)
        check(config, world_size=ranks)
        found = Search([evaluate(config, ranks, gpu_memory=gpu_memory, gpu=figures)], tried=1)
    else:
        found = search(config, ranks, gpu_memory=gpu_memory, gpu=figures)
        problems = violations(config, world_size=ranks)
        refused_own = problems[0].cause if problems else None
    tokens = tokens_per_step(config) * config.train.steps
    return {
        "model": {
            "name": config.run.name,
            "kind": config.model.kind,
            "num_layers": config.model.num_layers,
            "hidden_size": config.model.hidden_size,
            "ffn_hidden_size": config.model.ffn_hidden_size,
            "seq_length": config.model.seq_length,
            "experts": dict(config.model.experts.counts),
            "depth_layers": sum(map(config.model.is_depth_layer, range(config.model.num_layers))),
        },
        "parameters": parameters.as_dict(),
        "flops_per_token": flops.as_dict(),
        "tokens_per_step": tokens_per_step(config),
        "tokens": tokens,
        "training_flops": flops.training * tokens,
        "checkpoint_bytes": checkpoint_bytes(config, parameters),
        "gpus": ranks,
        "gpu": figures.name,
        "gpu_by_default": gpu is None,
        "gpu_memory_gib": gpu_memory,
        "layouts": [_entry(layout, config) for layout in _shown(found.layouts, config)],
        "duration": _duration(found.layouts, tokens, ranks),
        "layouts_possible": sum(layout.fits is not False for layout in found.layouts),
        "layouts_tried": found.tried,
        "refused": {rejected.cause: rejected.count for rejected in found.rejected.values()},
        "rejected": [rejected.as_dict() for rejected in found.rejected.values()],
        "own_layout_refused": refused_own,
        "step_law": suggest(config, parameters).as_dict(),
        "cluster": cluster_load(config, ranks, per_node=figures.per_node, storage_gb_s=storage_gb_s).as_dict(),
        "assumptions": _assumptions(config, figures),
    }


def _shown(found: list[Layout], config: Config) -> list[Layout]:
    """The fastest of each TP x PP x CP x EP; also the fastest of each CP, and the configuration's own."""
    best: dict[tuple[int, int, int, int], Layout] = {}
    for layout in found:
        parallel = layout.config.parallel
        best.setdefault((parallel.tp, parallel.pp, parallel.cp, parallel.ep), layout)
    kept = list(best.values())[:_SHOWN]
    of_context: dict[int, Layout] = {}
    for layout in best.values():
        of_context.setdefault(layout.config.parallel.cp, layout)
    kept += [layout for layout in of_context.values() if layout not in kept]
    kept += [layout for layout in found if is_own(layout, config) and layout not in kept]
    return sorted(kept, key=lambda layout: (layout.fits is False, layout.cost))


def _duration(found: list[Layout], tokens: int, ranks: int) -> dict[str, float] | None:
    """Duration of the whole training in the fastest layout that fits."""
    fits = [layout for layout in found if layout.fits is not False]
    if not fits:
        return None
    fastest = min(fits, key=lambda layout: layout.cost)
    seconds = tokens / fastest.tokens_per_second
    return {"days": seconds / 86_400, "gpu_hours": ranks * seconds / 3600}


def _entry(layout: Layout, config: Config) -> dict[str, Any]:
    return layout.as_dict() | {"current": is_own(layout, config)}


def _assumptions(config: Config, gpu: Gpu) -> list[str]:
    kernels = {
        Kernels.TE: "Transformer-Engine's attention, which needs no mask (model.backend=torch plans without it)",
        Kernels.CUDA: "torch's attention with one mask for each micro-batch",
    }[on_gpu(config)]
    lines = [
        "memory: tensors at the fullest moment, fp32 gradients, optimizer sharded over data-parallel ranks, "
        f"{kernels}; a layout fits below {USABLE:.0%} of the device's memory",
        "times are for ranking layouts and were not fitted to any run: differences of a few percent mean nothing",
        *assumptions(gpu, config),
    ]
    if config.model.per_modality and config.model.experts.share == "auto":
        lines.append("model.experts.share is auto: equal shares are assumed until data is measured")
    if config.precision.fp8 != "off":
        lines.append("FP8: memory counts activations and weights in bf16; time counts casts, of weights once a step")
    if config.precision.fp8 == "nvfp4":
        lines.append("NVFP4: time counts products at FP8's rate")
    return lines + roundings(config)
