"""layers.jsonl: the same figures whoever holds the layers and the tokens."""

from __future__ import annotations

from typing import Any

import pytest

from mmscale.config import Config
from mmscale.data.vocab import Vocabulary
from mmscale.model.mixed_modal import RoutingStats, means_over_layers
from mmscale.runtime import groups
from mmscale.train.assembly import build
from mmscale.train.log.layers_log import LayersHook
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import to_device
from mmscale.train.steps.step_report import StepReport
from tests.distributed import layouts
from tests.support import Ranks, distributed


class Written:
    """Takes what rank 0 writes."""

    def __init__(self) -> None:
        self.layers: dict[str, Any] = {}

    def write_layers(self, step: int, layers: dict[str, Any]) -> None:
        self.layers = layers


def figures_of(settings: Config, *, first: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """What the hook writes of one step of four micro-batches, and the step's own figures of routing."""
    parallel = settings.parallel
    pg = groups.initialize_layout(tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, seed=1)
    try:
        parts = build(settings, pg)
        share = settings.model.experts.share
        assert isinstance(share, dict)
        mixture, vocabulary = SyntheticMixture(settings, share=share), Vocabulary.from_config(settings.vocab)
        stats, written = RoutingStats(modalities=2), Written()
        numbers = range(pg.dp.rank(), 4, pg.dp.size())
        result = parts.stepper.train(
            [to_device(mixture.micro_batch(n), vocabulary, stats=stats) for n in numbers], lr=0.0
        )
        report = StepReport(step=1, batch=None, result=result, lr=0.0, stats=stats)  # type: ignore[arg-type]
        LayersHook(settings, groups=pg, metrics=written if first else None).on_step(None, report)  # type: ignore[arg-type]
        return written.layers, means_over_layers(groups.gathered(stats.read()))
    finally:
        groups.destroy_layout()


def flat(value: Any) -> list[float]:
    """All numbers in order."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    if isinstance(value, list):
        return [number for item in value for number in flat(item)]
    return [float(value)]


@distributed(world_size=4)
def test_layouts_write_the_same(ranks: Ranks) -> None:
    """Of four micro-batches a rank holds all, or each replica its own; a pipeline that recomputes sees them twice."""
    groups.start(ranks)

    def of(**parallel: Any) -> tuple[dict[str, Any], dict[str, float]]:
        settings = layouts.config("moma_depth", parallel=parallel, global_batch_size=8)
        return figures_of(settings, first=ranks.rank == 0)

    tensor = of(tp=2)
    others = {
        "stages": of(tp=2, pp=2),
        "chunks": of(pp=2, tp=2, vpp=2),
        "experts": of(tp=2, ep=2),
        "stages, recomputed": of(tp=2, pp=2, recompute="full"),
        "chunks, recomputed": of(pp=2, tp=2, vpp=2, recompute="full"),
        "experts, recomputed": of(tp=2, ep=2, recompute="selective", recompute_modules=["core_attn", "mlp"]),
    }
    if ranks.rank == 0:
        layers, step = tensor
        assert sorted(layers) == ["0", "1", "2", "3"] and len(flat(layers)) > 100 and len(step) > 8
        for name, (found, figures) in others.items():
            assert sorted(found) == sorted(layers), name
            assert flat(found) == pytest.approx(flat(layers), rel=1e-3), name
            assert figures == pytest.approx(step, rel=1e-3), name
        # The same layout computes the same, so nothing but rounding of sums may differ.
        for plain, again in (("stages", "stages, recomputed"), ("chunks", "chunks, recomputed")):
            assert flat(others[again][0]) == pytest.approx(flat(others[plain][0]), rel=2e-5), again
            assert others[again][1] == pytest.approx(others[plain][1], rel=1e-9), again
