"""Settings of steps, batches, evaluation and loss (`train`)."""

from __future__ import annotations

from typing import Annotated, Any

from mmscale.config.section import (
    AtLeastOne,
    Count,
    Fraction,
    Index,
    Name,
    OneOf,
    PlugIns,
    Positive,
    Rate,
    Section,
    Share,
    setting,
)
from mmscale.tables.settings import LOSS_WEIGHTS, LOSSES


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


class LossWeightsConfig(Section):
    """Weights of documents in the training loss, by their loss relative to that of other documents."""

    kind: Annotated[str, OneOf(LOSS_WEIGHTS)] = setting(
        f"Function of the loss h, which is -1 at the 1 % quantile of a modality and 1 at the 99 % quantile. "
        f"{LOSS_WEIGHTS.help}",
        "linupper",
        source="arXiv 2502.06733",
    )
    temperature: Positive = setting(
        "The largest weight is at most exp(1 / temperature) times the smallest one: 2.7 for 1, 12 for 0.4. With more "
        "unequal weights a batch counts as fewer documents (loss_weights/effective_share).",
        1.0,
    )
    largest: AtLeastOne = setting("Largest weight of a document; the mean over labels is about 1.", 4.0)
    decay: Fraction = setting(
        "Decay per step of the moving averages of quantiles and of the mean weight of each modality; 1: plain averages "
        "over all steps.",
        0.99,
    )
    warmup: Count = setting("Steps with documents of a modality before its labels get weights.", 100, unit="steps")


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
    loss_weights: LossWeightsConfig | None = setting(
        "Weigh documents by their loss; null: all alike. The main stage only. Logged losses stay unweighted.", None
    )
    hooks: Annotated[dict[str, dict[str, Any]], PlugIns("hook")] = setting(
        "Plug-ins that are called at points of the run's life, in this order, each with its keyword arguments.", {}
    )
    dry_run: bool = setting("Run one batch forward and backward before step 1 to find errors early.", True)
