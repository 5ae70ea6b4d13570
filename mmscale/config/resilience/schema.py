"""Settings of checkpoints and of recovery from faults (`checkpoint`, `resilience`).

Rules between them are in rules.py.
"""

from __future__ import annotations

from typing import Literal

from mmscale.config.section import Count, Index, Positive, Rate, Seconds, Section, setting


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept."""

    every: Index = setting("Save every n steps; 0: only at the end.", 0, unit="steps")
    keep: Count = setting(
        "Number of newest checkpoints to keep; at least two verified ones always stay.", 3, unit="checkpoints"
    )
    keep_every: Index = setting("Keep checkpoints of every n-th step permanently; 0: none.", 0, unit="steps")
    early: Index = setting(
        "Also save after steps 1, 2, 4, 8, ... up to this one, and keep these checkpoints permanently, to study the "
        "beginning of training. Main stage only; 0: none.",
        0,
        unit="steps",
        source="Pythia, arXiv 2304.01373, section 2.1: 512",
    )
    keep_best: str | None = setting(
        "Keep the checkpoint with the lowest value of this held-out figure (a key of metrics.jsonl, e.g. eval/loss) "
        "in addition to the newest ones. An evaluation that finds a new lowest value is followed by a save. Commands "
        "accept this checkpoint as RUN@best.",
        None,
    )
    allow_missing: bool = setting(
        "Resume from a checkpoint that lacks its manifest, counters, random state or optimizer state.", False
    )
    resume: bool = setting("Resume from the run's newest checkpoint if there is one.", True)
    asynchronous: bool = setting(
        "Continue training while a forked process of every rank writes; false: the ranks write themselves. A host "
        "needs memory for up to twice the training state.",
        True,
    )
    deadline: Seconds = setting(
        "An asynchronous save that takes longer than this fails; training continues.", 900.0, unit="seconds"
    )
    writers: Index = setting(
        "Number of ranks of each node that write, also for the other ranks of the node. Fewer writers make fewer files "
        "and fewer concurrent streams. 0: every rank writes its own two files.",
        0,
        unit="ranks per node",
    )
    max_failures: Count = setting("Failed saves in a row that end the attempt (exit 74).", 3, unit="saves")
    mirror: str | None = setting(
        "Folder in an object store or another file system (s3://BUCKET/FOLDER, gs://..., file:///...) to which "
        "committed checkpoints are copied, below run.name. Credentials come from the environment. A mirror that fails "
        "never ends training.",
        None,
    )
    mirror_keep: Count = setting(
        "Number of newest checkpoints to keep in the mirror, in addition to those of keep_every, early and keep_best.",
        2,
        unit="checkpoints",
    )
    mirror_bandwidth: Rate = setting(
        "Largest number of bytes per second that are sent to the mirror; 0: no limit.", 0.0, unit="bytes per second"
    )
    mirror_streams: Count = setting("Files sent to the mirror at the same time.", 4, unit="files")
    mirror_wait: Seconds = setting(
        "How long a run that has ended waits for its uploads; `mmscale ckpt mirror RUN` uploads the rest.",
        1800.0,
        unit="seconds",
    )


class AnomalyConfig(Section):
    """Policy for abnormal losses and gradients before they reach the weights."""

    window: Count = setting(
        "Number of applied steps whose median and spread (MAD) define the normal range; half of them are needed for "
        "a decision.",
        128,
        unit="steps",
        source="OLMo-core SkipStepOptimizer: 128",
    )
    threshold: Positive = setting(
        "A loss (of all tokens, of each modality) or gradient norm is a spike this many robust standard deviations "
        "above the median.",
        6.0,
        unit="standard deviations",
        source="OLMo-core SkipStepOptimizer: 6",
    )
    action: Literal["log", "skip", "rollback"] = setting(
        "Action on a spike. log: apply the step; skip: skip the batch; rollback: return to the newest intact "
        "checkpoint and skip skip_window steps of data.",
        "log",
    )
    budget: Index = setting(
        "Largest number of skipped batches and roll-backs of the whole run, together; one more ends training (exit 5).",
        10,
        unit="batches or roll-backs",
    )
    skip_window: Count = setting(
        "Steps of data skipped after a roll-back, counted from the checkpoint; at least up to the batch that spiked.",
        200,
        unit="steps",
        source="PaLM, arXiv 2204.02311, section 5.1: 200-500 batches",
    )


class ResilienceConfig(Section):
    """Restarts, hang detection, anomalies and snapshots in memory."""

    max_restarts: Index = setting(
        "Restarts of a launched job after crashes, over all attempts; one more crash gives up (exit 5). Stops on "
        "request, preemptions, lost nodes and time limits do not count.",
        20,
        unit="restarts",
    )
    max_restarts_without_progress: Index = setting(
        "Consecutive restarts after crashes, failed saves at a request to stop, or time limits without a new "
        "checkpoint; one more gives up (exit 5). Preemptions do not count.",
        2,
        unit="restarts",
        source="NVRx ft_launcher: 3 cycles",
    )
    hang_timeout: Seconds | None = setting(
        "If no step and no evaluation batch ends for this long, ranks write their stacks and the attempt ends as a "
        "crash. Default: ten times the longest step or batch so far, at least five minutes. The limit is extended by "
        "checkpoint.deadline while waiting for a save, and by twice that in a roll-back.",
        None,
        unit="seconds",
    )
    anomaly: AnomalyConfig = setting("NaN, Inf and spikes.", AnomalyConfig())
    parameter_hash_every: Index = setting(
        "Compare the bytes of replicated parameters every n steps and report a rank that differs; 0: never.",
        1000,
        unit="steps",
    )
    memory_every: Index = setting(
        "Copy every rank's state into shared memory (/dev/shm) every n steps, with parity against the loss of a "
        "rank or node; a restart on the same layout resumes from it if it is newer than the newest checkpoint. 0: "
        "never.",
        0,
        unit="steps",
        source="REFT, arXiv 2310.12670",
    )
    memory_group: Index = setting(
        "Number of ranks that keep each other's parity, on different nodes if there are enough. One of them may be "
        "lost. Parity takes 1 / (memory_group - 1) of the memory of a copy; 2 is a mirror.",
        4,
        unit="ranks",
    )
    memory_hold: Seconds = setting(
        "How long shared memory is kept for a restart after its rank has died.", 1800.0, unit="seconds"
    )
