"""The save methods that `mmscale bench checkpoint` compares: ours, megatron-core's and torch's, of the same model.

Each returns the seconds for which training waits, and the seconds until everything is on disk.
"""

from __future__ import annotations

import gc
import queue
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import async_save

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.checkpoint.save_settings import SaveSettings
from mmscale.config import Config
from mmscale.data.vocab import Vocabulary
from mmscale.errors import TrainingError
from mmscale.runtime import groups
from mmscale.train.assembly import build
from mmscale.train.optim.shards import save_shardwise
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.state.train_state import TrainState
from mmscale.train.steps.batch import to_device

OURS, PEERS = ("sync", "async"), ("megatron", "megatron_async", "torch_async")
WAYS = (*OURS, *PEERS)
STEP_WAYS = ("alone", "while_saving")


@dataclass(frozen=True)
class Save:
    """Seconds of one save, of the slowest rank: until training continues, and until everything is on disk."""

    blocked: float
    total: float


class Measured:
    """A model that has taken a step, and the ways to save it; every rank has one.

    Args:
        config: the model.
        folder: to write into.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        collection = groups.collection()
        self.parts = build(config, collection)
        self.state = TrainState(self.parts.chunks, self.parts.optimizer)
        share = config.model.experts.share
        assert isinstance(share, dict)
        mixture, vocabulary = SyntheticMixture(config, share=share), Vocabulary.from_config(config.vocab)
        self.batches = [
            to_device(mixture.micro_batch(number), vocabulary)
            for number in range(self.rank, config.train.global_batch_size, self.size)
        ]
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.managers = {way: self._manager(way) for way in OURS}
        self.calls = AsyncCallsQueue()
        self._results: Any = None  # the manager process of megatron-core's asynchronous saves: one, as in a run
        self.step()
        gc.collect()
        gc.freeze()  # as in training

    def _manager(self, way: str) -> CheckpointManager:
        return CheckpointManager(
            self.folder / way,
            every=0,
            keep=2,
            attempt=1,
            info={},
            on_event=lambda event, **fields: self.events.append((event, fields)),
            saves=SaveSettings(asynchronous=way == "async"),
        )

    def step(self) -> None:
        """An optimizer step."""
        self.parts.stepper.train(self.batches, lr=1e-4)
        self.state.step += 1

    def ours(self, way: str) -> Save:
        """Save as in training: boxes of the state without gathering, hashed, committed."""
        saver = self.managers[way].saver

        def begin() -> None:
            self.managers[way].save(self.state)

        save = timed(begin, saver.finish)
        if saver.failures:
            raise TrainingError(f"a save failed: {self.events}", remedy="look at the disk of the folder")
        events = [fields for event, fields in self.events if event == "save_committed"]
        # On rank 0 this includes the work at later step boundaries: gathering records and starting the commit.
        blocked = events[-1]["blocked_s"] if events and way == "async" else save.blocked
        return Save(slowest(blocked), save.total)

    def megatron(self, way: str) -> Save:
        """Plain dist_checkpointing of the state as gathered by megatron-core's optimizer; no digests, no commit."""
        folder = self._new(way)
        asynchronous = way == "megatron_async"
        if asynchronous:
            filesystem_async._results_queue = self._results
            self._results = filesystem_async._get_write_results_queue()
        else:
            filesystem_async._results_queue = queue.Queue()

        def begin() -> None:
            with _gathering(self.state):
                state = self.state.sharded(loading=False)
            request = dist_checkpointing.save(state, str(folder), ("torch_dist", 1), async_sharded_save=asynchronous)
            if request is not None:
                self.calls.schedule_async_request(request)

        save = timed(begin, lambda: self.calls.maybe_finalize_async_calls(blocking=True))
        self._remove(folder)
        return save

    def torch_async(self, way: str) -> Save:
        """torch.distributed.checkpoint.async_save of the same bytes, as separate tensors of each rank."""
        folder = self._new(way)
        futures: list[Any] = []
        save = timed(
            lambda: futures.append(async_save(dict(self.tensors()), checkpoint_id=str(folder))),
            lambda: futures[0].result(),
        )
        self._remove(folder)
        return save

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that this rank writes in a save: its part of the optimizer's state and every n-th weight."""
        found: dict[str, Tensor] = {}
        optimizers = getattr(self.parts.optimizer, "chained_optimizers", [self.parts.optimizer])
        for number, optimizer in enumerate(optimizers):
            for group in optimizer.optimizer.param_groups:
                for index, part in enumerate(group["params"]):
                    name = f"{self.rank}.{number}.{len(found)}.{index}"
                    found[f"{name}.param"] = part.detach()
                    found |= {f"{name}.{key}": value for key, value in optimizer.optimizer.state[part].items()}
        weights = [weight for chunk in self.parts.chunks for weight in chunk.parameters()]
        found |= {f"{self.rank}.weight.{i}": w.detach() for i, w in enumerate(weights) if i % self.size == self.rank}
        return found

    def _new(self, way: str) -> Path:
        folder = self.folder / way / f"step_{self.state.step}"
        if self.rank == 0:
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        return folder

    def _remove(self, folder: Path) -> None:
        torch.distributed.barrier()
        if self.rank == 0:
            shutil.rmtree(folder)

    def step_times(self, steps: int) -> dict[str, float]:
        """Seconds of a step, alone and during an asynchronous save, of the slowest rank."""
        seen: dict[str, list[float]] = {way: [] for way in STEP_WAYS}
        manager = self.managers["async"]
        for way in STEP_WAYS:
            while len(seen[way]) < steps:
                if way == "while_saving" and not manager.saver.under_way:
                    manager.save(self.state)
                begin = time.perf_counter()
                self.step()
                seen[way].append(slowest(time.perf_counter() - begin))
                status = torch.tensor(manager.saver.status())
                torch.distributed.all_reduce(status, op=torch.distributed.ReduceOp.MAX)
                manager.saver.advance(*map(int, status.tolist()))
        manager.saver.finish()
        return {way: statistics.median(times) for way, times in seen.items()}


class _gathering:  # noqa: N801  a context manager
    """Inside, the optimizer's state is gathered on every rank, as megatron-core does."""

    def __init__(self, state: TrainState) -> None:
        self.optimizer = state.optimizer

    def __enter__(self) -> None:
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            part.__class__ = DistributedOptimizer

    def __exit__(self, *_: object) -> None:
        assert self.optimizer is not None
        save_shardwise(self.optimizer)


def timed(begin: Callable[[], object], finish: Callable[[], object]) -> Save:
    """Time both parts; every rank calls it at the same time."""
    torch.distributed.barrier()
    started = time.perf_counter()
    begin()
    blocked = time.perf_counter() - started
    finish()
    total = time.perf_counter() - started
    return Save(slowest(blocked), slowest(total))


def slowest(seconds: float) -> float:
    """The maximum over all ranks."""
    value = torch.tensor([seconds], dtype=torch.float64)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return float(value)
