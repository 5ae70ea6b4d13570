"""Follows held-out values over a run: the best value so far, and how many evaluations ago that was.

Consequences: the best checkpoint is kept (`checkpoint.keep_best`), training ends early (`train.stop_when`), and the
user is warned when the held-out loss rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from mmscale.checkpoint.save_settings import BestCheckpoint
from mmscale.config import Config
from mmscale.runs.breaks import break_of
from mmscale.runs.done import describe_done
from mmscale.train.stage_state import HeldOutTrend
from mmscale.wording import numbered

LOSS = "eval/loss"  # followed in every run
RISING = 3  # the user is warned after so many evaluations in a row with a higher value than the one before


class Watched(Protocol):
    """The part of a stage's state that this module needs."""

    step: int
    watched: dict[str, HeldOutTrend]


class BestSaver(Protocol):
    """An object that saves and keeps the best checkpoint."""

    best: BestCheckpoint | None


class Watch:
    """Receives evaluations and decides their consequences. All methods return the same on every rank.

    Args:
        config: of the stage.
        state: stores the trends, so that an attempt continues the counts of the previous one.
        saver: is notified which checkpoint is the best one.
        on_event: writes events, on rank 0.
        say: prints lines on the terminal, on rank 0.
    """

    def __init__(
        self,
        config: Config,
        state: Watched,
        *,
        saver: BestSaver,
        on_event: Callable[..., None],
        say: Callable[[str], None],
    ) -> None:
        self.steps = config.train.steps
        self.stop_when = config.train.stop_when
        self.keep_best = config.checkpoint.keep_best
        self.state = state
        self.saver = saver
        self.on_event = on_event
        self.say = say
        # By figure: up to this step, values in checkpoints are not comparable with the present ones.
        self._anew_from: dict[str, int] = {}

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add an evaluation.

        Args:
            step: optimizer steps done.
            values: by the keys of metrics.jsonl, the same on every rank.
        """
        wanted = (LOSS, self.keep_best, None if self.stop_when is None else self.stop_when.metric)
        for name in dict.fromkeys(wanted):
            if name is not None and name in values:
                self.state.watched.setdefault(name, HeldOutTrend()).add(step, values[name])
        self.update_best()
        self._note_rising(step)

    def resume(self, changed: Sequence[str], *, parts: Collection[str] | None = None) -> None:
        """Continue the trends of the state, unless held-out values are not comparable any more.

        Args:
            changed: one line for each change since the checkpoint.
            parts: as for `break_of`.
        """
        found = break_of(changed, parts=parts)
        broken = [name for name in self.state.watched if found.breaks(name)]
        if broken:
            self._forget(broken)
            self._anew_from |= dict.fromkeys(broken, self.state.step)
            said = ", ".join(broken)
            self.say(f"changed: {', '.join(found.what)}: the best values of {said} are looked for again")
        self.update_best()

    def rolled_back(self) -> None:
        """The state was rolled back to an older checkpoint."""
        self._forget([name for name, step in self._anew_from.items() if self.state.step <= step])
        self.update_best()

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.state.watched.pop(name, None)

    def update_best(self) -> None:
        """Notify the saver which checkpoint is the best one."""
        metric = self.keep_best
        trend = None if metric is None else self.state.watched.get(metric)
        if metric is None or trend is None or not math.isfinite(trend.best):
            self.saver.best = None
        else:
            self.saver.best = BestCheckpoint(metric, trend.best_step, trend.best)

    def is_over(self) -> bool:
        """Whether nothing is left to train: the last step is done, or held-out values have not improved for long."""
        return self.state.step >= self.steps or self._ended_by() is not None

    def early_end(self) -> dict[str, Any]:
        """Why training ends before its last step, as fields of the event. Empty if the last step is done."""
        trend = self._ended_by()
        if self.state.step >= self.steps or trend is None or self.stop_when is None:
            return {}
        self.say(f"ended early after step {self.state.step}: {self._why(trend)}")
        found = {"metric": self.stop_when.metric, "patience": self.stop_when.patience}
        return found | {"best": trend.best, "best_step": trend.best_step}

    def describe_end(self, *, raised: str) -> str:
        """Why a run is over, and how to continue it.

        Args:
            raised: name of the setting with the number of steps, which the user can raise.
        """
        done, trend = f"{self.state.step} of {self.steps} steps", self._ended_by()
        if self.state.step >= self.steps or trend is None:
            return describe_done(step=self.state.step, steps=self.steps, raised=raised)
        remedy = "raise train.stop_when.patience or set train.stop_when=null to go on"
        return f"{done}, ended early: {self._why(trend)}; {remedy}"

    def _ended_by(self) -> HeldOutTrend | None:
        trend = None if self.stop_when is None else self.state.watched.get(self.stop_when.metric)
        patient = self.stop_when is None or trend is None or trend.since < self.stop_when.patience
        return None if patient else trend

    def _why(self, trend: HeldOutTrend) -> str:
        assert self.stop_when is not None
        since = numbered(trend.since, "evaluation")
        return f"{self.stop_when.metric} was lowest at step {trend.best_step} ({trend.best:.4f}), {since} ago"

    def _note_rising(self, step: int) -> None:
        trend = self.state.watched.get(LOSS)
        if trend is None or trend.step != step or trend.rising != RISING:
            return
        self.on_event("held_out_rising", step=step, metric=LOSS, evaluations=RISING, value=trend.last)
        self.say(
            f"note: step {step}: the held-out loss has risen in {RISING} evaluations in a row, to {trend.last:.4f}; "
            f"it was lowest at step {trend.best_step} ({trend.best:.4f}). The run may overfit its data{self._advice()}"
        )

    def _advice(self) -> str:
        """What to do when the held-out loss rises: the settings that are not set."""
        kept = "; checkpoint.keep_best keeps the best one" if self.keep_best else ""
        unset = [] if self.keep_best else ["checkpoint.keep_best"]
        unset += [] if self.stop_when is not None else ["train.stop_when"]
        see = f"see {' and '.join(unset)}"
        return kept + (f". S{see[1:]}" if kept and unset else f": {see}" if unset else "")
