"""Settings of checkpoints and their mirror (`checkpoint`)."""

from __future__ import annotations

from mmscale.config.section import Count, Index, Rate, Seconds, Section, setting


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
