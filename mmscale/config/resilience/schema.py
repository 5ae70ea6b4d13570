"""Settings of recovery from faults (`resilience`)."""

from __future__ import annotations

from typing import Literal

from mmscale.config.section import Count, Index, Positive, Seconds, Section, setting


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
