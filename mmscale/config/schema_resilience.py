"""Settings of checkpoints and of going on in spite of faults (`checkpoint`, `resilience`).

Rules between them are in rules.py.
"""

from __future__ import annotations

from typing import Literal

from mmscale.config.section import Count, Index, Positive, Seconds, Section, setting


class CheckpointConfig(Section):
    """When the training state is written, and how much of it is kept."""

    every: Index = setting("Save every n steps; 0: only at the end.", 0, unit="steps")
    keep: Count = setting("Newest checkpoints kept; never fewer than two known to be whole.", 3, unit="checkpoints")
    keep_every: Index = setting("Keep checkpoints of every n-th step for ever; 0: none.", 0, unit="steps")
    allow_missing: bool = setting(
        "Go on from a checkpoint that lacks its manifest, counters, random or optimizer state.", False
    )
    resume: bool = setting("Go on from the run's newest checkpoint if there is one.", True)
    asynchronous: bool = setting(
        "Train on while a forked process of every rank writes; false: the ranks write themselves. A host needs memory "
        "for up to twice the training state.",
        True,
    )
    deadline: Seconds = setting(
        "An asynchronous save that takes longer is given up; training goes on.", 900.0, unit="seconds"
    )
    writers: Index = setting(
        "Ranks of each node that write, for their neighbours too: fewer files per checkpoint, fewer streams at once; "
        "0: every rank writes its own two files.",
        0,
        unit="ranks per node",
    )
    max_failures: Count = setting("Failed saves in a row that end the attempt (exit 74).", 3, unit="saves")


class AnomalyConfig(Section):
    """What is done about losses and gradients that do not look right, before they reach the weights."""

    window: Count = setting(
        "Applied steps whose median and spread (MAD) say what is usual; half of them are needed for a verdict.",
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
        "What follows a spike. log: the step is taken; skip: the batch is left out; rollback: go back to the newest "
        "whole checkpoint and leave out skip_window steps of data.",
        "log",
    )
    budget: Index = setting(
        "Batches left out and roll-backs of the whole run, together; one more ends training (exit 5).",
        10,
        unit="batches or roll-backs",
    )
    skip_window: Count = setting(
        "Steps of data left out after a roll-back, from the checkpoint on; at least up to the batch that spiked.",
        200,
        unit="steps",
        source="PaLM, arXiv 2204.02311, section 5.1: 200-500 batches",
    )


class ResilienceConfig(Section):
    """Going on in spite of faults."""

    max_restarts: Index = setting(
        "Restarts of a launched job after crashes, over all of its attempts; one more gives up (exit 5). Stops on "
        "request, preemptions, lost nodes and time limits do not count.",
        20,
        unit="restarts",
    )
    max_restarts_without_progress: Index = setting(
        "Restarts after crashes in a row without a new checkpoint; one more gives up (exit 5).",
        2,
        unit="restarts",
        source="NVRx ft_launcher: 3 cycles",
    )
    hang_timeout: Seconds | None = setting(
        "No step ends, and no batch of an evaluation, for this long: ranks write down where they stand, and the "
        "attempt ends as a crash; default: ten times the longest that one of these took so far, but five minutes at "
        "least. A save that is waited for may take checkpoint.deadline longer, a roll-back twice that.",
        None,
        unit="seconds",
    )
    anomaly: AnomalyConfig = setting("NaN, Inf and spikes.", AnomalyConfig())
    parameter_hash_every: Index = setting(
        "Compare the bytes of replicated parameters every n steps, and name a rank that differs; 0: never.",
        1000,
        unit="steps",
    )
    memory_every: Index = setting(
        "Copy every rank's state into shared memory (/dev/shm) every n steps, with parity against the loss of a rank "
        "or node; a restart on the same layout goes on from there if it is newer than the newest checkpoint. 0: never.",
        0,
        unit="steps",
        source="REFT, arXiv 2310.12670",
    )
    memory_group: Index = setting(
        "Ranks that keep each other's parity, on different nodes where there are enough: one of them may be lost, and "
        "a copy of the state takes 1 / (memory_group - 1) more memory; 2 is a mirror.",
        4,
        unit="ranks",
    )
    memory_hold: Seconds = setting(
        "How long shared memory is kept for a restart after its rank has died.", 1800.0, unit="seconds"
    )
