"""Display names for the names in a run's files, for output that people read."""

from __future__ import annotations

from typing import Any

# Parts of a run's time (launch/goodput.py).
TIME_PARTS = {
    "start_up": "start-up",
    "steps": "steps that count",
    "save_stall": "save stalls",
    "evaluation": "evaluation",
    "lost": "lost and repeated",
    "other": "other",
    "waiting": "waiting between attempts",
}
# Events that need attention, in words that say what was counted (docs/reference/run_folder.md).
EVENTS = {
    "checkpoint_bad": "damaged checkpoints, which were renamed",
    "checkpoint_unverified": "checkpoints that were loaded without a check of their digests",
    "cordoned": "nodes that were excluded after a failed check",
    "data_damaged": "data files that had changed",
    "data_unread": "data files that could not be read",
    "died": "attempts that ended without a record: they were killed",
    "disk_good": "ends of outages of the disk",
    "disk_refused": "outages of the disk",
    "diverged_rank": "replicas whose parameters differed",
    "fault": "attempts that ended with an error",
    "fault_transient": "results that were not finite, and were finite when computed again",
    "faults_requested": "starts with injected faults (MMSCALE_FAULTS)",
    "gave_up": "ends because the budget of restarts was spent",
    "handed_over": "jobs that another job of the launch continued",
    "hang": "hangs",
    "held_out_rising": "warnings: the held-out loss rose three times in a row",
    "log_off": "sinks that were turned off after an error",
    "memory_off": "times that snapshots in memory were switched off",
    "memory_refused": "snapshots in memory that were not used",
    "memory_restored": "resumes from a snapshot in memory",
    "mirror_failed": "uploads to the mirror that failed and were tried again",
    "mirror_refused": "damaged checkpoints that were not uploaded",
    "no_gradient": "warnings: the gradient was 0 for many steps",
    "not_begun": "starts in which ranks did not begin to train in time",
    "not_requeued": "requeues that SLURM refused",
    "optimizer_fresh": "starts without the optimizer state of the checkpoint",
    "preflight_failed": "failed checks of nodes",
    "random_state_fresh": "starts without the random state of the checkpoint",
    "rollback": "roll-backs to a checkpoint after a spike",
    "run_moved": "ends because the run's folder was renamed",
    "save_failed": "saves that failed",
    "save_skipped": "saves that were skipped because one was in progress",
    "skip": "batches that were skipped",
    "spike": "spikes: steps whose loss or gradient norm was far above those before",
}
_SECONDS = "_s"


def in_words(name: str) -> str:
    """The words of a name: `save_committed` is "save committed"."""
    return name.replace("_", " ")


def field_in_words(name: str, value: Any) -> str:
    """A field of an event: `blocked_s`, 0.3289 is "blocked 0.3289 s"."""
    if name.endswith(_SECONDS) and isinstance(value, int | float):
        return f"{in_words(name.removesuffix(_SECONDS))} {value} s"
    return f"{in_words(name)} {value}"
