"""The validation sets and tasks that a run is evaluated on besides its own data: lines for the start, and metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmscale.config import Config
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.leaks import leaks_of, still_as_read
from mmscale.data.prepared.manifest import HELD_OUT, Manifest, read_blend
from mmscale.data.prepared.named_tasks import having, named_tasks
from mmscale.data.prepared.prepared_with import differing, other_settings
from mmscale.data.prepared.tasks import TaskItem, replaced
from mmscale.data.prepared.tasks import identities_of as identities_of_tasks
from mmscale.data.prepared.validation import identities_of, read_validation
from mmscale.runs.recorded_leaks import FIELD
from mmscale.runs.recorded_preparation import as_field as preparation_field
from mmscale.runs.recorded_questions import Asked, as_field
from mmscale.train.learned_data import learned_sets, read_before
from mmscale.train.steps.task_scores import chance_of, describe


@dataclass(frozen=True)
class EvaluatedOn:
    """Validation sets and tasks.

    Attributes:
        lines: one for each, and notes on the data, printed at the start of the run.
        kept: `validation` and `tasks` in a checkpoint's metadata: names, and hashes of their content.
        start_fields: of the event of the start: `questions`, the number and the place of each task's questions;
            `guessing`, the accuracy of guessing for each task with choices; `leaks`, what held-out documents share with
            training documents; and `prepared_with`, settings of the data that are not the configuration's.
    """

    lines: list[str] = field(default_factory=list)
    kept: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    start_fields: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        config: Config,
        blend: Mapping[Path, Manifest],
        tasks: Mapping[str, Sequence[TaskItem]],
        origin: Mapping[str, Any] | None = None,
    ) -> EvaluatedOn:
        """Make one from a configuration.

        Args:
            config: names sets and tasks.
            blend: the training data.
            tasks: the questions of each task of `train.tasks`.
            origin: `BuiltStage.origin`, with the metadata of the checkpoint that the stage begins from: the data of the
                main run that its weights are from counts as trained on.
        """
        sets = read_validation(config, blend)
        lines = [one.describe() for one in sets]
        asked: dict[str, Asked] = {}
        for name, place in named_tasks(config, blend).items():
            others = having(name, blend)[1:] if place in blend else having(name, blend)
            asked[name] = Asked(len(tasks[name]), str(place))
            lines.append(describe(name, tasks[name], place=place, others=others))
        chances = {name: chance for name, items in tasks.items() if (chance := chance_of(items)) is not None}
        own = dict(blend) | {one.folder: one.manifest for one in sets}
        learned, unknown = learned_sets(origin or {}, own)
        trained = {Path(one.path): blend[Path(one.path)] for one in config.data.sources if one.trained} | learned
        whole = {one.folder for one in sets if one.split != HELD_OUT}
        leaks = leaks_of(trained, own, whole=whole) + unknown
        lines += [f"note: {line}" for line in (*leaks, *other_settings(config))]
        kept = {"validation": identities_of(sets), "tasks": identities_of_tasks(tasks)}
        fields = as_field(asked) | ({"guessing": chances} if chances else {})
        return cls(lines, kept, fields | ({FIELD: leaks} if leaks else {}) | preparation_field(differing(config)))

    def with_earlier(self, config: Config, stream: Sequence[Mapping[str, Any]]) -> EvaluatedOn:
        """The same, with what held-out documents share with data that earlier attempts read and this one does not.

        Args:
            config: as for `of`.
            stream: settings of the order of the data so far, as checkpoints keep them.
        """
        read = read_before(stream)
        if not read:
            return self
        blend = read_blend(config)
        folders = [Path(one.path) for one in config.data.sources if one.trained]
        now = {identity_of(folder, blend[folder]) for folder in folders}
        sets = read_validation(config, blend)
        own = dict(blend) | {one.folder: one.manifest for one in sets}
        dropped, unknown = still_as_read(((path, (one,)) for path, one in read if one not in now), own)
        whole = {one.folder for one in sets if one.split != HELD_OUT}
        leaks = leaks_of(dropped, own, whole=whole) + unknown
        if not leaks:
            return self
        fields = self.start_fields | {FIELD: [*self.start_fields.get(FIELD, ()), *leaks]}
        return replace(self, lines=[*self.lines, *(f"note: {line}" for line in leaks)], start_fields=fields)

    def changed(self, info: Mapping[str, Any]) -> list[str]:
        """One line for each task whose questions have changed since a checkpoint was written.

        `mmscale.train.preflight.check_changes` compares validation sets.

        Args:
            info: the checkpoint's metadata.
        """
        return replaced(info.get("tasks", ()), self.kept["tasks"])
