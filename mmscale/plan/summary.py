"""Everything `mmscale plan` knows about a configuration, as plain data with stable keys.

Text is render.py's.
"""

from __future__ import annotations

from typing import Any

from mmscale.config import Config
from mmscale.config.derived import tokens_per_step
from mmscale.config.rules import check
from mmscale.plan.compute import flops_per_token
from mmscale.plan.layouts import RANKS_PER_NODE, USABLE, Layout, evaluate, layouts
from mmscale.plan.memory import state_bytes
from mmscale.plan.parameters import count_parameters

_SHOWN = 20


def plan(config: Config, gpus: int | None = None, gpu_memory: float | None = None) -> dict[str, Any]:
    """Arithmetic on a configuration.

    Args:
        config: a loaded configuration.
        gpus: devices; None: only the configuration's own layout, on as few ranks as it needs.
        gpu_memory: memory of a device [GiB].

    Returns:
        `model`, `parameters`, `flops_per_token`, `tokens_per_step`, `tokens`, `training_flops`, `checkpoint_bytes`,
        `gpus`, `gpu_memory_gib`, `layouts` (best first, at most 20 and the configuration's own), `layouts_possible`,
        `refused` (rule -> number of candidates) and `assumptions`.

    Raises:
        ConfigError: without `gpus`, the configuration's own layout violates a rule.
    """
    parameters, flops = count_parameters(config), flops_per_token(config)
    parallel = config.parallel
    refused: dict[str, int] = {}
    ranks = gpus
    if ranks is None:
        ranks = parallel.tp * parallel.pp * parallel.ep
        check(config, world_size=ranks)
        found = [evaluate(config, ranks, gpu_memory=gpu_memory)]
    else:
        found, refused = layouts(config, ranks, gpu_memory=gpu_memory)
    tokens = tokens_per_step(config) * config.train.steps
    return {
        "model": {
            "kind": config.model.kind,
            "num_layers": config.model.num_layers,
            "hidden_size": config.model.hidden_size,
            "experts": dict(config.model.experts.counts),
            "depth_layers": sum(map(config.model.is_depth_layer, range(config.model.num_layers))),
        },
        "parameters": parameters.as_dict(),
        "flops_per_token": flops.as_dict(),
        "tokens_per_step": tokens_per_step(config),
        "tokens": tokens,
        "training_flops": flops.training * tokens,
        "checkpoint_bytes": parameters.total * state_bytes(config),
        "gpus": ranks,
        "gpu_memory_gib": gpu_memory,
        "layouts": [_entry(layout, config) for layout in _shown(found, config)],
        "layouts_possible": len(found),
        "refused": dict(sorted(refused.items(), key=lambda item: -item[1])),
        "assumptions": _assumptions(config),
    }


def _shown(found: list[Layout], config: Config) -> list[Layout]:
    """The best layouts, and the configuration's own wherever it stands."""
    own = [layout for layout in found[_SHOWN:] if layout.config.parallel == config.parallel]
    return found[:_SHOWN] + own


def _entry(layout: Layout, config: Config) -> dict[str, Any]:
    return layout.as_dict() | {"current": layout.config.parallel == config.parallel}


def _assumptions(config: Config) -> list[str]:
    lines = [
        "memory: attention keeps no score matrix; gradients are fp32; optimizer state is sharded over data-parallel "
        "ranks",
        f"order of layouts: round figures of a machine with {RANKS_PER_NODE} devices a node, nothing overlapped; not "
        "a prediction",
        f"a layout fits below {USABLE:.0%} of the device's memory",
    ]
    if config.model.kind == "moma" and config.model.experts.share == "auto":
        lines.append("model.experts.share is auto: equal shares are assumed until data is measured")
    return lines
