"""The load of a run on the file system and the scheduler of its cluster, by number of ranks.

Counts follow from the code and are checked by tests (`tests/unit/launch/test_cluster_load.py`,
`tests/distributed/test_grouped_saves.py`); seconds are computed from a given bandwidth.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mmscale.config import Config
from mmscale.plan.memory import checkpoint_bytes
from mmscale.plan.parameters import count_parameters

# Per checkpoint, for any number of ranks: index.json, .metadata, common.pt, metadata.json, mmscale.json, MANIFEST.json.
FILES_OF_RANK_0 = 6
# Per rank that writes: tensors, random state.
FILES_PER_WRITER = 2
RANDOM_STATE_BYTES = 20_000
# A launch folder: code.zip, config.yaml and environment.json, launch.json, job.json and budget.json; submitit's script,
# pickle, log and result.
LAUNCH_FILES = 6 + 4
# Interval in which lease.json is read by rank 0, by the first rank of each node, by all others [s].
LEASE_S = (1.0, 10.0, 60.0)
# Interval in which the supervisor checks for a stop request, and reads the run's progress [s].
STOP_S, PROGRESS_S = 1.0, 30.0
# Requests of one rank until it trains: opens, stat calls, and distinct files; nearly all for torch and megatron-core.
# Counted with strace for torch 2.13 (CPU) and Python 3.11; 900 of the requests are for the launch's archive.
OPENS_PER_RANK, LOOKS_PER_RANK, FILES_PER_NODE = 5_200, 46_000, 3_800
# Steps of SLURM at each start: node checks, all-reduces, ranks. Queries: whether the job was preempted.
STEPS_PER_START, QUESTIONS_PER_START = 3, 4
# Queries of `status --watch` and `logs --follow`, for any number of runs.
QUESTIONS_PER_VIEWER_HOUR = 120
STORAGE_GB_S = 10.0


@dataclass(frozen=True)
class ClusterLoad:
    """The load of a run on shared resources.

    Attributes:
        ranks, nodes: of the run.
        checkpoint_files: number of files of one checkpoint.
        checkpoint_bytes: of one checkpoint, without its index.
        checkpoint_s: seconds to write it at the given bandwidth.
        largest_file_bytes: of a checkpoint, if all writers write the same amount.
        storage_gb_s: the given bandwidth [GB/s].
        launch_files, log_files: of one start.
        start_opens, start_looks: open and stat requests of all ranks at a start, including those that a node's cache
            answers.
        start_files_per_node: distinct files among them, which each node has to read once.
        start_read_bytes: of the checkpoint at a resume: each file is hashed once and its tensors are read once.
        metadata_per_s: requests for small files during training [1/s].
        scheduler_per_start: steps and queries at a start.
        scheduler_per_hour: queries of a run during training, and of each user who watches it.
    """

    ranks: int
    nodes: int
    checkpoint_files: int
    checkpoint_bytes: float
    checkpoint_s: float
    largest_file_bytes: float
    storage_gb_s: float
    launch_files: int
    log_files: int
    start_opens: int
    start_looks: int
    start_files_per_node: int
    start_read_bytes: float
    metadata_per_s: float
    scheduler_per_start: int
    scheduler_per_hour: int
    scheduler_per_viewer_hour: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def writers(ranks: int, *, per_node: int, wanted: int) -> int:
    """Ranks that write files of a checkpoint.

    Args:
        ranks: of the run.
        per_node: ranks of a node.
        wanted: `checkpoint.writers`.
    """
    nodes, rest = divmod(ranks, per_node)
    if wanted == 0:
        return ranks
    return nodes * min(wanted, per_node) + min(wanted, rest)


def checkpoint_files(ranks: int, *, per_node: int, wanted: int) -> int:
    """Files of one checkpoint; the arguments are those of `writers`."""
    return FILES_PER_WRITER * writers(ranks, per_node=per_node, wanted=wanted) + FILES_OF_RANK_0


def lease_reads_per_s(ranks: int, *, per_node: int) -> float:
    """Reads of lease.json per second, for a run whose steps are shorter than the shortest interval."""
    nodes = math.ceil(ranks / per_node)
    first, of_node, other = LEASE_S
    return 1 / first + (nodes - 1) / of_node + (ranks - nodes) / other


def cluster_load(config: Config, ranks: int, *, per_node: int, storage_gb_s: float = STORAGE_GB_S) -> ClusterLoad:
    """The load of a run.

    Args:
        config: a configuration.
        ranks: of the run.
        per_node: ranks of a node.
        storage_gb_s: bandwidth of all ranks together to and from the shared file system [GB/s].
    """
    per_node = min(per_node, ranks)
    nodes = math.ceil(ranks / per_node)
    size = checkpoint_bytes(config, count_parameters(config)) + ranks * RANDOM_STATE_BYTES
    wanted = config.checkpoint.writers
    return ClusterLoad(
        ranks=ranks,
        nodes=nodes,
        checkpoint_files=checkpoint_files(ranks, per_node=per_node, wanted=wanted),
        checkpoint_bytes=size,
        checkpoint_s=size / (storage_gb_s * 1e9),
        largest_file_bytes=size / writers(ranks, per_node=per_node, wanted=wanted),
        storage_gb_s=storage_gb_s,
        launch_files=LAUNCH_FILES,
        log_files=ranks + 1,
        start_opens=ranks * OPENS_PER_RANK,
        start_looks=ranks * LOOKS_PER_RANK,
        start_files_per_node=FILES_PER_NODE,
        start_read_bytes=2 * size,
        metadata_per_s=lease_reads_per_s(ranks, per_node=per_node) + 1 / STOP_S + 1 / PROGRESS_S,
        scheduler_per_start=STEPS_PER_START + QUESTIONS_PER_START,
        scheduler_per_hour=0,
        scheduler_per_viewer_hour=QUESTIONS_PER_VIEWER_HOUR,
    )
