"""The position in the data from which an attempt continues, from its checkpoint's counters and settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmscale.checkpoint.layout import Store
from mmscale.config import Config
from mmscale.data.prepared.identity import SourceIdentity, known
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.segments import Place, resume_stream
from mmscale.runtime.groups import from_first
from mmscale.train.stage_state import StageState


def find_place(
    config: Config,
    mixture: Mixture,
    state: StageState,
    *,
    data: Sequence[SourceIdentity],
    store: Store,
    first: bool,
    begins_from: Mapping[str, Any],
    settings_of: Callable[[Config], Config],
) -> Place:
    """The stream of documents that were not read yet, and how its order has changed. Every rank calls it.

    Args:
        config: of this attempt.
        mixture: the data from its beginning.
        state: of the stage, as loaded; `stream` is empty in checkpoints of versions that did not store it.
        data: identities of the data sets.
        store: the stage's checkpoints.
        first: whether this is rank 0, which reads the checkpoints.
        begins_from: metadata of the checkpoint from whose position the stage's step 0 continues; empty: none.
        settings_of: returns the stage's settings for a run's configuration.
    """
    info: Mapping[str, Any] = {}
    saved: Mapping[str, Any] | None = None
    if state.sequences and not state.stream:  # the meaning of the number of sequences depends on the settings then
        info = begins_from if state.step == 0 else from_first(store.info(state.step) if first else None)
        saved = info.get("config")
        if state.step > 0:
            run = Config.model_validate(saved) if isinstance(saved, dict) else None
            saved = None if run is None else settings_of(run).model_dump(mode="json")
    return resume_stream(
        config,
        mixture,
        data=data,
        consumed=state.sequences,
        # A schedule of data weights counts the steps of the main run.
        step=int(begins_from.get("step", 0)) + state.step,
        segments=state.stream,
        ahead=max(0, config.train.steps - state.step) * config.train.global_batch_size,
        saved=saved,
        known=known(info),
    )
