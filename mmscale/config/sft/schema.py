"""Settings of supervised fine-tuning on conversations (`sft`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mmscale.config.data.schema import DataSource
from mmscale.config.optim.schema import OptimConfig
from mmscale.config.section import Count, Index, Positive, Section, setting


class SftOptimConfig(OptimConfig):
    """The optimizer of the stage; a setting that is not given has the value of this section."""

    lr: Annotated[Positive, Field(le=10.0)] = setting(
        "Peak learning rate.", 1e-5, source="Chameleon, arXiv 2405.09818, section 4.2"
    )


class SftStageConfig(Section):
    """Fine-tuning of a main run's model on conversations: `mmscale train CONFIG --stage sft`.

    Its data, steps, evaluation and optimizer replace those of `data`, `train` and `optim`; all other settings apply.
    Batch sizes that are not given default to those of `train`.
    """

    path: str | None = setting("Folder of a prepared data set, usually of conversations.", None)
    blend: tuple[DataSource, ...] = setting("Several prepared data sets with weights, instead of path.", ())
    main_step: Index = setting(
        "Step of the main run's checkpoint whose weights the stage starts from; 0: its newest one.", 0, unit="steps"
    )
    steps: Count = setting("Optimizer steps of the stage.", 1000, unit="steps")
    micro_batch_size: Count | None = setting(
        "Sequences of one forward and backward pass on a rank; default: train.micro_batch_size.", None, unit="sequences"
    )
    global_batch_size: Count | None = setting(
        "Sequences of an optimizer step, over all ranks; default: train.global_batch_size.", None, unit="sequences"
    )
    eval_every: Index = setting("Evaluate on held-out data every n steps of the stage; 0: never.", 0, unit="steps")
    tasks: tuple[str, ...] = setting(
        "Questions that are asked at every evaluation, as in train.tasks; questions may be conversations.", ()
    )
    checkpoint_every: Index = setting("Save every n steps of the stage; 0: only at the end.", 0, unit="steps")
    optim: SftOptimConfig = setting(
        "Optimizer of the stage, which begins without moments.",
        SftOptimConfig(),
        source="Chameleon, arXiv 2405.09818, section 4.2: 1e-5, weight decay 0.1",
    )
