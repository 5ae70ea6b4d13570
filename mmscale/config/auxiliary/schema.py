"""Settings of the auxiliary routers (`model.auxiliary`) and of their training (`auxiliary`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmscale.config.optim.schema import OptimConfig
from mmscale.config.section import Count, Index, Rate, Section, setting


class AuxiliaryRoutersConfig(Section):
    """Routers that predict expert and depth choice from one token, for causal inference (MoMa, section 2.4)."""

    mode: Literal["off", "stage", "joint"] = setting(
        "off: the main run has no auxiliary routers, and `mmscale train CONFIG --stage auxiliary` adds and trains them "
        "afterwards; joint: they are trained together with the main run and do not change its weights; stage: set by "
        "the auxiliary stage.",
        "off",
    )
    width: Count | None = setting("Inner width; default: half of hidden_size.", None, source="MoMa 2.4")


class AuxiliaryOptimConfig(OptimConfig):
    """The optimizer of the auxiliary routers; a setting that is not given has the value of this section."""

    weight_decay: Annotated[Rate, Field(le=10.0)] = setting("Decoupled weight decay of matrices.", 0.0)


class AuxiliaryStageConfig(Section):
    """Training of auxiliary routers: `mmscale train CONFIG --stage auxiliary`, or together with a joint run.

    Batch sizes that are not given default to those of `train`. A joint run takes its steps and batches from `train`
    too.
    """

    steps: Count = setting("Optimizer steps of the stage.", 5000, unit="steps", source="MoMa Table 6")
    micro_batch_size: Count | None = setting(
        "Sequences of one forward pass on a rank; default: train.micro_batch_size.", None, unit="sequences"
    )
    global_batch_size: Count | None = setting(
        "Sequences of an optimizer step, over all ranks; default: train.global_batch_size.", None, unit="sequences"
    )
    calibration_batches: Index = setting(
        "Global batches of training data on which thresholds are calibrated after the last step, so that a token gets "
        "on average as many experts as in training; 0: thresholds stay at 0.5.",
        16,
        unit="batches",
    )
    checkpoint_every: Index = setting("Save every n steps of the stage; 0: only at the end.", 0, unit="steps")
    optim: AuxiliaryOptimConfig = setting(
        "Optimizer of the auxiliary routers, in the stage and in joint runs.",
        AuxiliaryOptimConfig(),
        source="MoMa Table 6: 1e-4 to 1e-6, linear",
    )
