"""One attempt of a stage, from a configuration to an exit status: puts the parts together in order.

The only place that knows model, data, checkpoint and resilience at once. What is of one stage alone is in stages/.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config import Config
from mmscale.data.identity import identities, known
from mmscale.data.manifest import read_blend
from mmscale.data.mixture import Mixture, open_mixture
from mmscale.data.passes import open_passes
from mmscale.data.segments import go_on
from mmscale.data.validation import identities_of, read_validation
from mmscale.data.vocab import Vocabulary
from mmscale.errors import CheckpointError, TrainingError
from mmscale.model.auxiliary import RouterLearning
from mmscale.model.mixed_modal import Routing
from mmscale.resilience import flight_recorder
from mmscale.resilience.inject import Faults
from mmscale.resilience.lease import Fence, launched_attempt
from mmscale.resilience.memory_tier import MemoryTier
from mmscale.resilience.signals import StopRequest
from mmscale.resilience.watchdog import Watchdog
from mmscale.runtime import device
from mmscale.runtime import groups as process_groups
from mmscale.runtime.groups import from_first
from mmscale.runtime.rank_env import RankEnv, grace_of
from mmscale.train import holding, saves
from mmscale.train.evaluate import CutShortError, evaluate
from mmscale.train.hooks import LogHook, PlaceHook, ReplicaHook, StillHook
from mmscale.train.loop import Hook, Trainer
from mmscale.train.memory import MemoryHook, memory_of
from mmscale.train.metrics import next_attempt
from mmscale.train.parts import dry_run, loader_of, resolve_share, start
from mmscale.train.preflight import tokenizers_of
from mmscale.train.progress import Progress
from mmscale.train.records import Records, open_records
from mmscale.train.stages.auxiliary import AuxiliaryStage
from mmscale.train.stages.built import BuiltStage, Given, Tools
from mmscale.train.stages.main import MainStage
from mmscale.train.stages.table import MAIN, STAGES, Stage
from mmscale.train.step_guard import StepGuard
from mmscale.train.stragglers import RankTimes
from mmscale.train.throughput import Throughput, peak_tflops

FINISHED, STOPPED = 0, 75
BUILDERS: Mapping[str, Callable[[Given], BuiltStage]] = {MAIN: MainStage, "auxiliary": AuxiliaryStage}


def main(config: Config, env: RankEnv, *, stage: str = MAIN, yes: bool = False, grace_s: float | None = None) -> int:
    """Run one attempt on this rank.

    Args:
        config: the run's configuration; `model.experts.share` may be 'auto'.
        env: this process's place among the ranks.
        stage: a name in `STAGES`.
        yes: go on from a checkpoint although the objective or the data have changed since.
        grace_s: how long a request to stop leaves for a save [seconds]; default: what the launcher says, or a minute.

    Returns:
        0: trained to the last step; 75: stopped on request after a committed save.

    Raises:
        MmscaleError: something that the user can mend; the same on every rank where it can be.
    """
    entry = STAGES[stage]
    entry.preflight(config, world_size=env.world_size, yes=yes)
    config = resolve_share(entry.inherit(config))
    settings = entry.settings(config)
    vocabulary = Vocabulary.from_config(settings.vocab)
    train_data = open_mixture(settings, "train", vocabulary=vocabulary)
    held_out = open_passes(settings, vocabulary=vocabulary)
    groups = start(settings, env)
    run = Path(config.run.dir) / config.run.name
    given = Given(config, settings, run, entry.folder(run), env, groups)
    try:
        with (
            StopRequest(grace_s=grace_of(grace_s)) as stop,
            holding.held_by_ranks(run, entry, env, from_first=from_first) as fence,
            contextlib.ExitStack() as stack,
        ):
            return _Attempt(entry, given, train_data, held_out, stop, fence, stack).run(yes=yes)
    finally:
        process_groups.finalize()


class _Attempt:
    """One attempt. Every rank holds one; all its methods are called on every rank.

    What must be closed goes on the stack as soon as it is open.
    """

    def __init__(
        self,
        entry: Stage,
        given: Given,
        train_data: Mixture,
        held_out: dict[str, Mixture],
        stop: StopRequest,
        fence: Fence,
        stack: contextlib.ExitStack,
    ) -> None:
        self.entry, self.given, self.stop, self.stack = entry, given, stop, stack
        self.config, self.env, self.folder = given.settings, given.env, given.folder
        self.groups: ProcessGroupCollection = given.groups
        self.train_data, self.held_out = train_data, held_out
        config, env = self.config, self.env
        self.fence = fence
        self.faults = Faults.of_rank(env.rank)
        first = env.is_first
        self.number = from_first((launched_attempt(self.folder) or next_attempt(self.folder)) if first else None)
        self.moved_to: Path | None = None  # where the folder is, once it was renamed
        self.stage = BUILDERS[entry.name](given)
        self.state, self.stepper = self.stage.state, self.stage.stepper
        self.records: Records = stack.enter_context(
            open_records(
                self.folder,
                attempt=self.number,
                rank=env.rank,
                fence=self.fence,
                log=config.log,
                name="-".join(filter(None, (config.run.name, entry.subfolder))),
            )
        )
        self.progress: Progress = stack.enter_context(Progress(config.train.steps, enabled=first))
        blend = read_blend(config)
        sets = read_validation(config, blend) if first else []
        self.evaluated = [one.describe() for one in sets]
        self.data = from_first(identities(config, blend) if first else None)
        self.checkpoints: CheckpointManager = saves.manager_of(
            given,
            attempt=self.number,
            tokenizers=from_first(tokenizers_of(given.run, train_data.tokenizers) if first else None),
            data=self.data,
            validation=from_first(identities_of(sets) if first else None),
            origin=self.stage.origin(),
            begins_at=self.state.sequences,
            records=self.records,
            progress=self.progress,
            faults=self.faults,
            fence=self.fence,
        )
        stack.callback(self.checkpoints.saver.close)
        self.memory: MemoryTier | None = stack.enter_context(
            memory_of(config, env, run=self.folder, attempt=self.number, tell=self.records.tell, warn=self.progress.say)
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
        measure = self._evaluate if held_out else None
        self.tools = Tools(self.clock, self.progress, self.records, measure, self._beat)

    def run(self, *, yes: bool) -> int:
        """Resume or start, train to the end or to a request to stop; the exit status."""
        config, state, stage = self.config, self.state, self.stage
        memory = self.memory if config.checkpoint.resume else None
        changed = saves.resume(
            self.given.config,
            self.checkpoints,
            memory,
            state,
            data=self.data,
            settings=self.entry.settings,
            is_complete=stage.is_complete,
            yes=yes,
        )
        self._announce(changed or [])
        if state.step >= config.train.steps:
            return self._done()
        if holding.by_train(self.fence.lease_id):
            self.progress.say(f"Ctrl-C saves a checkpoint and ends it; so does `mmscale stop {self.folder}` elsewhere")
        self.records.begin(self.given.config, self.folder, attempt=self.number)
        self._find_place()
        begun = "start" if changed is None else "resume"
        self.records.tell(
            begun, step=state.step, world_size=self.env.world_size, attempt_id=self.fence.lease_id, **stage.origin()
        )
        if config.train.dry_run:
            dry_run(config, self.stepper, self.groups, self.train_data)
        trainer = self._trainer()
        if self.memory is not None:
            self.memory.start()
        # megatron-core collects garbage in every save while all wait: what is there now stays, and is not looked at.
        gc.collect()
        gc.freeze()
        self.clock.restart()  # loading and the dry run are start-up, and no part of the first step's time
        try:
            with self.watchdog:
                finished = self._train(trainer)
        except TrainingError:  # the same on every rank, so the save that is under way can still be committed
            self.checkpoints.saver.finish()
            raise
        self._refuse_moved()
        self.records.tell("finish" if finished else "stop", step=state.step, signal=self.stop.agreed_name)
        if not finished:
            self.progress.say(f"stopped on request after step {state.step}; start it again to go on")
        return FINISHED if finished else STOPPED

    def _train(self, trainer: Trainer) -> bool:
        """Train to the end, with all that belongs to it. False: stopped on request, or the folder was renamed."""
        try:
            self.stage.resumed(self.tools)
            if not trainer.fit() or self.moved_to is not None:
                return False
            self.stage.complete(self.tools)
        except CutShortError:
            self._save_what_memory_has()
            return False
        return True

    def _save_what_memory_has(self) -> None:
        """Save the state if this attempt went on from memory alone, and has not saved since."""
        if from_first(max(self.checkpoints.store.steps(), default=0)) < self.state.step:
            with self.stepper.settled():
                self.checkpoints.save(self.state, last=True)

    def _find_place(self) -> None:
        """Go on in the data with what was not read, and say what changed in its order."""
        state = self.state
        info: dict[str, Any] = {}
        saved: dict[str, Any] | None = None
        if state.sequences and not state.stream:  # settings say what the number means
            info, saved = self._settings_before()
        place = go_on(
            self.config,
            self.train_data,
            data=self.data,
            consumed=state.sequences,
            segments=state.stream,
            saved=saved,
            known=known(info),
        )
        self.train_data, state.stream = place.mixture, place.segments
        for line in place.lines:
            self.progress.say(f"changed since the checkpoint: {line}")

    def _settings_before(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What the checkpoint says that the state is from, and the settings of the steps before it."""
        step = self.state.step
        if step == 0:
            info = self.stage.begins_from
            return info, info.get("config")
        info = from_first(self.checkpoints.store.info(step) if self.env.is_first else None)
        if not isinstance(info.get("config"), dict):
            return info, None
        return info, self.entry.settings(Config.model_validate(info["config"])).model_dump(mode="json")

    def _announce(self, changed: list[str]) -> None:
        if not self.env.is_first:
            return
        if self.faults.text:
            self.records.tell("faults_requested", faults=self.faults.text)
        lines = [*self.stage.announce(attempt=self.number), *self.evaluated, *self.faults.warnings()]
        for line in (*lines, *(f"changed since the checkpoint: {change}" for change in changed)):
            self.progress.say(line)

    def _done(self) -> int:
        """Nothing is left to train: do what an attempt that was killed after the last step has left undone."""
        self._save_what_memory_has()
        if not self.stage.is_complete():
            try:
                with self.watchdog:
                    self.stage.complete(self.tools)
            except CutShortError:
                return STOPPED
            self.records.tell("finish", step=self.state.step, signal=None)
        self.progress.say(
            f"{self.folder} is done: {self.state.step} of {self.config.train.steps} steps; raise {self.entry.steps} to "
            "go on"
        )
        return FINISHED

    def _trainer(self) -> Trainer:
        loader = loader_of(self.config, self.groups, self.train_data, consumed=self.state.sequences)
        self.stack.callback(loader.close)
        times = RankTimes(
            self.config,
            stepper=self.stepper,
            state=self.state,
            begun=functools.partial(self.faults.at, "begin"),
        )
        guard = StepGuard(
            self.config,
            state=self.state,
            stepper=self.stepper,
            load_newest=self._load_newest,
            go_on_at=lambda sequences: loader.load_state_dict({"consumed_sequences": sequences}),
            tell=self._anomaly,
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
            checkpoints=self.checkpoints,
            stop_requested=self._border,
            clock=self.clock,
        )

    def _border(self) -> bool:
        """Between two steps: whether to stop."""
        checkpoint, step = self.config.checkpoint, self.state.step
        waits = step == self.config.train.steps or (not checkpoint.asynchronous and self.checkpoints.due(step))
        # A request to stop is agreed on behind this line, and the save that follows it is waited for too.
        self.watchdog.beat(step, allowed_s=checkpoint.deadline if waits else 0.0)
        folder = self.records.folder
        at = None if folder is None else folder.moved()
        stopping, moved = saves.border(self.stop, self.checkpoints, self.clock, self.fence, moved=at is not None)
        if moved:
            self._follow(at)
        if stopping or moved:
            self.checkpoints.saver.hurry(self.stop.grace_s / 2 - self.stop.waited_s)
            self.watchdog.beat(step, allowed_s=checkpoint.deadline)
        return stopping or moved

    def _follow(self, at: Path | None) -> None:
        """Save where the folder is now; `at`: as rank 0 has seen it."""
        self.moved_to = from_first(at)
        self.records.tell("run_moved", step=self.state.step, to=str(self.moved_to))
        self.checkpoints.move(self.moved_to)
        self.checkpoints.saver.hurry(0.0)  # what it writes by the old name

    def _refuse_moved(self) -> None:
        """A run that was renamed ends: whoever would start it again looks for it where it was.

        Raises:
            TrainingError: it was.
        """
        if self.moved_to is None:
            return
        run = self.moved_to.parent if self.entry.subfolder else self.moved_to
        raise TrainingError(
            f"{self.folder} was renamed to {self.moved_to}; step {self.state.step} is saved there",
            remedy=f"rename it back, or go on with run.dir={run.parent} run.name={run.name}",
        )

    def _load_newest(self) -> int | None:
        """Roll back; the step of the checkpoint."""
        state = self.state
        # The save under way is waited for, then a checkpoint is hashed and read: each may take as long as a save.
        self.watchdog.beat(state.step, allowed_s=2 * self.config.checkpoint.deadline)
        stream = state.stream
        found = saves.load_newest(self.checkpoints, self.memory, state, self.clock)
        if found is not None:
            if state.sequences < self.train_data.start:
                raise CheckpointError(
                    f"the newest whole checkpoint, of step {found}, is older than this attempt's order of the data",
                    remedy="start it again: it goes on from that checkpoint",
                )
            state.stream = stream  # the checkpoint may be from before this attempt changed the order
        self.watchdog.beat(state.step)
        return found

    def _hooks(self, times: RankTimes, own: list[Hook]) -> list[Hook]:
        config, clock, records = self.config, self.clock, self.records
        hooks: list[Hook] = [
            times,
            ReplicaHook(config, stepper=self.stepper, groups=self.groups, clock=clock, tell=records.tell),
            LogHook(
                config,
                clock=clock,
                progress=self.progress,
                metrics=records.metrics,
                figures=self.stepper.figures,
                more=lambda: self.checkpoints.saver.figures() | times.figures(),
            ),
            StillHook(tell=records.tell, warn=self.progress.say),
            *own,
            PlaceHook(self.faults.at),
        ]
        if self.memory is not None:
            hooks.append(MemoryHook(self.memory, clock=clock))
        return hooks

    def _evaluate(self, routing: Routing, *, learning: RouterLearning | None = None) -> dict[str, dict[str, float]]:
        step = self.state.step

        def on_batch() -> None:
            self._beat()
            self.faults.at("eval", step)
            if self.stop.agreed(device.taken()):
                raise CutShortError

        found = {}
        for name, mixture in self.held_out.items():
            found[name] = evaluate(
                self.config,
                stepper=self.stepper,
                mixture=mixture,
                groups=self.groups,
                batches=self.config.train.eval_batches,
                routing=routing,
                learning=learning,
                on_batch=on_batch,
            )
            learning = None
        return found

    def _beat(self) -> None:
        """A long piece of work goes on: it is no hang; a batch of it that never ends is one."""
        self.watchdog.beat(self.state.step)

    def _anomaly(self, event: str, **fields: Any) -> None:
        self.records.tell(event, **fields)
        if self.records.metrics is not None and event == "rollback":
            self.records.metrics.rolled_back(fields["number"])
