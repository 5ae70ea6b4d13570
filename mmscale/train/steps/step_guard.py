"""Takes steps under the anomaly policy: computes, decides, then applies, replays, skips, rolls back or gives up.

resilience/anomaly.py decides. run.py passes the functions that load a checkpoint and move the data stream.

A NaN cannot occur on one rank only: norm and losses are the result of one reduction over all ranks (optimizer.py,
`measure`), so all ranks decide alike, and a healthy step needs no further collective or wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from mmscale.config import Config
from mmscale.data.stream.loader import StepBatch
from mmscale.errors import TrainingError
from mmscale.resilience.anomaly import AnomalyKind, AnomalyPolicy, StepAction, StepDecision
from mmscale.runtime import random_state
from mmscale.train.stage_state import StageState
from mmscale.train.steps.batch import Batch
from mmscale.train.steps.step import StepResult, Steps


class OnEvent(Protocol):
    """Writes an event into events.jsonl, on rank 0."""

    def __call__(self, event: str, **fields: Any) -> None:
        """Called on every rank."""


class StepGuard:
    """Applies a step to the weights only if it looks right.

    Args:
        config: the policy's settings, the batch size.
        state: progress of the run; its history of losses is used and updated.
        stepper: computes and applies.
        load_newest: loads the newest intact checkpoint into the state; returns its step, or None if there is none yet.
        seek: moves the stream of batches to this number of consumed sequences.
        on_event: writes events.
        warn: prints lines on the terminal.
        optim: name of the settings of the stage's optimizer.
    """

    def __init__(
        self,
        config: Config,
        *,
        state: StageState,
        stepper: Steps,
        load_newest: Callable[[], int | None],
        seek: Callable[[int], None],
        on_event: OnEvent,
        warn: Callable[[str], None],
        optim: str = "optim",
    ) -> None:
        self.optim = optim
        self.config = config
        self.state = state
        self.stepper = stepper
        self.load_newest = load_newest
        self.seek = seek
        self.on_event = on_event
        self.warn = warn
        self.policy = AnomalyPolicy(config.resilience.anomaly, largest_norm=config.optim.grad_norm_skip_threshold)

    def take(self, batch: StepBatch, on_device: Callable[[], list[Batch]], *, lr: float) -> StepResult:
        """Take one step.

        If it is not applied, the weights are unchanged or those of a checkpoint, and the state is adjusted.

        Args:
            batch: the global batch.
            on_device: makes this rank's part of it; called again for a replay.
            lr: learning rate of the step.

        Raises:
            TrainingError: the policy's budget is used up; on every rank, with unchanged weights.
        """
        # Captured before every step: when a NaN shows up, dropout has already advanced the generators. A few kB on the
        # host.
        drawn = random_state.capture()
        result, decision = self._attempt(on_device, lr=lr, replayed=False)
        if decision.action is StepAction.REPLAY:
            first = decision
            random_state.restore(drawn)
            result, decision = self._attempt(on_device, lr=lr, replayed=True)
            if all(finding.kind is not AnomalyKind.NONFINITE for finding in decision.findings):
                self._report("fault_transient", first, "gone when the batch was computed again: a fault of hardware")
        if decision.action is StepAction.APPLY and decision.findings:
            self._report("spike", decision, "the step is taken")
        if decision.action is StepAction.GIVE_UP:
            self._give_up(decision)
        if decision.action is StepAction.SKIP:
            random_state.restore(drawn)  # the run continues as if the batch had not existed
            self._skip(batch, decision, "the batch is left out")
        if decision.action is StepAction.ROLL_BACK:
            self._roll_back(batch, decision, drawn)
        return result

    def _attempt(
        self, on_device: Callable[[], list[Batch]], *, lr: float, replayed: bool
    ) -> tuple[StepResult, StepDecision]:
        """Compute the step, decide, and apply it if the policy allows that."""
        computed = self.stepper.compute(on_device())
        decision = self.policy.judge(self.state.anomalies, computed.figures, replayed=replayed)
        if decision.action is not StepAction.APPLY:
            return computed, decision
        return self.stepper.apply(computed, lr=lr), decision

    def _skip(self, batch: StepBatch, decision: StepDecision, what: str) -> None:
        start, end = self._span()
        self._report("skip", decision, what, micro_batch=batch.index, sequences=[start, end])
        self.state.anomalies.skip(start, end)
        self.state.sequences = end

    def _roll_back(self, batch: StepBatch, decision: StepDecision, drawn: dict[str, Any]) -> None:
        """PaLM's rule: skip the present batch and the data of the discarded steps, because they led to the spike."""
        state, (_, spiked) = self.state, self._span()
        step, happened = state.step + 1, state.anomalies
        found = self.load_newest()
        if found is None:
            random_state.restore(drawn)
            self._skip(batch, decision, "the batch is left out: there is no checkpoint to go back to yet")
            return
        happened.rolled_back_to(state.anomalies, step=state.step)
        state.anomalies = happened
        start = state.sequences
        end = max(spiked, start + self.config.resilience.anomaly.skip_window * self.config.train.global_batch_size)
        happened.skip(start, end)
        state.sequences = end
        self.seek(end)
        self._report(
            "rollback",
            decision,
            f"back to the checkpoint of step {found}, sequences {start} to {end} are left out",
            at=step,
            to=found,
            number=happened.counts[StepAction.ROLL_BACK.value],
            sequences=[start, end],
        )

    def _give_up(self, decision: StepDecision) -> None:
        anomaly, broken = self.config.resilience.anomaly, decision.findings[0].kind is AnomalyKind.NONFINITE
        limit = f" or {self.optim}.grad_norm_skip_threshold" if decision.findings[0].kind is AnomalyKind.LIMIT else ""
        again = "; the batch gave the same when it was computed again" if broken else ""
        raise TrainingError(
            f"step {self.state.step + 1}: {decision.reason}{again}, and the budget of {anomaly.budget} skipped batches "
            "and roll-backs is spent (resilience.anomaly.budget)",
            remedy=f"lower {self.optim}.lr, raise {self.optim}.warmup, look at the batches that events.jsonl names, or "
            f"raise resilience.anomaly.budget{limit}; the last checkpoint is from before this step",
        )

    def _span(self) -> tuple[int, int]:
        """The range of sequences of the present batch."""
        return self.state.sequences, self.state.sequences + self.config.train.global_batch_size

    def _report(self, event: str, decision: StepDecision, what: str, *, at: int | None = None, **fields: Any) -> None:
        step = self.state.step + 1 if at is None else at
        figures = {finding.name: finding.value for finding in decision.findings}
        self.on_event(event, step=step, reason=decision.reason, **figures, **fields)
        self.warn(f"warning: step {step}: {decision.reason}; {what}")
