"""Logs what every layer did with the tokens of a step: expert load and co-selection, depth selection, output norm.

Written to layers.jsonl at every `log.layers_every`-th logged step. Counts are those of all micro-batches of the
step, summed over ranks on the device and fetched once. Other steps are not affected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from numpy.typing import NDArray
from torch import Tensor

from mmscale.config import Config
from mmscale.runtime.groups import gathered
from mmscale.train.log.metrics_log import MetricsLog
from mmscale.train.stage_state import StageState
from mmscale.train.steps.step_report import StepReport

# A co-selection matrix has E^2 numbers for every layer; with more experts than this only their loads are written.
COSELECTION_UP_TO = 32
_DIGITS = 5


class LayersHook:
    """Adds up the counts of layers over ranks and writes them as fractions on rank 0; every rank has one.

    Args:
        config: names of modalities.
        groups: process groups: data-parallel ranks hold other tokens, pipeline stages other layers.
        metrics: the logs; None on ranks other than 0.
    """

    def __init__(self, config: Config, *, groups: ProcessGroupCollection, metrics: MetricsLog | None) -> None:
        self.names = config.vocab.names
        self.groups = groups
        self.metrics = metrics

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Runs only if the step's counts were collected by modality."""
        if report.stats is None or not report.stats.modalities:
            return
        found = self._summed(report.stats.counts)
        stages = gathered(found, group=self.groups.pp)
        if self.metrics is not None:
            whole = {key: counts for stage in stages for key, counts in stage.items()}
            self.metrics.write_layers(report.step, fractions(whole, self.names))

    def _summed(self, counts: Mapping[tuple[int, str], Tensor]) -> dict[tuple[int, str], NDArray[np.float64]]:
        """This stage's counts over all ranks; their keys and shapes are the same on all of them."""
        if not counts:
            return {}
        keys = sorted(counts)
        flat = torch.cat([counts[key].reshape(-1) for key in keys])
        # All tensor-parallel ranks count the same tokens in routers, but each counts only its own tokens in norms. Both
        # are correct, because only ratios of these sums are written.
        torch.distributed.all_reduce(flat, group=self.groups.tp_dp_cp)
        parts = np.split(flat.cpu().numpy(), np.cumsum([counts[key].numel() for key in keys])[:-1])
        return {key: part.reshape(counts[key].shape) for key, part in zip(keys, parts, strict=True)}


def fractions(counts: Mapping[tuple[int, str], NDArray[np.float64]], names: Sequence[str]) -> dict[str, Any]:
    """The content of layers.jsonl for every layer, from summed counts; a modality without tokens is omitted.

    Args:
        counts: by layer (from 1) and name, as layers report them to `RoutingStats.count`.
        names: of the modalities.

    Returns:
        By layer (from 0): `output_norm` {modality: mean norm of its hidden states after the layer}; `depth` {modality:
            fraction of its tokens that the layer processed}; `experts` {group: {modality: {`unrouted`: fraction of its
            tokens that no expert took, `load` [E]: tokens that each expert took over the modality's tokens, `gate` [E]:
            mean gate of those, `coselection` [E][E]: of the tokens that expert i took, the fraction that expert j took
            too}}}.
    """
    layers: dict[str, Any] = {}
    for (layer, name), values in sorted(counts.items()):
        entry = layers.setdefault(str(layer - 1), {})
        if name == "output_norm":
            sums, numbers = values
            entry[name] = {names[m]: _short(sums[m] / numbers[m]) for m in range(len(names)) if numbers[m] > 0}
        elif name == "depth":
            selected, total = values
            entry[name] = {names[m]: _short(selected[m] / total[m]) for m in range(len(names)) if total[m] > 0}
        else:
            _, group, modality = name.split("/")
            if values[0] > 0:
                entry.setdefault("experts", {}).setdefault(group, {})[names[int(modality)]] = _experts(values)
    return layers


def _experts(values: NDArray[np.float64]) -> dict[str, Any]:
    """Ratios from the sums of `routing.count_choices`."""
    experts = round((len(values) - 2 + 0.25) ** 0.5 - 0.5)  # E + E^2 = len - 2
    tokens, missed = values[:2]
    both = values[2 + experts :].reshape(experts, experts)
    taken = both.diagonal()
    at_least_one = np.maximum(taken, 1)
    found = {
        "unrouted": _short(missed / tokens),
        "load": _short(taken / tokens),
        "gate": _short(values[2 : 2 + experts] / at_least_one),
    }
    if 1 < experts <= COSELECTION_UP_TO:
        found["coselection"] = _short(both / at_least_one[:, None])
    return found


def _short(values: Any) -> Any:
    """Numbers rounded to the digits that a chart can show; NaN and infinity as strings, as in metrics.jsonl."""
    if isinstance(values, np.ndarray) and values.ndim:
        return [_short(value) for value in values]
    value = float(values)
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else str(value)
