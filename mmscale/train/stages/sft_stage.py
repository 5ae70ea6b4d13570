"""The stage of supervised fine-tuning: the main stage on conversations, from a main checkpoint's weights.

Only answers are trained on, which the data says (mmscale/data/prepared/label_masks.py). Its folder, RUN/sft, is that of
a run: `mmscale eval`, `sample`, `report` and `convert` take it, and its config.yaml can be trained further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmscale.checkpoint import integrity, sharded
from mmscale.checkpoint.layout import Store
from mmscale.data.stream.loader import BatchLoader
from mmscale.errors import CheckpointError
from mmscale.runtime.groups import from_first
from mmscale.train.learned_data import LEARNED, learned_from
from mmscale.train.loop import Hook
from mmscale.train.preflight import newest_intact
from mmscale.train.stages.built import StageInputs, StageServices
from mmscale.train.stages.main import MainStage
from mmscale.train.stages.origin import main_origin
from mmscale.train.stages.sft_settings import NAME, main_step


class SftStage(MainStage):
    """The model with the main run's weights and a new optimizer (`BuiltStage`).

    Raises:
        CheckpointError: the main checkpoint is damaged.
    """

    def __init__(self, given: StageInputs) -> None:
        super().__init__(given)
        saved = from_first(newest_intact(Store.of_run(given.folder))[1] if given.env.is_first else None)
        self._begins = not saved
        self._origin: dict[str, Any] = dict(saved.get(NAME, {})) if saved else self._load_main()

    def _load_main(self) -> dict[str, Any]:
        """Load the weights of the main checkpoint; returns what identifies it."""
        store = Store.of_run(self.given.run)
        step: int = from_first(main_step(self.given.settings, store) if self.given.env.is_first else None)
        folder = store.path(step)
        problem = from_first(self._problem(store, step) if self.given.env.is_first else None)
        if problem is not None:
            raise problem
        loaded = sharded.read(folder, self.state.sharded_weights(), partly=True)
        self.state.take_weights(loaded)
        stream = loaded.get("progress", {}).get("stream", ())
        return from_first(self._main(store, step, stream) if self.given.env.is_first else None)  # type: ignore[no-any-return]

    def _main(self, store: Store, step: int, stream: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What checkpoints of the stage record of the main checkpoint; it and its run may be removed later."""
        return main_origin(store, step) | {LEARNED: learned_from(store.info(step), stream)}

    def _problem(self, store: Store, step: int) -> CheckpointError | None:
        """Why the main checkpoint cannot be used, after reading and hashing all of its files; None: it can."""
        try:
            integrity.require_intact(
                store.path(step), step=step, allow_missing=self.given.settings.checkpoint.allow_missing
            )
        except CheckpointError as error:
            return error
        return None

    def origin(self) -> dict[str, Any]:
        """Identifies the main checkpoint that the stage began from."""
        return {NAME: self._origin}

    def announce(self, *, attempt: int) -> list[str]:
        """As for the main stage, with the checkpoint that the weights are from."""
        first = f"fine-tuning {self.given.run}@{self._origin.get('main_step')}: the loss is that of answers"
        return [*super().announce(attempt=attempt), first]

    def hooks(self, tools: StageServices, batches: BatchLoader) -> list[Hook]:
        """As for the main stage.

        Raises:
            CheckpointError: the stage has begun before, and none of its checkpoints can be loaded.
        """
        if self.state.step == 0 and not self._begins:
            raise CheckpointError(
                f"no checkpoint of {self.given.folder} can be loaded",
                remedy=f"remove {self.given.folder} to begin again from the main run",
            )
        return super().hooks(tools, batches)
