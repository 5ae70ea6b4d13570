"""The results of a model card: each held-out number with its data, the part of them that was read, and its step.

Numbers come from the run's logs; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import EvalResult

from mmscale.config import Config
from mmscale.runs.events import read_events
from mmscale.runs.extents import Extent, extents_in
from mmscale.runs.held_out import ACCURACY, HeldOut, words_of
from mmscale.runs.metrics import read_metrics
from mmscale.runs.recorded_questions import Asked, questions_in
from mmscale.train.stages.origin import folder_of
from mmscale.train.stages.stage_report import StageReport, report_of
from mmscale.train.steps.task_scores import Score

_TYPES = {"accuracy": "accuracy", "bits_per_byte": "bits_per_byte"}  # metric_type by kind of figure; others are losses


@dataclass(frozen=True)
class Result:
    """A number of a model card.

    Attributes:
        where: what was measured.
        step: of the checkpoint that was measured.
        value: the number.
        extent: the part of the set that was read; None: unknown, or questions.
        asked: the questions of a task; None: unknown, or no task.
    """

    where: HeldOut
    step: int
    value: float
    extent: Extent | None = None
    asked: Asked | None = None

    @property
    def task(self) -> str:
        """The task whose accuracy this is; "": it is no accuracy."""
        return self.where.figure.removeprefix(ACCURACY) if self.where.figure.startswith(ACCURACY) else ""

    @property
    def data(self) -> str:
        """The data in words: `held-out split, first 2 of 24 batches`, `23 questions of names.jsonl`."""
        if self.task:
            asked = self.asked
            return f"questions of {self.task}" if asked is None else f"{asked.number:,} questions of {asked.place}"
        part = "" if self.extent is None else str(self.extent)
        return ", ".join(filter(None, (words_of(self.where.name) or "held-out split", part)))

    @property
    def shown(self) -> str:
        """The number, of an accuracy with its 95 % interval."""
        if self.asked is None:
            return f"{self.value:.4f}"
        score = Score(round(self.value * self.asked.number), self.asked.number, None)
        return "{:.4f} (95 %: {:.4f} to {:.4f})".format(self.value, *score.interval)

    def named(self, config: Config) -> str:
        """`loss per text token, causal routing`; models without routing have no routing to name."""
        how = self.where.how(routed=config.model.routes)
        return f"{self.where.measure}, {how}" if how else self.where.measure

    def for_hub(self, config: Config, *, task_type: str) -> EvalResult:
        """The entry in the card's model-index. The Hub groups results of one type and split as one data set."""
        others = words_of(self.where.name) or "held-out split of the training data"
        return EvalResult(
            task_type=task_type,
            dataset_type=f"task {self.task}" if self.task else self.where.name or "held-out",
            dataset_name=self.data if self.task else others,
            dataset_split=str(self.extent or "") or None,
            metric_type=_TYPES.get(self.where.figure.partition("/")[0], "loss"),
            metric_name=self.named(config),
            metric_value=round(self.value, 4),
        )


def measured(run: Path, step: int) -> list[Result]:
    """The last results up to a step, sorted. If the stage trained routers for this checkpoint, its values are used.

    Args:
        run: the run's folder.
        step: of the exported checkpoint.
    """
    events = read_events(run)
    extents, questions = extents_in(events), questions_in(events)
    found: dict[HeldOut, Result] = {}
    for record in read_metrics(run):
        if record["step"] > step:
            continue
        attempt = record.get("attempt", 0)
        for key, value in record.items():
            where = HeldOut.of(key)
            if isinstance(value, float) and where is not None:
                result = Result(where, record["step"], value)
                found[where] = _with_data(result, extents.get(attempt, {}), questions.get(attempt, {}))
    report = report_of(run)
    if report is not None and report.main_step == step:
        routed = _of_stage(run, report)
        routings = {one.routing for one in routed}
        found = {where: one for where, one in found.items() if where.routing not in routings} | routed
    # The z-loss is no measure of quality.
    return [found[where] for where in sorted(found, key=lambda one: one.key) if where.figure != "z_loss"]


def _of_stage(run: Path, report: StageReport) -> dict[HeldOut, Result]:
    """Results with the routers of the auxiliary stage."""
    events = read_events(folder_of(run))
    extents, questions = extents_in(events), questions_in(events)
    own = extents[max(extents)] if extents else {}
    asked = questions[max(questions)] if questions else {}
    results = [Result(replace(where, stage=""), report.main_step, value) for where, value in report.causal().items()]
    return {one.where: _with_data(one, own, asked) for one in results}


def _with_data(result: Result, extents: Mapping[str, Extent], questions: Mapping[str, Asked]) -> Result:
    if result.task:
        return result if result.where.name else replace(result, asked=questions.get(result.task))
    return replace(result, extent=extents.get(result.where.name))
