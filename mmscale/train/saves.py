"""A stage and its checkpoints: how its manager is set up, where it goes on from, and how far a save has come.

The manager knows neither configurations nor terminals; here it gets both.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmscale.checkpoint import integrity
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.checkpoint.save_settings import SaveSettings
from mmscale.checkpoint.shape import check_shape, shape_of
from mmscale.config import Config
from mmscale.config.load import digest
from mmscale.data.identity import SourceIdentity
from mmscale.resilience.inject import Faults
from mmscale.resilience.lease import Fence
from mmscale.resilience.memory_tier import MemoryTier
from mmscale.resilience.signals import StopRequest
from mmscale.runtime import device
from mmscale.runtime.environment import code_version
from mmscale.runtime.groups import from_first
from mmscale.train.memory import go_on
from mmscale.train.preflight import check_changes
from mmscale.train.progress import Progress
from mmscale.train.records import Records
from mmscale.train.stages.built import Given
from mmscale.train.state import StageState
from mmscale.train.throughput import SAVE_STALL, Throughput


def manager_of(
    given: Given,
    *,
    attempt: int,
    tokenizers: dict[str, str],
    data: Sequence[SourceIdentity],
    validation: Sequence[dict[str, str]],
    origin: dict[str, Any],
    begins_at: int,
    records: Records,
    progress: Progress,
    faults: Faults,
    fence: Fence,
) -> CheckpointManager:
    """The manager of an attempt: told events become lines of events.jsonl, and warnings on the terminal.

    Args:
        given: the stage.
        attempt: its number.
        tokenizers: fingerprints of those that the run has learned from; kept with every checkpoint.
        data: what it learns from; kept likewise.
        validation: sets that it is evaluated on, from `mmscale.data.validation.identities_of`; kept likewise.
        origin: what else the stage's checkpoints say of themselves.
        begins_at: sequences consumed before the stage's first step.
        records: where events go.
        progress: the terminal.
        faults: called at every point of a save.
        fence: called at every stage of a commit.
    """
    settings = given.settings

    def tell(event: str, **fields: Any) -> None:
        records.tell(event, **fields)
        if event == "checkpoint_bad":
            found = integrity.describe(fields["problems"])
            progress.say(
                f"warning: the checkpoint of step {fields['step']} is damaged, kept as {fields['kept_as']}: {found}"
            )
        if event == "save_failed":
            progress.say(
                f"warning: the save of step {fields['step']} failed on rank {fields['rank']} and is given up: "
                f"{fields['reason']}"
            )

    def counters(step: int) -> dict[str, Any]:
        return {"step": step, "sequences": begins_at + step * settings.train.global_batch_size}

    return CheckpointManager(
        given.folder,
        every=settings.checkpoint.every,
        keep=settings.checkpoint.keep,
        attempt=attempt,
        info={
            "shape": shape_of(given.config),
            "config": given.config.model_dump(mode="json"),
            "config_digest": digest(given.config),
            "attempt": attempt,
            "tokenizers": tokenizers,
            "data": [source.model_dump() for source in data],
            "validation": list(validation),
            **origin,
        },
        on_event=tell,
        saves=SaveSettings(
            asynchronous=settings.checkpoint.asynchronous,
            deadline_s=settings.checkpoint.deadline,
            max_failures=settings.checkpoint.max_failures,
            writers=settings.checkpoint.writers,
        ),
        on_point=faults.at,
        on_stage=lambda stage: fence.check(),
        keep_every=settings.checkpoint.keep_every,
        allow_missing=settings.checkpoint.allow_missing,
        seed=settings.run.seed,
        code_version=code_version() if torch.distributed.get_rank() == 0 else "",
        default_progress=counters,
    )


def resume(
    config: Config,
    checkpoints: CheckpointManager,
    memory: MemoryTier | None,
    state: StageState,
    *,
    data: Sequence[SourceIdentity],
    settings: Callable[[Config], Config],
    is_complete: Callable[[], bool],
    yes: bool,
) -> list[str] | None:
    """Go on from memory or from the newest whole checkpoint, whichever is newer.

    Of a stage that is done only the step is taken over: nothing of it is trained or written again.

    Args:
        config: the run's configuration.
        checkpoints: of the stage.
        memory: of the stage; None: nothing is looked for there.
        state: takes over what is found.
        data: what it learns from.
        settings: gives the stage's configuration.
        is_complete: whether nothing is left to do after the step that the state then has.
        yes: the user has confirmed that the objective or the data change.

    Returns:
        The settings changed since then in words; None for a new run.
    """
    on_disk = from_first(max(checkpoints.store.steps(), default=0))
    if go_on(memory, state, above=on_disk):  # nothing on disk could be newer, so nothing there is read
        return []
    newest = checkpoints.choose()
    if (newest or 0) < on_disk and go_on(memory, state, above=newest or 0):
        return []
    if newest is None:
        return None
    store = checkpoints.store
    info = from_first(store.info(newest) if torch.distributed.get_rank() == 0 else None)
    check_shape(config, info.get("shape", {}), where=str(store.path(newest)))
    lines = check_changes(config, info, data=data, where=str(store.path(newest)), settings=settings, yes=yes)
    state.step = newest
    if newest < settings(config).train.steps or not is_complete():
        checkpoints.load(state, newest)
    return lines


def load_newest(
    checkpoints: CheckpointManager, memory: MemoryTier | None, state: StageState, clock: Throughput
) -> int | None:
    """Go back to the newest whole checkpoint; its step, or None where there is none."""
    with clock.measure("rollback_s"):
        newest = checkpoints.choose()
        if newest is not None:
            checkpoints.load(state, newest)
            if memory is not None:
                memory.forget()
    return newest


def border(
    stop: StopRequest, checkpoints: CheckpointManager, clock: Throughput, fence: Fence, *, moved: bool
) -> tuple[bool, bool]:
    """Between two steps, in one collective: whether to stop, whether a rank has seen the folder elsewhere.

    It also goes on with the save that is under way.

    Args:
        stop: requests from outside.
        checkpoints: of the stage.
        clock: saving is a pause.
        fence: whether this attempt may still write.
        moved: whether this rank has seen it.
    """
    fence.look()
    if fence.is_orphaned() and stop.name is None:
        stop.ask(signal.SIGTERM)  # whoever started these ranks was killed: nobody else will end them
    saver = checkpoints.saver
    stopping, (elsewhere, working, failed) = stop.agreed_with(device.taken(), int(moved), *saver.word())
    if saver.under_way:
        with clock.measure(SAVE_STALL):
            saver.advance(working, failed)
    return stopping, bool(elsewhere)
