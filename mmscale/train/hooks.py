"""Hooks that run after a step: compare replicas, log figures, evaluate the held-out split."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.config import Config
from mmscale.data.stream.micro_batch import MicroBatch, slot_usage
from mmscale.errors import TrainingError
from mmscale.model.mixed_modal import means_over_layers
from mmscale.resilience.anomaly import AnomalyKind
from mmscale.resilience.divergence import Diverged, find_diverged
from mmscale.runs.events import CUT_SHORT
from mmscale.runs.extents import Extent
from mmscale.runs.held_out import HeldOut, with_how, words_of
from mmscale.runtime.groups import from_first, gathered
from mmscale.tables.routings import Routing, measured_routings
from mmscale.train.log.flops_so_far import FlopsSoFar
from mmscale.train.log.metrics_log import MetricsLog
from mmscale.train.log.progress_lines import Progress
from mmscale.train.log.run_logs import RunLogs
from mmscale.train.loop import Hook
from mmscale.train.stage_state import StageState
from mmscale.train.steps.evaluation import CutShortError
from mmscale.train.steps.step import Steps
from mmscale.train.steps.step_report import StepReport, is_logged
from mmscale.train.throughput import Throughput

STILL_AFTER = 10  # steps in a row whose gradient is 0


class LogHook:
    """Fetches the routing metrics of a logged step from the devices and writes all metrics on rank 0.

    Args:
        config: which steps are logged.
        clock: tokens per second.
        progress: the terminal.
        metrics: metrics.jsonl; None on ranks other than 0.
        figures: returns the stage's own metrics of the step; called on every rank.
        more: returns metrics of saves and of slow ranks since the last call; called on rank 0.
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
        each = clock.flops_per_token
        self._flops = None if metrics is None or each is None else FlopsSoFar(metrics.folder, per_token=each)

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Reads from the device only on logged steps."""
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
            if self._flops is not None:
                of_step = sum(report.batch.counts)
                values["flops"] = self._flops.at(report.step, tokens=state.tokens, of_step=of_step)
            self.metrics.write(report.step, values)
            self.progress.update(report.step, values)

    def _routing(self, report: StepReport) -> dict[str, float]:
        """Routing metrics of the step, averaged over layers; what no token of the step has is left out.

        Stages hold different layers, replicas different tokens, and tensor-parallel ranks the same ones, which changes
        no mean.
        """
        assert report.stats is not None
        return means_over_layers(gathered(report.stats.read()))

    def _slots(self, micro_batches: tuple[MicroBatch, ...]) -> dict[str, float]:
        """Tokens over the nominal capacity and slots left empty, as shares of this rank's tokens.

        For `model.kind: moma` only. Empty if capacities follow the actual tokens, or tokens choose.
        """
        experts, names = self.config.model.experts, self.config.vocab.names
        if not self.config.model.per_modality or experts.share == "auto" or experts.capacity == "actual":
            return {}
        if experts.token_choice is not None:
            return {}  # layers report dropped tokens themselves
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
    """Compares the replicas of all parameters every n steps, before the state of that step is saved.

    Args:
        config: how often.
        stepper: holds the parameters.
        groups: which ranks hold replicas.
        clock: measures the comparison as a pause, not as a part of the step time.
        on_event: writes events.
    """

    def __init__(
        self,
        config: Config,
        *,
        stepper: Steps,
        groups: ProcessGroupCollection,
        clock: Throughput,
        on_event: Callable[..., None],
    ) -> None:
        self.every = config.resilience.parameter_hash_every
        self.stepper = stepper
        self.groups = groups
        self.clock = clock
        self.on_event = on_event

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Compare on due steps.

        Raises:
            TrainingError: a rank has diverged; the same on every rank.
        """
        if self.every == 0 or report.step % self.every:
            return
        with self.clock.measure("parameter_hash_s"), self.stepper.materialized():
            found = find_diverged(self.stepper.modules, self.groups)
        for rank in found:
            self.on_event(
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
                remedy="start again without that node: the run resumes from its last checkpoint",
            )


def _named(found: Sequence[Diverged]) -> str:
    sure = [rank for rank in found if rank.certain] or found
    ranks = ", ".join(f"rank {rank.rank} on {rank.host} ({_some(rank.parameters)})" for rank in sure)
    return ranks if sure[0].certain else f"one of these, unknown which: {ranks}"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


class EvalHook:
    """Evaluates held-out data every n steps and after the last one.

    Args:
        config: how often.
        evaluate: returns losses under a routing mode by name of the set; every rank calls it.
        clock: measures the evaluation as a pause, not as a part of the step time.
        progress: the terminal.
        metrics: metrics.jsonl; None on ranks other than 0.
        on_event: writes events, on rank 0.
        on_values: called with the step and all values by their keys, which are the same on every rank.
        extents: how much of a set is read, by the set's name.
    """

    def __init__(
        self,
        config: Config,
        *,
        evaluate: Callable[[Routing], dict[str, dict[str, float]]],
        clock: Throughput,
        progress: Progress,
        metrics: MetricsLog | None,
        on_event: Callable[..., None],
        on_values: Callable[[int, Mapping[str, float]], None],
        extents: Mapping[str, Extent],
    ) -> None:
        self.config = config
        self.on_values = on_values
        self.extents = extents
        self.evaluate = evaluate
        self.clock = clock
        self.progress = progress
        self.metrics = metrics
        self.on_event = on_event

    def due(self, step: int) -> bool:
        """Whether held-out data are evaluated after a step."""
        every = self.config.train.eval_every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Evaluate on due steps. A stop request can interrupt it; the next attempt then evaluates."""
        if not self.due(report.step):
            return
        try:
            self.measure(report.step)
        except CutShortError:
            self.on_event(CUT_SHORT, step=report.step)
            self.progress.say(f"step {report.step}: asked to stop; the evaluation follows when the run continues")

    def measure(self, step: int) -> None:
        """Held-out losses under batch routing, which uses later tokens, and under every causal routing of the model.

        Raises:
            CutShortError: a stop was requested; nothing is written.
        """
        with self.clock.measure("eval_s"):
            found = {routing: self.evaluate(routing) for routing in measured_routings(self.config.model)}
        everything: dict[str, float] = {}
        for routing, sets in found.items():
            for name, values in sets.items():
                keyed = {HeldOut(figure, routing, name).key: value for figure, value in values.items()}
                everything |= keyed
                if self.metrics is not None:
                    self.metrics.write(step, keyed)
                where = HeldOut("loss", routing, name)
                extent = str(self.extents.get(name, ""))
                line = held_out_line(where, values, routed=self.config.model.routes, extent=extent)
                self.progress.say(f"step {step}: {line}")
        self.on_values(step, from_first(everything))


def held_out_line(where: HeldOut, values: Mapping[str, float], *, routed: bool = True, extent: str = "") -> str:
    """Losses of one evaluation for the terminal.

    Args:
        where: the set and the routing mode.
        values: `loss`, `loss/<modality>`, `z_loss`.
        routed: whether the model routes; if not, no routing mode is named.
        extent: which part of the set was read, if not all.
    """
    shown = "  ".join(f"{figure} {value:.4f}" for figure, value in values.items() if figure != "z_loss")
    part = f"  ({extent})" if extent else ""
    return f"{with_how(words_of(where.name) or 'held-out', where.how(routed=routed))}  {shown}{part}"


def _anomalies(state: StageState) -> dict[str, float]:
    """Anomalies of the whole run: their number, and by kind how many occurred and what was done about them."""
    counts = state.anomalies.counts
    total = sum(counts.get(kind.value, 0) for kind in AnomalyKind)
    return {"anomalies": total, **{f"anomalies/{name}": count for name, count in sorted(counts.items())}}


class StillHook:
    """Warns once if the model does not learn: the gradient was 0 for many steps in a row.

    Args:
        on_event: writes events, on rank 0.
        warn: prints warnings for the user, on rank 0.
    """

    def __init__(self, *, on_event: Callable[..., None], warn: Callable[[str], None]) -> None:
        self.on_event = on_event
        self.warn = warn
        self.steps = 0

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Checks the gradient norm, which is on the host already."""
        self.steps = self.steps + 1 if report.result.grad_norm == 0.0 else 0
        if self.steps == STILL_AFTER:
            self.on_event("no_gradient", step=report.step, steps=self.steps)
            self.warn(
                f"warning: nothing is learned: the gradient was 0 in each of the last {self.steps} steps, up to step "
                f"{report.step}; look at the loss masks of the data, train.modality_weights and model.dropout"
            )


class PlaceHook:
    """Reports the end of every step, for fault injection.

    Args:
        at: called with the name of the place and the step.
    """

    def __init__(self, at: Callable[[str, int], None]) -> None:
        self.at = at

    def on_step(self, state: StageState, report: StepReport) -> None:
        """The step was applied and logged; the step boundary comes next."""
        self.at("step", report.step)


def common_hooks(
    config: Config,
    *,
    stepper: Steps,
    groups: ProcessGroupCollection,
    clock: Throughput,
    progress: Progress,
    logs: RunLogs,
    plugins: Hook,
    figures: Callable[[], dict[str, float]],
) -> list[Hook]:
    """The hooks that all stages have, in order.

    Args:
        config: of the stage.
        stepper: computes its steps.
        groups: process groups.
        clock: measures steps and pauses.
        progress: the terminal.
        logs: the run's files.
        plugins: plug-in hooks, which run before the step is logged.
        figures: returns metrics of saves and rank times, for logged steps.
    """
    return [
        ReplicaHook(config, stepper=stepper, groups=groups, clock=clock, on_event=logs.add_event),
        plugins,
        LogHook(config, clock=clock, progress=progress, metrics=logs.metrics, figures=stepper.figures, more=figures),
        StillHook(on_event=logs.add_event, warn=progress.say),
    ]
