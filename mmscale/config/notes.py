"""Notes on a valid configuration: settings without effect, and sizes that are rounded up.

A setting without effect is reported but not refused, because sweeps and variants of a run change the setting that it
depends on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mmscale.config import keys
from mmscale.config.data.schema import PrepareConfig
from mmscale.config.derived import blend_phases
from mmscale.config.optim.schema import MuonConfig, OptimConfig
from mmscale.config.precision.fp8 import roundings
from mmscale.config.schema import Config
from mmscale.tables.settings import (
    IMAGE_TOKENIZERS,
    KINDS,
    LOSSES,
    OPTIMIZERS,
    ROPE_SCALINGS,
    SCHEDULES,
    TEXT_TOKENIZERS,
)
from mmscale.tables.table import Table


class Condition(NamedTuple):
    """Settings that have an effect only if another setting allows it.

    Attributes:
        section: dotted key of their section.
        keys: names below `section`.
        words: the condition, for a message.
        met: whether a configuration meets the condition.
    """

    section: str
    keys: tuple[str, ...]
    words: str
    met: Callable[[Config], bool]


def _prepare(met: Callable[[PrepareConfig], bool]) -> Callable[[Config], bool]:
    return lambda config: config.data.prepare is None or met(config.data.prepare)


def _schedule(section: str) -> list[Condition]:
    def optim(config: Config) -> OptimConfig:
        stage, _, _ = section.rpartition(".")
        own: OptimConfig = getattr(config, stage).optim if stage else config.optim
        return own

    def plugged(setting: str, table: Table[Any]) -> Condition:
        return Condition(
            section,
            (f"{setting}_args",),
            f"a plug-in as {section}.{setting}",
            lambda config: getattr(optim(config), setting) not in table,
        )

    def uses(config: Config, others: list[str]) -> bool:
        own = optim(config)
        return any(name not in others for name in (own.schedule, *(phase.schedule for phase in own.phases)) if name)

    def read(setting: str) -> Condition:
        readers = [name for name, schedule in SCHEDULES.items() if setting in schedule.reads]
        others = [name for name in SCHEDULES if name not in readers]
        words = f"another {section}.schedule than {' or '.join(others)}" if len(others) < len(readers) else ""
        # A plug-in may read any of them.
        return Condition(
            section,
            (setting,),
            words or f"{section}.schedule = {' or '.join(readers)}",
            lambda config: uses(config, others),
        )

    optional = dict.fromkeys(setting for schedule in SCHEDULES.values() for setting in schedule.reads)
    return [*map(read, optional), plugged("schedule", SCHEDULES), plugged("optimizer", OPTIMIZERS)]


_PLUGGED = ("path", "fit_patches")  # settings that image tokenizers of plug-ins depend on, too


def _image_kind_reads(readers: list[str], unread: list[str], prepare: PrepareConfig, *, plugged: bool) -> bool:
    """Whether the kind of image tokenizer depends on a setting; `plugged`: plug-ins do."""
    return prepare.image.kind not in unread if plugged else prepare.image.kind in readers


def _tokenizers() -> Iterator[Condition]:
    for setting in dict.fromkeys(setting for kind in IMAGE_TOKENIZERS.values() for setting in kind.reads):
        readers = [name for name, kind in IMAGE_TOKENIZERS.items() if setting in kind.reads]
        unread = [name for name in IMAGE_TOKENIZERS if name not in readers]
        met = _prepare(functools.partial(_image_kind_reads, readers, unread, plugged=setting in _PLUGGED))
        yield Condition("data.prepare.image", (setting,), f"data.prepare.image.kind = {' or '.join(readers)}", met)
    plugged_in = _prepare(lambda prepare: prepare.image.kind not in IMAGE_TOKENIZERS)
    yield Condition("data.prepare.image", ("kind_args",), "a plug-in as data.prepare.image.kind", plugged_in)
    plugged_in = _prepare(lambda prepare: prepare.text.kind not in TEXT_TOKENIZERS)
    yield Condition("data.prepare.text", ("kind_args",), "a plug-in as data.prepare.text.kind", plugged_in)


def _rope_scaling() -> Iterator[Condition]:
    section = "model.rope_scaling"
    for setting in dict.fromkeys(setting for scaling in ROPE_SCALINGS.values() for setting in scaling.reads):
        readers = [name for name, scaling in ROPE_SCALINGS.items() if setting in scaling.reads]
        met = functools.partial(_rope_reads, readers)
        yield Condition(section, (setting,), f"{section}.rope_type = {' or '.join(readers)}", met)


def _rope_reads(readers: list[str], config: Config) -> bool:
    scaling = config.model.rope_scaling
    return scaling is None or scaling.rope_type in readers


_WITH_EXPERTS = " or ".join(name for name, kind in KINDS.items() if kind.experts)
_EXPERTS = ("capacity_factor", "capacity_multiple", "compute", "fused_swiglu")
NEEDS: tuple[Condition, ...] = (
    Condition("train", ("loss_args",), "a plug-in as train.loss", lambda config: config.train.loss not in LOSSES),
    *_schedule("optim"),
    *_schedule("auxiliary.optim"),
    *_schedule("sft.optim"),
    Condition(
        "optim.muon",
        tuple(MuonConfig.model_fields),
        "optim.optimizer = muon",
        lambda config: config.optim.optimizer == "muon",
    ),
    Condition(
        "auxiliary",
        ("steps", "micro_batch_size", "global_batch_size", "checkpoint_every"),
        "a separate stage: with model.auxiliary.mode = joint the settings of `train` and `checkpoint` apply",
        lambda config: config.model.auxiliary.mode != "joint",
    ),
    Condition(
        "parallel",
        ("recompute_modules",),
        "parallel.recompute = selective",
        lambda config: config.parallel.recompute == "selective",
    ),
    Condition("parallel", ("cp_attention",), "parallel.cp above 1", lambda config: config.parallel.cp > 1),
    Condition("parallel", ("overlap_p2p", "batch_p2p"), "parallel.pp above 1", lambda config: config.parallel.pp > 1),
    Condition("model.experts", _EXPERTS, f"model.kind = {_WITH_EXPERTS}", lambda config: config.model.has_experts),
    Condition(
        "model.experts",
        ("scope",),
        f"model.kind = {_WITH_EXPERTS}, and with model.experts.token_choice its capacity_factor",
        lambda config: config.model.limits_experts,
    ),
    Condition(
        "model.experts",
        ("shared_ffn_hidden_size",),
        "model.experts.shared above 0",
        lambda c: c.model.experts.shared > 0,
    ),
    *_rope_scaling(),
    Condition(
        "precision",
        ("fp8_format",),
        "a recipe in precision.fp8 other than nvfp4",
        lambda config: config.precision.fp8 not in ("off", "nvfp4"),
    ),
    Condition(
        "precision",
        ("fp4_stochastic_rounding", "fp4_hadamard"),
        "precision.fp8 = nvfp4",
        lambda config: config.precision.fp8 == "nvfp4",
    ),
    Condition(
        "precision",
        ("fp8_margin", "fp8_amax_history", "fp8_amax_choice"),
        "precision.fp8 = delayed",
        lambda config: config.precision.fp8 == "delayed",
    ),
    Condition(
        "checkpoint",
        ("deadline",),
        "checkpoint.asynchronous = true",
        lambda config: config.checkpoint.asynchronous,
    ),
    Condition(
        "resilience.anomaly",
        ("skip_window",),
        "resilience.anomaly.action = rollback",
        lambda config: config.resilience.anomaly.action == "rollback",
    ),
    Condition(
        "resilience.anomaly",
        ("budget",),
        "resilience.anomaly.action = skip or rollback, or optim.grad_norm_skip_threshold",
        lambda config: config.resilience.anomaly.action != "log" or _limits_norms(config),
    ),
    Condition(
        "resilience",
        ("memory_group", "memory_hold"),
        "resilience.memory_every above 0",
        lambda config: config.resilience.memory_every > 0,
    ),
    Condition(
        "log",
        ("prometheus_address",),
        "log.prometheus_port",
        lambda config: config.log.prometheus_port is not None,
    ),
    *_tokenizers(),
)


def _limits_norms(config: Config) -> bool:
    return any(
        optim.grad_norm_skip_threshold is not None for optim in (config.optim, config.auxiliary.optim, config.sft.optim)
    )


def notes(config: Config) -> list[str]:
    """Notes that `config check` and the start of a run print."""
    return [*unused(config), *roundings(config), *_phases_beside_the_blend(config)]


def _phases_beside_the_blend(config: Config) -> list[str]:
    """A note if learning-rate phases begin at other steps than those at which the blend changes."""
    blend = [step for step, _ in blend_phases(config) if step]
    apart = [phase.start for phase in config.optim.phases if phase.start not in blend]
    if not blend or not apart:
        return []
    return [
        f"optim.phases begin at {_listed(apart)}, where no weight of data.blend changes (it does at {_listed(blend)})"
    ]


def _listed(steps: list[int]) -> str:
    return " and ".join(map(str, steps))


def unused(config: Config) -> list[str]:
    """One sentence for each setting that was changed from its default and has no effect."""
    return [
        f"{need.section}.{key} has no effect: it needs {need.words}"
        for need in NEEDS
        if not need.met(config)
        for key in need.keys
        if _changed(config, f"{need.section}.{key}")
    ]


def _changed(config: Config, key: str) -> bool:
    *sections, leaf = key.split(".")
    here: Any = config
    for name in sections:
        here = getattr(here, name)
        if here is None:
            return False
    return bool(getattr(here, leaf) != _default(key))


def _default(key: str) -> Any:
    """The default of a setting; a section's own default comes before its class's."""
    section, _, leaf = key.rpartition(".")
    given = keys.all_keys()[section].field.default
    return getattr(given, leaf, keys.all_keys()[key].field.default)
