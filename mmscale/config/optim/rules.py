"""Rules about the optimizers of the main run and of its stages, and about their schedules.

A comment next to each rule gives its reason.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.derived import orthogonalizes
from mmscale.config.optim.schema import MuonConfig, OptimConfig, ScheduleSpan
from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config
from mmscale.tables.settings import FROZEN, MOMENTS, SCHEDULES

_BF16_BETA2 = 0.995


def _optim(config: Config) -> Iterator[Problem]:
    yield from _optimizer(config.optim, config.train.steps, section="optim", of="train")
    stage = config.auxiliary
    yield from _optimizer(stage.optim, stage.steps, section="auxiliary.optim", of="auxiliary")
    yield from _optimizer(config.sft.optim, config.sft.steps, section="sft.optim", of="sft")


def _optimizer(optim: OptimConfig, steps: int, *, section: str, of: str) -> Iterator[Problem]:
    placed = list(_places(optim, steps, section=section, of=of))
    yield from placed
    if not placed:
        for span in optim.spans(steps):
            yield from _span(span, section=section, of=of, last=span.end == steps)
    for key, beta in (("beta1", optim.beta1), ("beta2", optim.beta2)):
        if beta >= 1.0:
            yield Problem(
                f"{section}.{key} = {beta:g} never decays, and Adam divides by 1 - {key}", "use a value below 1"
            )


def _places(optim: OptimConfig, steps: int, *, section: str, of: str) -> Iterator[Problem]:
    """Where schedules begin."""
    if optim.restart and optim.restart >= steps:
        yield Problem(
            f"{section}.restart = {optim.restart} is not below {of}.steps = {steps}: no step would follow it",
            f"raise {of}.steps, or lower {section}.restart",
        )
    elif optim.phases and optim.restart >= optim.phases[0].start:
        yield Problem(
            f"{section}.restart = {optim.restart} is not below the start of the first phase, {optim.phases[0].start}",
            f"begin a phase there instead: {section}.phases, start: {optim.restart}",
        )
    before = 0
    for number, phase in enumerate(optim.phases):
        if phase.start <= before:
            yield Problem(
                f"{section}.phases.{number}.start = {phase.start} is not above the phase before it, {before}",
                "list the phases in the order of their steps",
            )
        before = phase.start
    if before >= steps and optim.phases:
        yield Problem(
            f"{section}.phases.{len(optim.phases) - 1}.start = {before} is not below {of}.steps = {steps}: no step "
            "would follow it",
            f"raise {of}.steps, or leave the phase out",
        )


def _span(span: ScheduleSpan, *, section: str, of: str, last: bool) -> Iterator[Problem]:
    """Whether warm-up, decay and both rates fit."""
    optim, steps = span.optim, span.end - span.start
    key = section if span.phase is None else f"{section}.phases.{span.phase}"
    if span.phase is not None:
        left = f"the {steps} of the phase"
    elif optim.restart:
        left = f"the {steps} after {section}.restart"
    else:
        left = f"{of}.steps = {steps}" if last else f"the {steps} before the first phase"
    if optim.warmup > steps:
        yield Problem(
            f"{key}.warmup = {optim.warmup} steps is more than {left}",
            f"lower {key}.warmup, for instance to {steps // 10}, or raise {of}.steps",
        )
    if optim.min_lr > optim.lr:
        yield Problem(f"{key}.min_lr = {optim.min_lr:g} is above {key}.lr = {optim.lr:g}", f"lower {key}.min_lr")
    if _decays_at_the_end(optim) and optim.decay is not None and optim.warmup + optim.decay > steps:
        yield Problem(
            f"{key}.warmup + {key}.decay = {optim.warmup} + {optim.decay} steps is more than {left}",
            "shorten one of them",
        )


def _decays_at_the_end(optim: OptimConfig) -> bool:
    """Whether the schedule is a built-in one with a final decay; that of a plug-in is unknown."""
    return optim.schedule in SCHEDULES and SCHEDULES[optim.schedule].final_decay


def _muon(config: Config) -> Iterator[Problem]:
    if orthogonalizes(config.auxiliary.optim):
        yield Problem(
            f"auxiliary.optim.optimizer = {config.auxiliary.optim.optimizer}: "
            "auxiliary routers are routers, which Muon leaves to AdamW",
            "use auxiliary.optim.optimizer=adamw; optim.optimizer=muon trains the main model",
        )
    if config.auxiliary.optim.muon != MuonConfig():
        yield Problem(
            "auxiliary.optim.muon is set: auxiliary routers are routers, which Muon leaves to AdamW", "remove it"
        )


def _moments(config: Config) -> Iterator[Problem]:
    joint = config.model.auxiliary.mode == "joint"  # in joint runs the copies include the routers' optimizer
    for section, optim, copied in (
        ("optim", config.optim, True),
        ("auxiliary.optim", config.auxiliary.optim, joint),
        ("sft.optim", config.sft.optim, True),
    ):
        stored = MOMENTS[optim.moments]
        if stored.bf16 and optim.beta2 > _BF16_BETA2:
            # bf16 has 8 bits: a moment that decreases by less than 2^-8 is rounded back to its old value.
            yield Problem(
                f"{section}.moments = {optim.moments} with {section}.beta2 = {optim.beta2:g}: a second moment would "
                "never decay, because the change in a step is below the resolution of bf16",
                f"use {section}.beta2={_BF16_BETA2:g} at most, or {section}.moments=fp8_coat",
            )
        if stored.te_dtype is not None and optim.optimizer != "adamw":
            yield Problem(
                f"{section}.moments = {optim.moments} with {section}.optimizer = {optim.optimizer}: "
                "Transformer-Engine keeps these moments for its own Adam only",
                f"use {section}.moments=fp32, bf16 or fp8_coat",
            )
        if stored.te_dtype is not None and config.precision.dtype != "bf16":
            yield Problem(
                f"{section}.moments = {optim.moments} is for bf16 parameters, precision.dtype is "
                f"{config.precision.dtype}: Transformer-Engine's Adam keeps the master weights",
                "use precision.dtype=bf16, or bf16 or fp8_coat",
            )
        if copied and stored.te_dtype is not None and config.resilience.memory_every:
            # The scales of FP8 states are not part of the state of a torch optimizer.
            yield Problem(
                f"{section}.moments = {optim.moments} with resilience.memory_every: a copy in memory would not be the "
                "complete state of Transformer-Engine's Adam",
                f"use resilience.memory_every=0, or {section}.moments=bf16 or fp8_coat",
            )


def _freeze(config: Config) -> Iterator[Problem]:
    model, names = config.model, config.vocab.names
    if config.auxiliary.optim.freeze:
        yield Problem(
            "auxiliary.optim.freeze is set: the auxiliary stage trains routers only, all else is frozen", "remove it"
        )
    if config.optim.freeze and config.optim.optimizer != "adamw":
        yield Problem(
            f"optim.freeze with optim.optimizer = {config.optim.optimizer}: frozen weights were tested with AdamW only",
            "use optim.optimizer=adamw, or remove optim.freeze",
        )
    untied = {part for part in FROZEN if part in model.untie}
    for entry in config.optim.freeze:
        modality, _, part = entry.partition(".")
        plain = modality in model.experts.ungated
        own = untied | ({"ffn" if plain else "experts"} if model.per_modality else set())
        if modality not in names or (part and part not in FROZEN):
            yield Problem(
                f"optim.freeze: {entry} is neither a modality ({', '.join(names)}) nor a part of one "
                f"({', '.join(f'{names[0]}.{part}' for part in FROZEN)})",
                "name one of these",
            )
        elif not own or (part and part not in own):
            yield Problem(
                f"optim.freeze: {entry}: the model has no such weights that only tokens of {modality} use",
                f"name {' or '.join(f'{modality}.{part}' for part in sorted(own))}"
                if own
                else "use model.untie, or model.kind=moma, which give each modality weights of its own",
            )


RULES: tuple[Rule, ...] = (_optim, _muon, _moments, _freeze)
