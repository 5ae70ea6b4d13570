"""Reports steps whose loss is far above the average of the steps before, and counts them."""

from __future__ import annotations

from mmscale.extend import HookRun, StageState, StepReport, TrainingHook


class Spikes(TrainingHook):
    """The hook.

    Args:
        run: what is trained.
        factor: a loss above this multiple of the average is a spike.
        decay: of the moving average, per step.
    """

    def __init__(self, run: HookRun, *, factor: float = 1.5, decay: float = 0.9) -> None:
        self.run, self.factor, self.decay = run, factor, decay
        self.average: float | None = None
        self.count = 0

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Losses are means over the whole batch, the same on every rank: all ranks count alike."""
        loss = report.result.losses["loss"]
        if self.average is not None and loss > self.factor * self.average:
            self.count += 1
            self.run.add_event("loss_spike", step=report.step, loss=loss, average=self.average)
        self.average = loss if self.average is None else self.decay * self.average + (1.0 - self.decay) * loss

    def on_end(self, step: int, *, finished: bool) -> None:
        """Say how many there were."""
        self.run.say(f"{self.count} spikes of the loss in {step} steps")

    def figures(self) -> dict[str, float]:
        """`hooks/loss_spikes` in metrics.jsonl."""
        return {"loss_spikes": float(self.count)}
