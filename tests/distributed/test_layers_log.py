"""layers.jsonl: the same figures whoever holds the layers and the tokens."""

from __future__ import annotations

from typing import Any

import pytest

from mmscale.config import Config
from mmscale.data.vocab import Vocabulary
from mmscale.model.mixed_modal import RoutingStats
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


def layers_of(settings: Config, *, first: bool) -> dict[str, Any]:
    """What the hook writes of one step of two micro-batches, one for each of two data-parallel ranks."""
    parallel = settings.parallel
    pg = groups.initialize_layout(tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, seed=1)
    try:
        parts = build(settings, pg)
        share = settings.model.experts.share
        assert isinstance(share, dict)
        mixture, vocabulary = SyntheticMixture(settings, share=share), Vocabulary.from_config(settings.vocab)
        stats, written = RoutingStats(modalities=2), Written()
        numbers = range(pg.dp.rank(), 2, pg.dp.size())
        result = parts.stepper.train(
            [to_device(mixture.micro_batch(n), vocabulary, stats=stats) for n in numbers], lr=0.0
        )
        report = StepReport(step=1, batch=None, result=result, lr=0.0, stats=stats)  # type: ignore[arg-type]
        LayersHook(settings, groups=pg, metrics=written if first else None).on_step(None, report)  # type: ignore[arg-type]
        return written.layers
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
    """Of two micro-batches a rank holds both, or each replica its own: the tokens of both are counted."""
    groups.start(ranks)

    def of(**parallel: int | None) -> dict[str, Any]:
        settings = layouts.config("moma_depth", parallel=parallel, global_batch_size=4)  # type: ignore[arg-type]
        return layers_of(settings, first=ranks.rank == 0)

    stages, chunks, tensor = of(tp=2, pp=2), of(pp=2, tp=2, vpp=2), of(tp=2)
    expert = of(tp=2, ep=2)
    if ranks.rank == 0:
        assert sorted(stages) == ["0", "1", "2", "3"] == sorted(tensor)
        assert flat(stages) == pytest.approx(flat(chunks), rel=1e-3)
        assert flat(tensor) == pytest.approx(flat(expert), rel=1e-3)
        assert len(flat(stages)) == len(flat(tensor)) > 100
        assert flat(stages) == pytest.approx(flat(tensor), rel=1e-3)
