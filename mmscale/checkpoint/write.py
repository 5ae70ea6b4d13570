"""Plans and writes a rank's part of a save: planned while training waits, written by any process that has the memory.

The plan is a collective. Writing communicates with no other rank, so it can run in a forked process. shard_files.py
writes the files. saving.py schedules the work; train/state/ defines the state.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from mmscale.checkpoint import grouped, random_states, sharded, tensor_index
from mmscale.checkpoint.integrity import FileRecord
from mmscale.checkpoint.shard_files import Content, OnWrite, common_files, tensors_file, write_files, write_items
from mmscale.errors import MmscaleError
from mmscale.runtime import device

from megatron.core.dist_checkpointing.mapping import ShardedStateDict  # isort: skip
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess  # isort: skip
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper  # isort: skip
from megatron.core.dist_checkpointing.strategies.torch import (  # isort: skip
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)


@dataclass(frozen=True)
class WritePlan:
    """The data that this rank writes.

    Attributes:
        rank: of this process; names the file of its tensors.
        items: its tensors and objects, on the host.
        common: everything that is not a tensor; written by rank 0.
        metadata: the index of all ranks' tensors, without their places; on rank 0.
    """

    rank: int
    items: list[tuple[WriteItem, Any]]
    common: dict[str, Any]
    metadata: Metadata | None


@dataclass(frozen=True)
class Written:
    """The result of writing a rank's part.

    Attributes:
        files: records of its files by relative name.
        places: file, offset and length of each of its tensors.
        hash_s: seconds spent on digests.
    """

    files: dict[str, FileRecord] = field(default_factory=dict)
    places: list[WriteResult] = field(default_factory=list)
    hash_s: float = 0.0


class Planner:
    """Plans saves of a state whose structure stays the same; ranks exchange the unchanging part of plans only once."""

    def __init__(self) -> None:
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
        self._parallel = FullyParallelSaveStrategyWrapper(strategy, do_cache_distribution=True)
        self._rank = torch.distributed.get_rank()
        self._plan: SavePlan | None = None
        self._metadata: Metadata | None = None

    def plan(self, state: ShardedStateDict) -> WritePlan:
        """Every rank calls it; replicated tensors are distributed among ranks by size."""
        sharded.quiet()
        tensors, common = save_preprocess(state, validate_access_integrity=self._plan is None)
        self._parallel.apply_saving_parallelization(tensors)
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(flat), is_coordinator=self._rank == 0)
        local = planner.create_local_plan()
        if not self._as_before(local):
            self._metadata = self._agree(planner, local)
        self._plan = local
        final = planner.finish_plan(local)
        items = [(item, _on_host(planner.resolve_data(item))) for item in final.items]
        device.synchronize()  # the copies from the device may still be in progress
        return WritePlan(self._rank, items, common, self._metadata)

    def _as_before(self, plan: SavePlan) -> bool:
        """Whether every rank writes the same tensors as last time."""
        same = torch.tensor([int(plan == self._plan)], device=device.taken())
        torch.distributed.all_reduce(same, op=torch.distributed.ReduceOp.MIN)
        return bool(same.item())

    def _agree(self, planner: MCoreSavePlanner, plan: SavePlan) -> Metadata | None:
        first = self._rank == 0
        plans: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
        torch.distributed.gather_object(plan, plans)
        return planner.create_global_plan(plans)[1] if first else None


def _on_host(data: Any) -> Any:
    return data.to("cpu", non_blocking=True) if isinstance(data, Tensor) and not data.is_cpu else data


def write(plan: WritePlan, folder: Path, *, random: bytes, extra: Mapping[str, Content], on_write: OnWrite) -> Written:
    """Write this rank's files into a folder, which is created if it does not exist.

    Args:
        plan: what to write.
        folder: to write into.
        random: this rank's random state, serialized.
        extra: further files by relative name, each as a function that writes to a stream.
        on_write: called before every write with the name of the file and the number of bytes.

    Raises:
        OSError: writing failed.
    """
    places: list[WriteResult] = []
    contents: dict[str, Content] = {}
    if plan.items:
        name = tensors_file(plan.rank)
        contents[name] = lambda stream: places.extend(write_items(plan.items, name, stream))
    contents |= {**_firsts(plan), random_states.file_of(plan.rank): lambda stream: stream.write(random), **extra}
    files, hash_s = write_files(folder, contents, on_write=on_write)
    return Written(files, places, hash_s)


def write_for_group(
    plan: WritePlan,
    folder: Path,
    listener: grouped.Listener,
    *,
    random: bytes,
    extra: Mapping[str, Content],
    on_write: OnWrite,
    timeout_s: float,
) -> Written:
    """Write the files of a group of ranks, whose other ranks send theirs at the same time (`send_to_group`).

    Args:
        plan: this rank's part.
        folder: to write into.
        listener: of the group.
        random: this rank's random state, serialized.
        extra: as for `write`.
        on_write: as for `write`.
        timeout_s: how long another rank may take for a piece.

    Raises:
        OSError: writing failed.
        SaveError: another rank failed.
    """
    name, others = tensors_file(plan.rank), listener.group.ranks[1:]
    places: list[WriteResult] = []
    states, begins = {plan.rank: random}, {}

    def tensors(stream: io.BufferedWriter[Any]) -> None:
        places.extend(write_items(plan.items, name, stream))
        for rank in others:
            begins[rank] = stream.tell()
            listener.copy(rank, stream.write)
            state = io.BytesIO()
            listener.copy(rank, state.write)
            states[rank] = state.getvalue()

    contents = {
        name: tensors,
        **_firsts(plan),
        random_states.file_of_group(plan.rank): lambda stream: random_states.write(states, stream),
        **extra,
    }
    try:
        listener.accept(timeout_s=timeout_s)
        files, hash_s = write_files(folder, contents, on_write=on_write)
    except (OSError, MmscaleError) as error:
        listener.answer(problem=error.cause if isinstance(error, MmscaleError) else f"{error.strerror or error}")
        raise
    else:
        listener.answer(file=name, begins=begins)
    finally:
        listener.close()
    return Written(files, places, hash_s)


def send_to_group(
    plan: WritePlan, group: grouped.Group, number: int, *, random: bytes, on_write: OnWrite, timeout_s: float
) -> Written:
    """Send this rank's tensors to the first rank of a group, which writes them.

    Args:
        plan: this rank's part.
        group: of this rank.
        number: of the save.
        random: this rank's random state, serialized.
        on_write: called before every piece with the name of the file and the number of bytes.
        timeout_s: how long the first rank may take for a piece; it writes all ranks before this one first.

    Raises:
        SaveError: another rank failed.
    """
    name = tensors_file(group.first)
    places: list[WriteResult] = []

    def state(stream: io.BufferedWriter[Any]) -> None:
        stream.write(random)

    answer = grouped.send(
        group,
        number,
        plan.rank,
        (lambda stream: places.extend(write_items(plan.items, name, stream)), state),
        on_write=lambda size: on_write(name, size),
        timeout_s=timeout_s,
    )
    begin = answer["begins"][f"{plan.rank}"]
    return Written(places=[_moved(place, begin) for place in places])


def _moved(place: WriteResult, by: int) -> WriteResult:
    where = dataclasses.replace(place.storage_data, offset=place.storage_data.offset + by)
    return dataclasses.replace(place, storage_data=where)


def _firsts(plan: WritePlan) -> dict[str, Content]:
    """The files that rank 0 writes for all ranks."""
    return common_files(plan.common) if plan.rank == 0 else {}


def write_index(plan: WritePlan, parts: list[Written], folder: Path, *, on_write: OnWrite) -> dict[str, FileRecord]:
    """Write the index of all ranks' tensors, in our format and torch's. Rank 0 calls it when all ranks have written.

    Raises:
        OSError: writing failed.
    """
    assert plan.metadata is not None
    contents = tensor_index.files(plan.metadata, (place for part in parts for place in part.places))
    return write_files(folder, contents, on_write=on_write)[0]
