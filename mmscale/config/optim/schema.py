"""Settings of the optimizer and its learning-rate schedule (`optim`, `auxiliary.optim`, `sft.optim`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from mmscale.config.section import (
    AtLeastOne,
    Coefficient,
    Count,
    Epsilon,
    Exponent,
    Index,
    Name,
    OneOf,
    Positive,
    Rate,
    Section,
    Share,
    setting,
)
from mmscale.tables.settings import FROZEN, MOMENTS, OPTIMIZERS, SCHEDULES


class MuonConfig(Section):
    """Muon: momentum of matrices, orthogonalised by Newton-Schulz (optim.optimizer = muon)."""

    momentum: Share = setting("Decay of the momentum.", 0.95, source="Keller Jordan's Muon")
    nesterov: bool = setting("Nesterov momentum.", True, source="Keller Jordan's Muon")
    steps: Annotated[Count, Field(le=100)] = setting(
        "Newton-Schulz iterations.", 5, unit="iterations", source="Keller Jordan's Muon"
    )
    coefficients: tuple[Coefficient, Coefficient, Coefficient] = setting(
        "a, b, c of the iteration X <- a X + (b X X^T + c (X X^T)^2) X.",
        (3.4445, -4.7750, 2.0315),
        source="Keller Jordan's Muon",
    )
    rms: Positive = setting(
        "Root mean square of an update at a learning rate of 1. AdamW's is about 0.2, so both use the same lr.",
        0.2,
        source="Moonlight, arXiv 2502.16982, section 2.2",
    )
    dtype: Literal["fp32", "bf16"] = setting(
        "Number format of the iteration's products. bf16 is faster on GPUs; layouts then differ by bf16's rounding.",
        "fp32",
    )


class PhaseConfig(Section):
    """A part of a run with its own learning-rate schedule, for instance from the step at which the blend changes."""

    start: Count = setting("Step after which the phase begins; it ends where the next one begins.", unit="steps")
    lr: Annotated[Positive, Field(le=10.0)] | None = setting(
        "Peak learning rate of the phase. null: as before the phases.", None
    )
    min_lr: Rate | None = setting(
        "Learning rate that its schedule reaches after its last step. null: as before the phases.", None
    )
    schedule: Annotated[str, OneOf(SCHEDULES)] | None = setting(
        f"Learning rate after its warm-up. null: as before the phases. {SCHEDULES.help}", None
    )
    warmup: Index = setting("Linear warm-up at its start.", 0, unit="steps")
    decay: Index | None = setting(
        "wsd and power: length of its final decay; default: a tenth of its steps.", None, unit="steps"
    )


class ScheduleSpan(NamedTuple):
    """A part of a run in which one schedule holds.

    Attributes:
        optim: the settings, with those of the phase in place of the general ones, and without `phases`.
        start: steps before it.
        end: steps after which it is over.
        phase: index in `phases`; None: before the first one.
    """

    optim: OptimConfig
    start: int
    end: int
    phase: int | None


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    lr: Annotated[Positive, Field(le=10.0)] = setting("Peak learning rate.", 1e-4, source="MoMa Table 5")
    min_lr: Rate = setting("Learning rate that the schedule reaches after the last step.", 1e-6)
    schedule: Annotated[str, OneOf(SCHEDULES, plugin="schedule")] = setting(
        f"Learning rate after the warm-up. {SCHEDULES.help}", "linear"
    )
    schedule_args: dict[Name, Any] = setting("Keyword arguments of a schedule that is a plug-in.", {})
    warmup: Index = setting("Linear warm-up.", 0, unit="steps")
    restart: Index = setting(
        "Step after which the schedule starts again, with its warm-up, in a run that is extended. 0: at the start.",
        0,
        unit="steps",
    )
    decay: Index | None = setting(
        "wsd and power: length of the final decay; default: a tenth of the steps.", None, unit="steps"
    )
    phases: tuple[PhaseConfig, ...] = setting(
        "Learning-rate schedules that follow one another, usually from the steps at which weights of data.blend "
        "change. The settings above hold until the first phase begins: their decay ends there.",
        (),
    )
    power_exponent: Exponent = setting("power: exponent b of lr ~ tokens^b.", -0.51, source="arXiv 2408.13359")
    power_tokens: AtLeastOne = setting(
        "power: tokens up to which the learning rate stays at its peak.", 1e9, unit="tokens"
    )
    optimizer: Annotated[str, OneOf(OPTIMIZERS, plugin="optimizer")] = setting(
        f"Update of the parameters. {OPTIMIZERS.help}", "adamw"
    )
    optimizer_args: dict[Name, Any] = setting("Keyword arguments of an optimizer that is a plug-in.", {})
    weight_decay: Annotated[Rate, Field(le=10.0)] = setting(
        "Decoupled weight decay of matrices, including embeddings and experts' routers. Vectors (norm weights, "
        "depth routers) have none.",
        0.1,
    )
    beta1: Share = setting("Adam's decay of the first moment.", 0.9)
    beta2: Share = setting("Adam's decay of the second moment.", 0.95)
    eps: Epsilon = setting("Adam's epsilon.", 1e-5)
    muon: MuonConfig = setting("Settings of optimizer = muon.", MuonConfig())
    clip_grad: Rate = setting("Largest norm of the gradient; 0: no clipping.", 1.0)
    grad_norm_skip_threshold: Positive | None = setting(
        "Skip a batch if its gradient norm before clipping is above this value, whatever resilience.anomaly.action is; "
        "skipped batches count in resilience.anomaly.budget. null: no limit.",
        None,
        source="mcore grad_norm_skip_threshold",
    )
    freeze: tuple[str, ...] = setting(
        "Weights that stay as they are, by modality: all that only its tokens use (text), or a part of it "
        f"(text.experts). {FROZEN.help} They have no gradient, no optimizer state and no weight decay.",
        (),
    )
    moments: Annotated[str, OneOf(MOMENTS)] = setting(
        f"Storage of Adam's moments of matrices. {MOMENTS.help} A run with one setting reads checkpoints with another.",
        "fp32",
        source="COAT, arXiv 2410.19313, section 4.1",
    )

    def spans(self, steps: int) -> list[ScheduleSpan]:
        """The parts of a run with a schedule each, in their order.

        Args:
            steps: steps of the whole run.
        """
        ends = [*(phase.start for phase in self.phases), steps]
        found = [ScheduleSpan(self.model_copy(update={"phases": ()}), self.restart, ends[0], None)]
        for number, phase in enumerate(self.phases):
            own = {"warmup": phase.warmup, "decay": phase.decay, "restart": 0, "phases": ()}
            own |= {key: value for key in ("lr", "min_lr", "schedule") if (value := getattr(phase, key)) is not None}
            found.append(ScheduleSpan(self.model_copy(update=own), phase.start, ends[number + 1], number))
        return found

    def span_at(self, step: int, steps: int) -> ScheduleSpan:
        """The part of a run that contains a step.

        Args:
            step: from 1; steps after the end belong to the last part.
            steps: steps of the whole run.
        """
        spans = self.spans(steps)
        return next((span for span in reversed(spans[1:]) if span.start < step), spans[0])
