"""Settings of steps, batches, evaluation and loss (`train`)."""

from __future__ import annotations

from typing import Annotated, Any

from mmscale.config.section import Count, Index, Name, OneOf, PlugIns, Rate, Section, Share, setting
from mmscale.tables.settings import LOSSES


class StopWhenConfig(Section):
    """When training ends before its last step because held-out losses do not improve any more."""

    metric: str = setting(
        "Held-out figure, by its name in metrics.jsonl: eval/loss, eval/loss/image, eval/causal/loss, "
        "eval/validation/NAME/loss, eval/source/NAME/loss. Lower is better.",
        "eval/loss",
    )
    patience: Count = setting(
        "Number of evaluations in a row without a new lowest value after which training saves and ends (exit 0).",
        5,
        unit="evaluations",
    )


class TrainConfig(Section):
    """Number of steps, batch sizes, evaluation and loss weights."""

    steps: Count = setting("Optimizer steps.", 1000, unit="steps")
    micro_batch_size: Count = setting("Sequences of one forward and backward pass on a rank.", 1, unit="sequences")
    global_batch_size: Count = setting(
        "Sequences of an optimizer step, over all ranks and micro-batches.", 8, unit="sequences"
    )
    eval_every: Index = setting("Evaluate on the held-out split every n steps; 0: only at the end.", 0, unit="steps")
    eval_batches: Count = setting("Global batches of one evaluation.", 8, unit="batches")
    eval_sources: bool = setting(
        "With data.blend, also evaluate the held-out documents of each source separately. Evaluating a source takes as "
        "long as evaluating the blend.",
        True,
    )
    loss: Annotated[str, OneOf(LOSSES, plugin="loss")] = setting(
        f"Loss that the main stage minimises. {LOSSES.help} Held-out losses are always cross entropy.",
        "cross_entropy",
    )
    loss_args: dict[Name, Any] = setting("Keyword arguments of a loss that is a plug-in.", {})
    tasks: tuple[str, ...] = setting(
        "Questions that are asked at every evaluation: names of tasks of the training data (data.prepare.tasks), or "
        "[NAME=]FILE.jsonl. Accuracies are in metrics.jsonl as eval/accuracy/NAME.",
        (),
    )
    stop_when: StopWhenConfig | None = setting(
        "End training early; null: train to the last step. A run that ended early continues only if this is changed.",
        None,
    )
    z_loss: Share = setting("Weight of log(Z)^2 of the output softmax.", 1e-5, source="Chameleon 2.3")
    modality_weights: dict[Name, Rate] = setting("Weight of each modality's token losses; default 1.", {})
    hooks: Annotated[dict[str, dict[str, Any]], PlugIns("hook")] = setting(
        "Plug-ins that are called at points of the run's life, in this order, each with its keyword arguments.", {}
    )
    dry_run: bool = setting("Run one batch forward and backward before step 1 to find errors early.", True)
