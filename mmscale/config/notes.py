"""What a reader of a configuration should know although nothing is wrong: settings without effect, sizes rounded up.

A setting without effect is named, not refused: siblings of a run and sweeps change the setting that it depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mmscale.config import keys
from mmscale.config.fp8 import roundings
from mmscale.config.schema import Config, PrepareConfig


class Need(NamedTuple):
    """Settings that have an effect only where another one allows it.

    Attributes:
        keys: dotted keys below `section`.
        section: dotted key of their section.
        words: what they need, for a message.
        met: whether a configuration has it.
    """

    section: str
    keys: tuple[str, ...]
    words: str
    met: Callable[[Config], bool]


def _prepare(met: Callable[[PrepareConfig], bool]) -> Callable[[Config], bool]:
    return lambda config: config.data.prepare is None or met(config.data.prepare)


def _schedule(section: str) -> list[Need]:
    def has(*names: str) -> Callable[[Config], bool]:
        return lambda config: (config.auxiliary.optim if "." in section else config.optim).schedule in names

    return [
        Need(section, ("decay",), f"{section}.schedule = wsd or power", has("wsd", "power")),
        Need(section, ("power_exponent", "power_tokens"), f"{section}.schedule = power", has("power")),
        Need(
            section,
            ("min_lr",),
            f"another {section}.schedule than constant",
            has("linear", "cosine", "wsd", "inverse_sqrt", "power"),
        ),
    ]


_EXPERTS = ("capacity_factor", "capacity_multiple", "scope", "compute", "fused_swiglu")
NEEDS: tuple[Need, ...] = (
    *_schedule("optim"),
    *_schedule("auxiliary.optim"),
    Need(
        "auxiliary",
        ("steps", "micro_batch_size", "global_batch_size", "checkpoint_every"),
        "a stage of its own: with model.auxiliary.mode = joint those of `train` and `checkpoint` count",
        lambda config: config.model.auxiliary.mode != "joint",
    ),
    Need(
        "parallel",
        ("recompute_modules",),
        "parallel.recompute = selective",
        lambda config: config.parallel.recompute == "selective",
    ),
    Need("parallel", ("overlap_p2p", "batch_p2p"), "parallel.pp above 1", lambda config: config.parallel.pp > 1),
    Need("model.experts", _EXPERTS, "model.kind = moe or moma", lambda config: config.model.kind != "dense"),
    Need(
        "model.experts",
        ("shared_ffn_hidden_size",),
        "model.experts.shared above 0",
        lambda c: c.model.experts.shared > 0,
    ),
    Need(
        "precision",
        ("fp8_format",),
        "a recipe in precision.fp8",
        lambda config: config.precision.fp8 != "off",
    ),
    Need(
        "precision",
        ("fp8_margin", "fp8_amax_history", "fp8_amax_choice"),
        "precision.fp8 = delayed",
        lambda config: config.precision.fp8 == "delayed",
    ),
    Need(
        "checkpoint",
        ("deadline",),
        "checkpoint.asynchronous = true",
        lambda config: config.checkpoint.asynchronous,
    ),
    Need(
        "resilience.anomaly",
        ("skip_window",),
        "resilience.anomaly.action = rollback",
        lambda config: config.resilience.anomaly.action == "rollback",
    ),
    Need(
        "resilience.anomaly",
        ("budget",),
        "resilience.anomaly.action = skip or rollback",
        lambda config: config.resilience.anomaly.action != "log",
    ),
    Need(
        "resilience",
        ("memory_group", "memory_hold"),
        "resilience.memory_every above 0",
        lambda config: config.resilience.memory_every > 0,
    ),
    Need(
        "log",
        ("prometheus_address",),
        "log.prometheus_port",
        lambda config: config.log.prometheus_port is not None,
    ),
    Need(
        "data.prepare.image",
        ("patch", "residual", "fit_patches"),
        "data.prepare.image.kind = kmeans",
        _prepare(lambda prepare: prepare.image.kind == "kmeans"),
    ),
    Need(
        "data.prepare.image",
        ("path",),
        "data.prepare.image.kind = kmeans or vq",
        _prepare(lambda prepare: prepare.image.kind != "levels"),
    ),
    Need(
        "data.prepare.emoji",
        ("font", "annotations", "languages", "skin_tones", "limit"),
        "data.prepare.source = emoji",
        _prepare(lambda prepare: prepare.source == "emoji"),
    ),
    Need(
        "data.prepare",
        ("augment",),
        "data.prepare.source = digits",
        _prepare(lambda prepare: prepare.source == "digits"),
    ),
)


def notes(config: Config) -> list[str]:
    """Sentences for `config check` and the start of a run."""
    return [*unused(config), *roundings(config)]


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
