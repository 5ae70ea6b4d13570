"""One attempt of a run, from a configuration to an exit status: builds the parts in order and puts them together.

The only place that knows model, data, checkpoint and resilience at once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.checkpoint import integrity
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.checkpoint.save_settings import SaveSettings
from mmscale.checkpoint.shape import check_shape, shape_of
from mmscale.config import Config
from mmscale.config.derived import global_micro_batches
from mmscale.config.load import digest, dump
from mmscale.data.loader import BatchLoader
from mmscale.data.manifest import named_sources, read_manifest
from mmscale.data.mixture import Mixture, nominal_share, open_mixture
from mmscale.data.vocab import Vocabulary
from mmscale.errors import TrainingError
from mmscale.model.build import build_chunks, transformer_config
from mmscale.model.mixed_modal import Routing
from mmscale.plan import flops_per_token, plan
from mmscale.resilience.inject import Faults
from mmscale.resilience.lease import Fence, FencedError, launched_attempt
from mmscale.resilience.memory_tier import MemoryTier
from mmscale.resilience.signals import StopRequest
from mmscale.runtime import device, random_state
from mmscale.runtime import groups as process_groups
from mmscale.runtime.environment import code_version
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.auxiliary import AuxiliaryTrainer
from mmscale.train.batch import to_device
from mmscale.train.companions import companions_of, routers_among
from mmscale.train.evaluate import evaluate
from mmscale.train.hooks import EvalHook, LogHook, PlaceHook, ReplicaHook
from mmscale.train.loop import Hook, Trainer
from mmscale.train.memory import MemoryHook, go_on, memory_of
from mmscale.train.metrics import EventLog, MetricsLog, next_attempt, write_environment
from mmscale.train.optim import make_optimizer, wrap
from mmscale.train.preflight import check_changes, preflight
from mmscale.train.progress import Progress, banner
from mmscale.train.state import TrainState
from mmscale.train.step import Stepper
from mmscale.train.step_guard import StepGuard
from mmscale.train.throughput import SAVE_STALL, Throughput, peak_tflops

FINISHED, STOPPED = 0, 75


@dataclass
class Parts:
    """What computes: the model's chunks, its optimizer, the process groups they live in, and a joint run's routers."""

    groups: ProcessGroupCollection
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    stepper: Stepper
    routers: AuxiliaryTrainer | None = None


@dataclass
class Records:
    """What rank 0 writes about the attempt; None elsewhere."""

    metrics: MetricsLog
    events: EventLog


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
        with StopRequest() as stop:
            return _attempt(config, env, groups, train_data, held_out, stop, yes=yes)
    finally:
        process_groups.finalize()


def resolve_share(config: Config) -> Config:
    """The configuration with nominal modality shares as numbers: measured from the data if they were 'auto'."""
    if config.model.kind == "dense" or config.model.experts.share != "auto":
        return config
    share = {name: round(value, 6) for name, value in nominal_share(config).items()}
    experts = config.model.experts.model_copy(update={"share": share})
    return config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})


def start(config: Config, env: RankEnv) -> ProcessGroupCollection:
    """Seeds, torch.distributed and megatron's process groups."""
    device.keep_host_memory()
    device.set_seeds(config.run.seed)
    parallel = config.parallel
    return process_groups.initialize(
        env, tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, seed=config.run.seed
    )


def build(config: Config, groups: ProcessGroupCollection) -> Parts:
    """The model with its initial weights, wrapped, its optimizer and the stepper."""
    transformer = transformer_config(config)
    chunks = wrap(config, transformer, build_chunks(config, groups, transformer=transformer), groups)
    optimizer = make_optimizer(config, chunks, groups)
    companions = companions_of(config, transformer, chunks, groups)
    stepper = Stepper(config, chunks, optimizer, groups, companions=companions)
    return Parts(groups, chunks, optimizer, stepper, routers_among(companions))


def _attempt(
    config: Config,
    env: RankEnv,
    groups: ProcessGroupCollection,
    train_data: Mixture,
    held_out: Mixture,
    stop: StopRequest,
    *,
    yes: bool,
) -> int:
    run = Path(config.run.dir) / config.run.name
    attempt = _agree((launched_attempt(run) or next_attempt(run)) if env.rank == 0 else None)
    parts = build(config, groups)
    state = TrainState(parts.chunks, parts.optimizer, routers=parts.routers)
    with contextlib.ExitStack() as stack:
        fence = Fence.of_rank(run, env.rank)
        records = stack.enter_context(_records(config, run, attempt, fence)) if env.rank == 0 else None
        progress = stack.enter_context(Progress(config.train.steps, enabled=env.rank == 0))
        faults = Faults.of_rank(env.rank)
        checkpoints = _checkpoints(config, run, attempt, records, progress, faults, fence)
        stack.callback(checkpoints.saver.close)
        memory = stack.enter_context(
            memory_of(config, env, run=run, attempt=attempt, tell=functools.partial(_event, records), warn=progress.say)
        )
        changed = _resume(config, checkpoints, memory if config.checkpoint.resume else None, state, yes=yes)
        if env.rank == 0:
            shares = config.model.experts.share
            progress.say(
                banner(
                    config,
                    world_size=env.world_size,
                    device=device.device_name(),
                    plan=plan(config),
                    share=shares if isinstance(shares, dict) else None,
                    attempt=attempt,
                    start_step=state.step,
                )
            )
        for line in changed or ():
            progress.say(f"changed since the checkpoint: {line}")
        if state.step >= config.train.steps:
            progress.say(f"{run} is done: {state.step} of {config.train.steps} steps; raise train.steps to go on")
            return FINISHED
        begun = "start" if changed is None else "resume"
        _event(records, begun, step=state.step, world_size=env.world_size, attempt_id=fence.lease_id)
        if config.train.dry_run:
            with random_state.preserved():  # the next step draws what it would have drawn without a restart
                _dry_run(config, parts, train_data)
        clock = Throughput(
            flops_per_token=flops_per_token(config).training,
            world_size=env.world_size,
            peak_tflops=peak_tflops(device.device_name(), config.precision.dtype),
        )
        metrics = records.metrics if records else None
        hooks: list[Hook] = [
            ReplicaHook(
                config, stepper=parts.stepper, groups=groups, clock=clock, tell=functools.partial(_event, records)
            ),
            LogHook(config, clock=clock, progress=progress, metrics=metrics, saves=checkpoints.saver.figures),
            EvalHook(
                config,
                evaluate=lambda routing: _evaluate(config, parts, held_out, state, faults, routing),
                clock=clock,
                progress=progress,
                metrics=metrics,
                events=records.events if records else None,
            ),
            PlaceHook(faults.at),
        ]
        if memory is not None:
            memory.start()
            hooks.append(MemoryHook(memory, clock=clock))
        loader = _loader(config, groups, train_data, consumed=state.sequences)
        stack.callback(loader.close)
        guard = StepGuard(
            config,
            state=state,
            stepper=parts.stepper,
            load_newest=lambda: _load_newest(checkpoints, memory, state, clock),
            go_on_at=lambda sequences: loader.load_state_dict({"consumed_sequences": sequences}),
            tell=functools.partial(_anomaly, records),
            warn=progress.say,
        )
        trainer = Trainer(
            config,
            state=state,
            stepper=parts.stepper,
            guard=guard,
            batches=loader,
            vocabulary=Vocabulary.from_config(config.vocab),
            hooks=hooks,
            checkpoints=checkpoints,
            stop_requested=functools.partial(_border, stop, checkpoints, clock, fence),
            clock=clock,
        )
        # megatron-core collects garbage in every save while all wait: what is there now stays, and is not looked at.
        gc.collect()
        gc.freeze()
        try:
            finished = trainer.fit()
        except TrainingError:  # the same on every rank, so the save that is under way can still be committed
            checkpoints.saver.finish()
            raise
        _event(records, "finish" if finished else "stop", step=state.step, signal=stop.agreed_name)
        if not finished:
            progress.say(f"stopped on request after step {state.step}; start it again to go on")
        return FINISHED if finished else STOPPED


def _evaluate(
    config: Config, parts: Parts, held_out: Mixture, state: TrainState, faults: Faults, routing: Routing
) -> dict[str, float]:
    faults.at("eval", state.step)
    batches = config.train.eval_batches
    return evaluate(
        config, stepper=parts.stepper, mixture=held_out, groups=parts.groups, batches=batches, routing=routing
    )


def _border(stop: StopRequest, checkpoints: CheckpointManager, clock: Throughput, fence: Fence) -> bool:
    """Between two steps: whether to stop, and how far the save has come that is under way, in one collective."""
    fence.look()
    saver = checkpoints.saver
    stopping, (working, failed) = stop.agreed_with(device.taken(), *saver.word())
    if saver.under_way:
        with clock.measure(SAVE_STALL):
            saver.advance(working, failed)
    return stopping


def _checkpoints(
    config: Config, run: Path, attempt: int, records: Records | None, progress: Progress, faults: Faults, fence: Fence
) -> CheckpointManager:
    def tell(event: str, **fields: Any) -> None:
        _event(records, event, **fields)
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
        return {"step": step, "sequences": step * config.train.global_batch_size}

    return CheckpointManager(
        run,
        every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        attempt=attempt,
        info={
            "shape": shape_of(config),
            "config": config.model_dump(mode="json"),
            "config_digest": digest(config),
            "attempt": attempt,
            "tokenizers": read_manifest(Path(named_sources(config)[0].path)).tokenizers,
        },
        on_event=tell,
        saves=SaveSettings(
            asynchronous=config.checkpoint.asynchronous,
            deadline_s=config.checkpoint.deadline,
            max_failures=config.checkpoint.max_failures,
        ),
        on_point=faults.at,
        on_stage=lambda stage: fence.check(),
        keep_every=config.checkpoint.keep_every,
        allow_missing=config.checkpoint.allow_missing,
        seed=config.run.seed,
        code_version=code_version() if records is not None else "",
        default_progress=counters,
    )


def _resume(
    config: Config, checkpoints: CheckpointManager, memory: MemoryTier | None, state: TrainState, *, yes: bool
) -> list[str] | None:
    """Go on from memory or from the newest whole checkpoint, whichever is newer.

    Returns:
        The settings changed since then in words; None for a new run.
    """
    on_disk = _agree(max(checkpoints.store.steps(), default=0))
    if go_on(memory, state, above=on_disk):  # nothing on disk could be newer, so nothing there is read
        return []
    newest = checkpoints.choose()
    if (newest or 0) < on_disk and go_on(memory, state, above=newest or 0):
        return []
    if newest is None:
        return None
    store = checkpoints.store
    info = _agree(store.info(newest) if torch.distributed.get_rank() == 0 else None)
    check_shape(config, info.get("shape", {}), where=str(store.path(newest)))
    lines = check_changes(config, info, where=str(store.path(newest)), yes=yes)
    checkpoints.load(state, newest)
    return lines


def _load_newest(
    checkpoints: CheckpointManager, memory: MemoryTier | None, state: TrainState, clock: Throughput
) -> int | None:
    """Go back to the newest whole checkpoint; its step, or None where there is none."""
    with clock.measure("rollback_s"):
        newest = checkpoints.choose()
        if newest is not None:
            checkpoints.load(state, newest)
            if memory is not None:
                memory.forget()
    return newest


def _anomaly(records: Records | None, event: str, **fields: Any) -> None:
    _event(records, event, **fields)
    if records is not None and event == "rollback":
        records.metrics.rolled_back(fields["number"])


def _dry_run(config: Config, parts: Parts, data: Mixture) -> None:
    """One batch forward and backward without an update: finds errors of shape and memory before step 1."""
    size, rank = parts.groups.dp.size(), parts.groups.dp.rank()
    numbers = range(rank, global_micro_batches(config), size)
    vocabulary = Vocabulary.from_config(config.vocab)
    parts.stepper.accumulate([to_device(data.micro_batch(number), vocabulary) for number in numbers])
    device.synchronize()


def _loader(config: Config, groups: ProcessGroupCollection, data: Mixture, *, consumed: int) -> BatchLoader:
    loader = BatchLoader(
        data,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        micro_batches_per_step=global_micro_batches(config),
        workers=config.data.workers,
    )
    loader.load_state_dict({"consumed_sequences": consumed})
    return loader


@contextlib.contextmanager
def _records(config: Config, run: Path, attempt: int, fence: Fence) -> Iterator[Records]:
    """The run's folder with its configuration and environment, and the open logs."""
    run.mkdir(parents=True, exist_ok=True)
    fence.check()
    text = dump(config)
    for name in (f"config.{attempt}.yaml", "config.yaml"):
        temporary = run / f"{name}.tmp"
        temporary.write_text(text)
        temporary.replace(run / name)
    write_environment(run)
    metrics = MetricsLog(
        run, attempt=attempt, tensorboard=config.log.tensorboard, wandb=config.log.wandb, may_write=fence.check
    )
    events = EventLog(run, attempt, may_write=fence.check)
    try:
        yield Records(metrics, events)
    except FencedError:
        raise  # not a line more
    except BaseException as error:
        events.add("fault", error=type(error).__name__, message=str(error)[:500])
        raise
    finally:
        metrics.close()
        events.close()


def _event(records: Records | None, event: str, **fields: Any) -> None:
    if records is not None:
        records.events.add(event, **fields)


def _agree(value: Any) -> Any:
    """Rank 0's value on every rank: all look at one folder, and a shared file system may show them different things."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
