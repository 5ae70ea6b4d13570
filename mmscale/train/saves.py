"""A stage and its checkpoints: sets up the checkpoint manager, resumes, and follows the progress of a save.

The manager does not depend on configurations and terminals; this module connects it with both.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmscale.checkpoint import integrity
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.checkpoint.save_settings import SaveSettings
from mmscale.checkpoint.shape import check_frozen, check_shape, shape_of
from mmscale.config import Config
from mmscale.config.load import digest
from mmscale.data.prepared.identity import SourceIdentity
from mmscale.errors import CheckpointError, TrainingError
from mmscale.resilience.inject import Faults
from mmscale.resilience.lease import Fence
from mmscale.resilience.memory_tier import MemoryTier
from mmscale.resilience.signals import StopRequest
from mmscale.runs.breaks import break_of
from mmscale.runtime import device
from mmscale.runtime.environment import code_version
from mmscale.runtime.groups import from_first
from mmscale.train.evaluated_on import EvaluatedOn
from mmscale.train.log.progress_lines import Progress
from mmscale.train.log.run_logs import RunLogs
from mmscale.train.preflight import check_changes
from mmscale.train.stage_state import StageState
from mmscale.train.stages.built import StageInputs
from mmscale.train.state.memory_snapshots import resume_from_memory
from mmscale.train.throughput import SAVE_STALL, Throughput


def manager_of(
    given: StageInputs,
    *,
    attempt: int,
    tokenizers: dict[str, str],
    data: Sequence[SourceIdentity],
    evaluated_on: EvaluatedOn,
    origin: dict[str, Any],
    begins_at: int,
    logs: RunLogs,
    progress: Progress,
    faults: Faults,
    fence: Fence,
    committed: Callable[[], None] = lambda: None,
) -> CheckpointManager:
    """The checkpoint manager of an attempt. Its events are written to events.jsonl, its warnings to the terminal.

    Args:
        given: the stage.
        attempt: its number.
        tokenizers: fingerprints of the tokenizers of all data so far; stored with every checkpoint.
        data: identities of the training data; stored likewise.
        evaluated_on: validation sets and tasks; their names and hashes are stored likewise.
        origin: further metadata of the stage's checkpoints.
        begins_at: sequences consumed before the stage's first step.
        logs: receives events.
        progress: the terminal.
        faults: called at every point of a save.
        fence: called at every stage of a commit.
        committed: called after a save was committed, on rank 0.
    """
    settings = given.settings

    def on_event(event: str, **fields: Any) -> None:
        logs.add_event(event, **fields)
        if event == "save_committed":
            committed()
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
            **evaluated_on.kept,
            **origin,
        },
        on_event=on_event,
        saves=SaveSettings(
            asynchronous=settings.checkpoint.asynchronous,
            deadline_s=settings.checkpoint.deadline,
            max_failures=settings.checkpoint.max_failures,
            writers=settings.checkpoint.writers,
        ),
        on_point=faults.at,
        check=fence.check,
        keep_every=settings.checkpoint.keep_every,
        early=settings.checkpoint.early,
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
    evaluated_on: EvaluatedOn,
    settings: Callable[[Config], Config],
    is_complete: Callable[[], bool],
    yes: bool,
) -> list[str] | None:
    """Resume from memory or from the newest intact checkpoint, whichever is newer.

    If the stage is complete only the step is restored, because nothing is trained or written again.

    Args:
        config: the run's configuration.
        checkpoints: of the stage.
        memory: of the stage; None: there is no memory tier.
        state: receives the restored state.
        data: identities of the training data.
        evaluated_on: validation sets and tasks of this attempt.
        settings: returns the stage's configuration.
        is_complete: whether nothing is left to do after the step that the state then has.
        yes: the user has confirmed that the objective or the data change.

    Returns:
        The settings changed since then, in words; None for a new run.
    """
    on_disk = from_first(max(checkpoints.store.steps(), default=0))
    if resume_from_memory(memory, state, above=on_disk):  # nothing on disk is newer, so no checkpoint is read
        return []
    newest = checkpoints.choose()
    if (newest or 0) < on_disk and resume_from_memory(memory, state, above=newest or 0):
        return []
    if newest is None:
        return None
    store = checkpoints.store
    info = from_first(store.info(newest) if torch.distributed.get_rank() == 0 else None)
    check_shape(config, info.get("shape", {}), where=str(store.path(newest)))
    check_frozen(config, info, where=str(store.path(newest)))
    lines = check_changes(config, info, data=data, where=str(store.path(newest)), settings=settings, yes=yes)
    state.step = newest
    if newest < settings(config).train.steps or not is_complete():
        checkpoints.load(state, newest)
    lines += evaluated_on.changed(info)
    if break_of(lines).training:
        state.anomalies.begin_anew(step=newest)  # a jump of the loss after a change of settings is not an anomaly
    return lines


def load_newest(
    checkpoints: CheckpointManager, memory: MemoryTier | None, state: StageState, clock: Throughput, *, not_before: int
) -> int | None:
    """Load the newest intact checkpoint; returns its step, or None if there is none.

    Raises:
        CheckpointError: it is from before sequence `not_before`, where this attempt's order of the data begins.
    """
    stream = state.stream
    with clock.measure("rollback_s"):
        newest = checkpoints.choose()
        if newest is not None:
            checkpoints.load(state, newest)
            if memory is not None:
                memory.forget()
    if newest is None:
        return None
    if state.sequences < not_before:
        raise CheckpointError(
            f"the newest whole checkpoint, of step {newest}, is older than this attempt's order of the data",
            remedy="start it again: it resumes from that checkpoint",
        )
    state.stream = stream  # the checkpoint may have been written before this attempt changed the order
    return newest


def poll_stop_and_save(
    stop: StopRequest, checkpoints: CheckpointManager, clock: Throughput, fence: Fence, *, moved: bool
) -> tuple[bool, bool]:
    """One all-reduce per step: agrees on stop requests and on a moved run folder, and advances a pending save.

    Args:
        stop: stop requests by signal.
        checkpoints: of the stage.
        clock: measures saving as a pause.
        fence: whether this attempt may still write.
        moved: whether this rank has found the run's folder renamed.

    Returns:
        Whether to stop, and whether any rank has found the folder renamed.
    """
    fence.check_if_due()
    if fence.is_orphaned() and stop.name is None:
        stop.ask(signal.SIGTERM)  # the launcher of these ranks was killed, and no other process would end them
    saver = checkpoints.saver
    stopping, (elsewhere, working, failed) = stop.agreed_with(device.taken(), int(moved), *saver.status())
    if saver.under_way:
        with clock.measure(SAVE_STALL):
            saver.advance(working, failed)
    return stopping, bool(elsewhere)


def refuse_moved(given: StageInputs, moved_to: Path | None, *, step: int) -> None:
    """End a run whose folder was renamed, because a restart would look for it at its old path.

    Args:
        given: the inputs of the stage.
        moved_to: the stage's present folder; None: it was not renamed.
        step: of the checkpoint that was saved there.

    Raises:
        TrainingError: it was renamed.
    """
    if moved_to is None:
        return
    run = moved_to if given.folder == given.run else moved_to.parent
    raise TrainingError(
        f"{given.folder} was renamed to {moved_to}; step {step} is saved there",
        remedy=f"rename it back, or continue with run.dir={run.parent} run.name={run.name}",
    )
