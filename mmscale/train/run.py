"""One attempt of a run, from a configuration to an exit status: puts the parts together in order.

The only place, with the auxiliary stage, that knows model, data, checkpoint and resilience at once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config import Config
from mmscale.config.notes import notes
from mmscale.data.identity import identities, known
from mmscale.data.manifest import read_blend
from mmscale.data.mixture import Mixture, open_mixture
from mmscale.data.segments import go_on
from mmscale.data.vocab import Vocabulary
from mmscale.errors import CheckpointError, TrainingError
from mmscale.model.mixed_modal import Routing
from mmscale.plan import flops_per_token, plan
from mmscale.resilience import flight_recorder
from mmscale.resilience.inject import Faults
from mmscale.resilience.lease import Fence, launched_attempt
from mmscale.resilience.memory_tier import MemoryTier
from mmscale.resilience.signals import StopRequest
from mmscale.resilience.watchdog import Watchdog
from mmscale.runtime import device
from mmscale.runtime import groups as process_groups
from mmscale.runtime.groups import from_first
from mmscale.runtime.rank_env import RankEnv
from mmscale.train import saves
from mmscale.train.evaluate import evaluate
from mmscale.train.hooks import EvalHook, LogHook, PlaceHook, ReplicaHook
from mmscale.train.layers_log import LayersHook
from mmscale.train.loop import Hook, Trainer
from mmscale.train.memory import MemoryHook, memory_of
from mmscale.train.metrics import next_attempt
from mmscale.train.parts import Parts, build, dry_run, loader_of, resolve_share, start
from mmscale.train.preflight import preflight, tokenizers_of
from mmscale.train.progress import Progress, banner
from mmscale.train.records import Records, open_records
from mmscale.train.state import TrainState
from mmscale.train.step_guard import StepGuard
from mmscale.train.stragglers import RankTimes
from mmscale.train.throughput import Throughput, peak_tflops

FINISHED, STOPPED = 0, 75


def main(config: Config, env: RankEnv, *, yes: bool = False) -> int:
    """Run one attempt on this rank.

    Args:
        config: the configuration; `model.experts.share` may be 'auto'.
        env: this process's place among the ranks.
        yes: go on from a checkpoint although the objective or the data have changed since.

    Returns:
        0: trained to the last step; 75: stopped on request after a committed save.

    Raises:
        MmscaleError: something that the user can mend; the same on every rank where it can be.
    """
    preflight(config, world_size=env.world_size, yes=yes)
    config = resolve_share(config)
    vocabulary = Vocabulary.from_config(config.vocab)
    train_data = open_mixture(config, "train", vocabulary=vocabulary)
    held_out = open_mixture(config, "validation", vocabulary=vocabulary)
    groups = start(config, env)
    try:
        with StopRequest() as stop, contextlib.ExitStack() as stack:
            return _Attempt(config, env, groups, train_data, held_out, stop, stack).run(yes=yes)
    finally:
        process_groups.finalize()


class _Attempt:
    """One attempt. Every rank holds one; all its methods are called on every rank.

    What must be closed goes on the stack as soon as it is open.
    """

    def __init__(
        self,
        config: Config,
        env: RankEnv,
        groups: ProcessGroupCollection,
        train_data: Mixture,
        held_out: Mixture,
        stop: StopRequest,
        stack: contextlib.ExitStack,
    ) -> None:
        self.config, self.env, self.groups, self.stop, self.stack = config, env, groups, stop, stack
        self.train_data, self.held_out = train_data, held_out
        self.folder = Path(config.run.dir) / config.run.name
        self.fence = Fence.of_rank(self.folder, env.rank)
        self.faults = Faults.of_rank(env.rank)
        first = env.rank == 0
        self.number = from_first((launched_attempt(self.folder) or next_attempt(self.folder)) if first else None)
        self.parts: Parts = build(config, groups)
        self.state = TrainState(self.parts.chunks, self.parts.optimizer, routers=self.parts.routers)
        self.records: Records = stack.enter_context(
            open_records(self.folder, attempt=self.number, rank=env.rank, fence=self.fence, log=config.log)
        )
        self.progress: Progress = stack.enter_context(Progress(config.train.steps, enabled=first))
        self.data = from_first(identities(config, read_blend(config)) if first else None)
        self.checkpoints: CheckpointManager = saves.manager_of(
            config,
            self.folder,
            attempt=self.number,
            tokenizers=from_first(tokenizers_of(self.folder, train_data.tokenizers) if first else None),
            data=self.data,
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
            flops_per_token=flops_per_token(config).training,
            world_size=env.world_size,
            peak_tflops=peak_tflops(device.device_name(), config.precision.dtype),
        )

    def run(self, *, yes: bool) -> int:
        """Resume or start, train to the end or to a request to stop; the exit status."""
        config, state = self.config, self.state
        memory = self.memory if config.checkpoint.resume else None
        changed = saves.resume(config, self.checkpoints, memory, state, data=self.data, yes=yes)
        self._announce(changed or [])
        if state.step >= config.train.steps:
            self.progress.say(
                f"{self.folder} is done: {state.step} of {config.train.steps} steps; raise train.steps to go on"
            )
            return FINISHED
        self.records.begin(config, self.folder, attempt=self.number)
        self._find_place()
        begun = "start" if changed is None else "resume"
        self.records.tell(begun, step=state.step, world_size=self.env.world_size, attempt_id=self.fence.lease_id)
        if config.train.dry_run:
            dry_run(config, self.parts, self.train_data)
        trainer = self._trainer()
        if self.memory is not None:
            self.memory.start()
        # megatron-core collects garbage in every save while all wait: what is there now stays, and is not looked at.
        gc.collect()
        gc.freeze()
        self.clock.restart()  # loading and the dry run are start-up, and no part of the first step's time
        try:
            with self.watchdog:
                finished = trainer.fit()
        except TrainingError:  # the same on every rank, so the save that is under way can still be committed
            self.checkpoints.saver.finish()
            raise
        self.records.tell("finish" if finished else "stop", step=state.step, signal=self.stop.agreed_name)
        if not finished:
            self.progress.say(f"stopped on request after step {state.step}; start it again to go on")
        return FINISHED if finished else STOPPED

    def _find_place(self) -> None:
        """Go on in the data with what was not read, and say what changed in its order."""
        state, store = self.state, self.checkpoints.store
        info: dict[str, Any] = {}
        if state.sequences and not state.stream:  # its settings say what the number means
            info = from_first(store.info(state.step) if self.env.rank == 0 else None)
        place = go_on(
            self.config,
            self.train_data,
            data=self.data,
            consumed=state.sequences,
            segments=state.stream,
            saved=info.get("config"),
            known=known(info),
        )
        self.train_data, state.stream = place.mixture, place.segments
        for line in place.lines:
            self.progress.say(f"changed since the checkpoint: {line}")

    def _announce(self, changed: list[str]) -> None:
        shares = self.config.model.experts.share
        if self.env.rank == 0:
            self.progress.say(
                banner(
                    self.config,
                    world_size=self.env.world_size,
                    device=device.device_name(),
                    plan=plan(self.config),
                    share=shares if isinstance(shares, dict) else None,
                    attempt=self.number,
                    start_step=self.state.step,
                )
            )
        if self.faults.text:
            self.records.tell("faults_requested", faults=self.faults.text)
        for line in (*self.faults.warnings(), *notes(self.config)):
            self.progress.say(line)
        for line in changed:
            self.progress.say(f"changed since the checkpoint: {line}")

    def _trainer(self) -> Trainer:
        loader = loader_of(self.config, self.groups, self.train_data, consumed=self.state.sequences)
        self.stack.callback(loader.close)
        times = RankTimes(
            self.config,
            stepper=self.parts.stepper,
            state=self.state,
            begun=functools.partial(self.faults.at, "begin"),
        )
        guard = StepGuard(
            self.config,
            state=self.state,
            stepper=self.parts.stepper,
            load_newest=self._load_newest,
            go_on_at=lambda sequences: loader.load_state_dict({"consumed_sequences": sequences}),
            tell=self._anomaly,
            warn=self.progress.say,
        )
        return Trainer(
            self.config,
            state=self.state,
            stepper=self.parts.stepper,
            guard=guard,
            batches=times.watch(loader),
            vocabulary=Vocabulary.from_config(self.config.vocab),
            hooks=self._hooks(times),
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
        stopping = saves.border(self.stop, self.checkpoints, self.clock, self.fence)
        if stopping:
            self.watchdog.beat(step, allowed_s=checkpoint.deadline)
        return stopping

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

    def _hooks(self, times: RankTimes) -> list[Hook]:
        config, clock, records = self.config, self.clock, self.records
        hooks: list[Hook] = [
            times,
            ReplicaHook(config, stepper=self.parts.stepper, groups=self.groups, clock=clock, tell=records.tell),
            LogHook(
                config,
                clock=clock,
                progress=self.progress,
                metrics=records.metrics,
                more=lambda: self.checkpoints.saver.figures() | times.figures(),
            ),
            LayersHook(config, groups=self.groups, metrics=records.metrics),
            EvalHook(
                config,
                evaluate=self._evaluate,
                clock=clock,
                progress=self.progress,
                metrics=records.metrics,
                events=records.events,
            ),
            PlaceHook(self.faults.at),
        ]
        if self.memory is not None:
            hooks.append(MemoryHook(self.memory, clock=clock))
        return hooks

    def _evaluate(self, routing: Routing) -> dict[str, float]:
        step = self.state.step

        def on_batch() -> None:
            self.watchdog.beat(step)  # a long evaluation is no hang; a batch that never ends is one
            self.faults.at("eval", step)

        return evaluate(
            self.config,
            stepper=self.parts.stepper,
            mixture=self.held_out,
            groups=self.groups,
            batches=self.config.train.eval_batches,
            routing=routing,
            on_batch=on_batch,
        )

    def _anomaly(self, event: str, **fields: Any) -> None:
        self.records.tell(event, **fields)
        if self.records.metrics is not None and event == "rollback":
            self.records.metrics.rolled_back(fields["number"])
