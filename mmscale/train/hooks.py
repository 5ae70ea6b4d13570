"""What happens after a step: replicas are compared, figures are logged, the held-out split is evaluated."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.config import Config
from mmscale.data.mixture import MicroBatch, slot_usage
from mmscale.errors import TrainingError
from mmscale.model.mixed_modal import Routing
from mmscale.resilience.anomaly import Kind
from mmscale.resilience.divergence import Diverged, find_diverged
from mmscale.train.evaluate import CutShortError
from mmscale.train.held_out import HeldOut
from mmscale.train.loop import StepReport, is_logged
from mmscale.train.metrics import CUT_SHORT, MetricsLog
from mmscale.train.progress import Progress
from mmscale.train.state import StageState
from mmscale.train.step import Steps
from mmscale.train.throughput import Throughput

STILL_AFTER = 10  # steps in a row whose gradient is 0


class LogHook:
    """Fetches a logged step's routing figures from the devices and writes all figures down on rank 0.

    Args:
        config: which steps are logged.
        clock: tokens per second.
        progress: the terminal.
        metrics: metrics.jsonl; None on ranks other than 0.
        figures: what the stage itself knows of the step; every rank asks.
        more: figures of others, of saves and of slow ranks, since the last call; rank 0 asks.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Throughput,
        progress: Progress,
        metrics: MetricsLog | None,
        figures: Callable[[], dict[str, float]],
        more: Callable[[], dict[str, float]],
    ) -> None:
        self.figures = figures
        self.more = more
        self.config = config
        self.clock = clock
        self.progress = progress
        self.metrics = metrics

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Nothing is read from the device on a step that is not logged."""
        if not is_logged(self.config, report.step):
            self.progress.step(report.step)
            return
        values = report.result.losses | self._routing(report) | self.figures()
        if self.metrics is not None:
            values |= {
                "time": round(time.time(), 3),
                "tokens": state.tokens,
                **{f"tokens/{name}": count for name, count in state.modality_tokens.items()},
                "grad_norm": report.result.grad_norm,
                "lr": report.lr,
                **self._slots(report.batch.micro_batches),
                **self.clock.read(),
                **self.more(),
                **_anomalies(state),
            }
            if self.clock.flops_per_token is not None:
                values["flops"] = state.tokens * self.clock.flops_per_token
            self.metrics.write(report.step, values)
            self.progress.update(report.step, values)

    def _routing(self, report: StepReport) -> dict[str, float]:
        """Routing figures, averaged over layers and ranks: stages hold other layers, replicas other tokens."""
        assert report.stats is not None
        mine = {name: float(value) for name, value in report.stats.means().items()}
        gathered: list[dict[str, float] | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, mine)
        found: dict[str, list[float]] = {}
        for figures in gathered:
            for name, value in (figures or {}).items():
                found.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in sorted(found.items())}

    def _slots(self, micro_batches: tuple[MicroBatch, ...]) -> dict[str, float]:
        """Tokens over the nominal capacity and slots left empty, as shares of this rank's tokens; moma only.

        Capacities that follow the actual tokens have neither.
        """
        experts, names = self.config.model.experts, self.config.vocab.names
        if self.config.model.kind != "moma" or experts.share == "auto" or experts.capacity == "actual":
            return {}
        length, rows = self.config.model.seq_length, self.config.train.micro_batch_size
        scope = length if experts.scope == "sequence" else length * rows
        nominal = tuple(round(experts.capacity_factor * experts.share[name] * scope) for name in names)
        usage = [slot_usage(batch, nominal=nominal, scope=experts.scope) for batch in micro_batches]
        tokens = length * rows * len(micro_batches)
        values = {}
        for index, name in enumerate(names):
            values[f"experts/{name}/overflow_fraction"] = sum(u.overflow[index] for u in usage) / tokens
            values[f"experts/{name}/unused_fraction"] = sum(u.unused[index] for u in usage) / tokens
        return values


class ReplicaHook:
    """Compares the replicas of all parameters every n steps, before anything of that step is saved.

    Args:
        config: how often.
        stepper: holds the parameters.
        groups: who holds replicas.
        clock: comparing is a pause, not a part of the step time.
        tell: events.
    """

    def __init__(
        self,
        config: Config,
        *,
        stepper: Steps,
        groups: ProcessGroupCollection,
        clock: Throughput,
        tell: Callable[..., None],
    ) -> None:
        self.every = config.resilience.parameter_hash_every
        self.stepper = stepper
        self.groups = groups
        self.clock = clock
        self.tell = tell

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Nothing on other steps.

        Raises:
            TrainingError: a rank has diverged; the same on every rank.
        """
        if self.every == 0 or report.step % self.every:
            return
        with self.clock.measure("parameter_hash_s"), self.stepper.settled():
            found = find_diverged(self.stepper.modules, self.groups)
        for rank in found:
            self.tell(
                "diverged_rank",
                step=report.step,
                rank=rank.rank,
                host=rank.host,
                certain=rank.certain,
                parameters=rank.parameters[:10],
                parameters_total=len(rank.parameters),
            )
        if found:
            raise TrainingError(
                f"step {report.step}: parameters differ from their replicas on {_named(found)}",
                remedy="start again without that node: the run goes on from its last checkpoint",
            )


def _named(found: Sequence[Diverged]) -> str:
    sure = [rank for rank in found if rank.certain] or found
    ranks = ", ".join(f"rank {rank.rank} on {rank.host} ({_some(rank.parameters)})" for rank in sure)
    return ranks if sure[0].certain else f"one of these, and nobody can tell which: {ranks}"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


class EvalHook:
    """Evaluates held-out data every n steps and after the last one.

    Args:
        config: how often.
        evaluate: gives losses under a routing by name of the set; every rank calls it.
        clock: evaluation is a pause, not a part of the step time.
        progress: the terminal.
        metrics: metrics.jsonl; None on ranks other than 0.
        tell: events, on rank 0.
    """

    def __init__(
        self,
        config: Config,
        *,
        evaluate: Callable[[Routing], dict[str, dict[str, float]]],
        clock: Throughput,
        progress: Progress,
        metrics: MetricsLog | None,
        tell: Callable[..., None],
    ) -> None:
        self.config = config
        self.evaluate = evaluate
        self.clock = clock
        self.progress = progress
        self.metrics = metrics
        self.tell = tell

    def due(self, step: int) -> bool:
        """Whether the split is evaluated after a step."""
        every = self.config.train.eval_every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Nothing on other steps. A request to stop is heard within; the next attempt evaluates then."""
        if not self.due(report.step):
            return
        try:
            self.measure(report.step)
        except CutShortError:
            self.tell(CUT_SHORT, step=report.step)
            self.progress.say(f"step {report.step}: asked to stop; the evaluation is made when the run goes on")

    def measure(self, step: int) -> None:
        """Held-out losses under batch routing, which sees the future, and under every causal one that the model has.

        Raises:
            CutShortError: ranks were asked to stop; nothing is written.
        """
        with self.clock.measure("eval_s"):
            found = {routing: self.evaluate(routing) for routing in routings_of(self.config)}
        for routing, sets in found.items():
            for name, values in sets.items():
                if self.metrics is not None:
                    keys = {figure: HeldOut(figure, routing, name).key for figure in values}
                    self.metrics.write(step, {keys[figure]: value for figure, value in values.items()})
                self.progress.say(f"step {step}: {held_out_line(name, routing, values)}")


def held_out_line(name: str, routing: str, values: Mapping[str, float]) -> str:
    """Losses of one evaluation for the terminal.

    Args:
        name: of the set, as in `HeldOut`.
        routing: who decided which experts take a token.
        values: `loss`, `loss/<modality>`, `z_loss`.
    """
    shown = "  ".join(f"{figure} {value:.4f}" for figure, value in values.items() if figure != "z_loss")
    return f"{f'validation {name}' if name else 'held-out'} ({routing} routing)  {shown}"


def routings_of(config: Config) -> list[Routing]:
    """Routings that the model being trained can be evaluated under: batch, and those that it learns."""
    found = [Routing.BATCH]
    if config.model.auxiliary_width is not None:
        found.append(Routing.CAUSAL)
    if config.model.keeps_thresholds:
        found.append(Routing.THRESHOLD)
    return found


def _anomalies(state: StageState) -> dict[str, float]:
    """Findings of the whole run, and by kind what was found and done."""
    counts = state.anomalies.counts
    total = sum(counts.get(kind.value, 0) for kind in Kind)
    return {"anomalies": total, **{f"anomalies/{name}": count for name, count in sorted(counts.items())}}


class StillHook:
    """Says once when nothing is learned: the gradient was 0 for many steps in a row.

    Args:
        tell: events, on rank 0.
        warn: what the user should read, on rank 0.
    """

    def __init__(self, *, tell: Callable[..., None], warn: Callable[[str], None]) -> None:
        self.tell = tell
        self.warn = warn
        self.steps = 0

    def on_step(self, state: StageState, report: StepReport) -> None:
        """The norm is on the host already."""
        self.steps = self.steps + 1 if report.result.grad_norm == 0.0 else 0
        if self.steps == STILL_AFTER:
            self.tell("no_gradient", step=report.step, steps=self.steps)
            self.warn(
                f"warning: nothing is learned: the gradient was 0 in each of the last {self.steps} steps, up to step "
                f"{report.step}; look at the loss masks of the data, train.modality_weights and model.dropout"
            )


class PlaceHook:
    """Tells that a step is done: faults are injected there.

    Args:
        at: is told the place and the step.
    """

    def __init__(self, at: Callable[[str, int], None]) -> None:
        self.at = at

    def on_step(self, state: StageState, report: StepReport) -> None:
        """The step was applied and logged; its border comes next."""
        self.at("step", report.step)
