"""One attempt of a stage on one rank: combines the parts of a run, resumes, trains, and reports how it ended."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable
from typing import Any

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.data.prepared.identity import identities
from mmscale.data.prepared.manifest import read_blend
from mmscale.data.prepared.tasks import TaskItem
from mmscale.data.stream.mixture import Mixture
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DamagedDataError, HookError, TrainingError
from mmscale.resilience import flight_recorder
from mmscale.resilience.inject import Faults
from mmscale.resilience.lease import Fence, launched_attempt
from mmscale.resilience.memory_tier import MemoryTier
from mmscale.resilience.signals import StopRequest
from mmscale.resilience.watchdog import Watchdog
from mmscale.runs.attempts import next_attempt
from mmscale.runs.events import BEGINS, EARLY
from mmscale.runs.extents import as_field
from mmscale.runtime import device
from mmscale.runtime.activity import ActivityReporter
from mmscale.runtime.groups import from_first
from mmscale.train import saves, training_lock
from mmscale.train.assembly import dry_run, loader_of
from mmscale.train.boundary import StepBoundary
from mmscale.train.data_check import DataCheck
from mmscale.train.data_place import find_place
from mmscale.train.evaluated_on import EvaluatedOn
from mmscale.train.held_out_evaluation import HeldOutEvaluation, other_batches
from mmscale.train.hooks import PlaceHook, common_hooks
from mmscale.train.log.exposure import planned_sources
from mmscale.train.log.profile_window import ProfileWindow
from mmscale.train.log.progress_lines import Progress
from mmscale.train.log.run_logs import RunLogs, open_run_logs
from mmscale.train.log.stragglers import RankTimes
from mmscale.train.loop import Hook, Trainer
from mmscale.train.mirroring import mirroring
from mmscale.train.opening_lines import MOST_CHANGES, opening_lines
from mmscale.train.plugin_hooks import AnnouncedSaves, HookRun, PluginHooks
from mmscale.train.preflight import tokenizers_of
from mmscale.train.stages.built import BuiltStage, StageInputs, StageServices
from mmscale.train.stages.table import Stage
from mmscale.train.state.memory_snapshots import MemoryHook, memory_of
from mmscale.train.state.watched import Watch
from mmscale.train.steps.evaluation import CutShortError
from mmscale.train.steps.step_guard import StepGuard
from mmscale.train.throughput import Throughput, peak_tflops

FINISHED, STOPPED = 0, 75


class Attempt:
    """One attempt. All methods are called on every rank. What must be closed goes on the exit stack once it is open."""

    def __init__(
        self,
        entry: Stage,
        given: StageInputs,
        build: Callable[[StageInputs], BuiltStage],
        train_data: Mixture,
        held_out: dict[str, Mixture],
        tasks: dict[str, list[TaskItem]],
        stop: StopRequest,
        fence: Fence,
        stack: contextlib.ExitStack,
        starting: ActivityReporter,
    ) -> None:
        self.entry, self.given, self.stop, self.stack, self.starting = entry, given, stop, stack, starting
        self.config, self.env, self.folder, self.groups = given.settings, given.env, given.folder, given.groups
        self.train_data, self.fence = train_data, fence
        config, env = self.config, self.env
        self.faults = Faults.of_rank(env.rank)
        first = env.is_first
        self.number = from_first((launched_attempt(self.folder) or next_attempt(self.folder)) if first else None)
        self.stage = build(given)
        self.state, self.stepper = self.stage.state, self.stage.stepper
        self.begins_at = self.state.sequences
        self.logs: RunLogs = stack.enter_context(
            open_run_logs(
                self.folder,
                attempt=self.number,
                rank=env.rank,
                fence=self.fence,
                log=config.log,
                name="-".join(filter(None, (config.run.name, entry.subfolder))),
                transcribed=training_lock.is_held_by_train(self.fence.lease_id),
            )
        )
        self.progress: Progress = stack.enter_context(
            Progress(config.train.steps, enabled=first, copy=self.logs.transcript.say, starting=starting)
        )
        blend = read_blend(config)
        before = {**self.stage.begins_from, **self.stage.origin()}  # a fine-tuned run says what its main run read
        self.evaluated_on = from_first(EvaluatedOn.of(config, blend, tasks, before) if first else None)
        self.data = from_first(identities(config, blend) if first else None)
        say, add_event = self.progress.say, self.logs.add_event
        self.mirror = stack.enter_context(mirroring(given, stop=stop, on_event=add_event, say=say))
        self.checkpoints: CheckpointManager = saves.manager_of(
            given,
            attempt=self.number,
            tokenizers=from_first(tokenizers_of(given.run, train_data.tokenizers) if first else None),
            data=self.data,
            evaluated_on=self.evaluated_on,
            origin=self.stage.origin(),
            begins_at=self.begins_at,
            logs=self.logs,
            progress=self.progress,
            faults=self.faults,
            fence=self.fence,
            committed=self.mirror.request_upload,
        )
        stack.callback(self.checkpoints.saver.close)
        self.memory: MemoryTier | None = stack.enter_context(
            memory_of(config, env, run=self.folder, attempt=self.number, on_event=add_event, warn=say)
        )
        self.watchdog = Watchdog(
            rank=env.rank,
            folder=self.folder / "logs" / f"attempt_{self.number}",
            timeout_s=config.resilience.hang_timeout,
            recorded=flight_recorder.dump,
        )
        self.clock = Throughput(
            flops_per_token=self.stage.flops_per_token,
            world_size=env.world_size,
            peak_tflops=peak_tflops(device.device_name(), config.precision.dtype),
        )
        seen = HookRun(config, entry.name, self.folder, env.rank, env.world_size, self.stepper.modules, say, add_event)
        self.plugins = PluginHooks(config, seen)
        self.saves = AnnouncedSaves(self.checkpoints, self.plugins)
        self.watch = Watch(config, self.state, saver=self.checkpoints.saver, on_event=add_event, say=say)
        self.boundary = StepBoundary(
            config,
            state=self.state,
            stop=stop,
            checkpoints=self.checkpoints,
            clock=self.clock,
            fence=fence,
            watchdog=self.watchdog,
            logs=self.logs,
            is_over=self.watch.is_over,
        )
        measure = HeldOutEvaluation(
            config,
            state=self.state,
            stepper=self.stepper,
            passes=held_out,
            tasks=tasks,
            groups=self.groups,
            beat=self._beat,
            at=self.faults.at,
            stop=stop,
            on_evaluation=self.plugins.on_evaluation,
        )
        evaluate, parts = measure if held_out or tasks else None, measure.extents()
        self.tools = StageServices(self.clock, self.progress, self.logs, evaluate, self._beat, parts, self.watch.record)

    def run(self, *, yes: bool) -> int:
        """Resume or start, train to the end or to a stop request; returns the exit status."""
        config, state, stage = self.config, self.state, self.stage
        memory = self.memory if config.checkpoint.resume else None
        self.starting.update("looking for a checkpoint and loading it")
        changed = saves.resume(
            self.given.config,
            self.checkpoints,
            memory,
            state,
            data=self.data,
            evaluated_on=self.evaluated_on,
            settings=self.entry.settings,
            is_complete=stage.is_complete,
            yes=yes,
        )
        if self.faults.text:
            self.logs.add_event("faults_requested", faults=self.faults.text)
        parts = other_batches(self.folder, self.tools.extents, state.step, first=self.env.is_first)
        self.watch.resume(changed or [], parts=parts)
        if self.watch.is_over():
            return self._done()
        moved = self._seek()
        self._announce([*(changed or []), *moved])
        if said := training_lock.stop_hint(self.fence.lease_id, self.folder):
            self.progress.say(said)
        self.logs.begin(self.given.config, self.folder, attempt=self.number)
        changes = {} if changed is None else {"changed": changed[:MOST_CHANGES]}
        self.logs.add_event(
            BEGINS[changed is not None],
            since=round(self.starting.began, 3),
            step=state.step,
            **self.env.facts(),
            attempt_id=self.fence.lease_id,
            sources=planned_sources(config, self.train_data, step=state.step, sequences=state.sequences),
            **(changes | self.evaluated_on.start_fields | as_field(self.tools.extents) | stage.origin()),
        )
        if config.train.dry_run:
            self.starting.update("computing a batch to find errors early (train.dry_run)")
            dry_run(config, self.stepper, self.groups, self.train_data)
        self.mirror.request_upload()
        self.starting.update("taking the first step")
        trainer = self._trainer()
        if self.memory is not None:
            self.memory.start()
        # megatron-core collects garbage in every save while all ranks wait; it need not visit the objects of now again.
        gc.collect()
        gc.freeze()
        self.clock.restart()  # the first step's time must not include loading and the dry run
        try:
            with self.watchdog:
                self.plugins.on_start(state.step)
                finished = self._train(trainer)
                self.plugins.on_end(state.step, finished=finished)
        except HookError:  # may have been raised on this rank alone, so no collective is possible
            raise
        except (TrainingError, DamagedDataError):  # raised on every rank: the pending save can be committed
            self.checkpoints.saver.finish()
            raise
        saves.refuse_moved(self.given, self.boundary.moved_to, step=state.step)
        self._record_end(finished=finished)
        if not finished:
            self.progress.say(f"stopped on request after step {state.step}; start it again to continue")
        return FINISHED if finished else STOPPED

    def _train(self, trainer: Trainer) -> bool:
        """Train to the end, with all resources open. False: stopped on request, or the run folder was renamed."""
        try:
            self._catch_up(self.stage.resumed)
            if not trainer.fit() or self.boundary.moved_to is not None:
                return False
            self._catch_up(self.stage.complete)
        except CutShortError:
            if self._only_in_memory():
                self._save_again()
            return False
        return True

    def _record_end(self, *, finished: bool) -> None:
        self.mirror.wait(finished=finished)  # before the final event, because `status` shows the last one
        # The last steps, the last save and the last evaluation may come after the last logged step.
        early = self.watch.early_end() if finished else {}
        event = "stop" if not finished else EARLY if early else "finish"
        self.logs.add_event(event, step=self.state.step, signal=self.stop.agreed_name, **self.clock.unread(), **early)

    def _catch_up(self, measure: Callable[[StageServices], None]) -> None:
        """Run evaluations that the previous attempt missed; save again if the state is now the best or the last one."""
        before = self.checkpoints.saver.best, self.watch.is_over()
        measure(self.tools)
        if (self.checkpoints.saver.best, self.watch.is_over()) != before:
            self._save_again()

    def _save_again(self) -> None:
        with self.stepper.materialized():
            self.saves.save(self.state, last=True)

    def _only_in_memory(self) -> bool:
        """Whether this attempt resumed from memory and has not saved since."""
        return from_first(max(self.checkpoints.store.steps(), default=0)) < self.state.step

    def _seek(self) -> tuple[str, ...]:
        """Move the data stream to the first unread document; returns lines about changes of the order of the data."""
        place = find_place(
            self.config,
            self.train_data,
            self.state,
            data=self.data,
            store=self.checkpoints.store,
            first=self.env.is_first,
            begins_from=self.stage.begins_from,
            settings_of=self.entry.settings,
        )
        self.train_data, self.state.stream = place.mixture, place.segments
        own = self.evaluated_on.with_earlier(self.config, place.segments) if self.env.is_first else None
        self.evaluated_on = from_first(own)
        return tuple(place.lines)

    def _announce(self, changed: list[str]) -> None:
        lines = opening_lines(
            self.given,
            self.stage,
            attempt=self.number,
            begins_at=self.begins_at,
            train_data=self.train_data,
            evaluated_on=self.evaluated_on,
            extents=self.tools.extents,
            faults=self.faults,
            changed=changed,
        )
        for line in lines if self.env.is_first else ():
            self.progress.say(line)

    def _done(self) -> int:
        """Nothing is left to train: complete the work after the last step that a killed attempt did not finish."""
        self.progress.say(f"{self.folder} is done: {self.watch.describe_end(raised=self.entry.steps)}")
        unsaved, undone = self._only_in_memory(), not self.stage.is_complete()
        if unsaved or undone:
            self.clock.restart()
            with self.watchdog:
                self.plugins.on_start(self.state.step)
                finished = self._finish(unsaved=unsaved, undone=undone)
                self.plugins.on_end(self.state.step, finished=finished)
            self._record_end(finished=finished)
            if not finished:
                return STOPPED
        else:
            self.mirror.wait(finished=True)
        return FINISHED

    def _finish(self, *, unsaved: bool, undone: bool) -> bool:
        """Finish the attempt; returns whether no stop request arrived meanwhile."""
        if unsaved:
            self._save_again()
        with contextlib.suppress(CutShortError):
            if undone:
                self._catch_up(self.stage.complete)
            return True
        return False

    def _trainer(self) -> Trainer:
        loader = loader_of(self.config, self.groups, self.train_data, consumed=self.state.sequences)
        self.stack.callback(loader.close)
        at = functools.partial(self.faults.at, "begin")
        times = RankTimes(self.config, stepper=self.stepper, state=self.state, begun=at)
        guard = StepGuard(
            self.config,
            state=self.state,
            stepper=self.stepper,
            load_newest=self._load_newest,
            seek=lambda sequences: loader.load_state_dict({"consumed_sequences": sequences}),
            on_event=self._anomaly,
            warn=self.progress.say,
            optim=self.entry.optim,
        )
        return Trainer(
            self.config,
            state=self.state,
            stepper=self.stepper,
            guard=guard,
            batches=times.watch(loader),
            vocabulary=Vocabulary.from_config(self.config.vocab),
            hooks=self._hooks(times, self.stage.hooks(self.tools, loader)),
            checkpoints=self.saves,
            stop_requested=self.boundary.stops,
            is_over=self.watch.is_over,
            clock=self.clock,
        )

    def _load_newest(self) -> int | None:
        """Roll back to the newest checkpoint; returns its step."""
        state = self.state
        # This waits for the save in progress, then hashes and reads a checkpoint. Each may take as long as a save.
        self.watchdog.beat(state.step, allowed_s=2 * self.config.checkpoint.deadline)
        found = saves.load_newest(self.checkpoints, self.memory, state, self.clock, not_before=self.train_data.start)
        self.watchdog.beat(state.step)
        self.watch.rolled_back()
        return found

    def _hooks(self, times: RankTimes, own: list[Hook]) -> list[Hook]:
        common = common_hooks(
            self.config,
            stepper=self.stepper,
            groups=self.groups,
            clock=self.clock,
            progress=self.progress,
            logs=self.logs,
            plugins=self.plugins,
            figures=lambda: self.checkpoints.saver.figures() | times.figures() | self.plugins.figures(),
        )
        last: list[Hook] = [PlaceHook(self.faults.at)]
        if self.memory is not None:
            last.append(MemoryHook(self.memory, clock=self.clock))
        add_event = self.logs.add_event
        check = self.stack.enter_context(DataCheck(self.config, self.env, on_event=add_event, warn=self.progress.say))
        window = ProfileWindow(
            self.config,
            folder=self.folder,
            attempt=self.number,
            rank=self.env.rank,
            next_step=self.state.step + 1,
            clock=self.clock,
            on_event=add_event,
            beat=self._beat,
        )
        self.stack.enter_context(window)
        return [times, *common, check, window, self.mirror, *own, *last]

    def _beat(self) -> None:
        """Report progress of a long operation to the watchdog. A part of it that never ends is still detected."""
        self.watchdog.beat(self.state.step)

    def _anomaly(self, event: str, **fields: Any) -> None:
        self.logs.add_event(event, **fields)
        if self.logs.metrics is not None and event == "rollback":
            self.logs.metrics.rolled_back(fields["number"])
