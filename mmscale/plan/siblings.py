"""Generates configurations with the same FLOPs per token as a given one, for comparison with it.

Dense, one FFN per modality (1t1i), mixed experts (moe8x), experts per modality (4t4i), and each with Mixture-of-Depths
(MoMa, arXiv 2407.21770, Table 1); Mixture-of-Transformers (mot, arXiv 2411.04996), its hybrid with text experts
(mot_4t1i), and experts per modality with untied attention and norms (4t4i_untied); experts that tokens choose (tc_8x,
tc_4t4i). FLOPs are those of `flops_per_token`, forward. It trains nothing and reads no data: with
`model.experts.share: auto` it uses the shares that `mmscale plan` uses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmscale.config import Config, yaml_text
from mmscale.config.load import flatten, resolve
from mmscale.config.model.schema import DepthConfig
from mmscale.config.precision.fp8 import alignment
from mmscale.errors import ConfigError
from mmscale.plan.compute import flops_per_token
from mmscale.plan.parameters import count_parameters
from mmscale.plan.vocabulary import TEXT
from mmscale.tables.settings import KINDS

# Settings of expert choice, which the rules refuse together with token choice.
_EXPERT_CHOICE = ("choice", "capacity", "capacity_factor", "noise", "threshold_decay", "cuda_graph")
TOLERANCE = 0.01  # of FLOPs per token; the paper's own models differ by up to 0.027
EXPERTS = 4  # of each modality, if the given configuration has no experts
_MOST_LAYERS = 4  # largest number of layers, relative to the given one


@dataclass(frozen=True)
class Sibling:
    """A configuration to compare with.

    Attributes:
        name: dense, 1t1i, moe8x, 4t4i, mot, tc_4t4i, mod_dense, ...
        config: its settings; every rule holds.
        flops: forward FLOPs per token.
        ratio: `flops` over those of the given configuration.
        parameters: all parameters.
        changes: differences from the given configuration, one "key: before -> after" each.
    """

    name: str
    config: Config
    flops: float
    ratio: float
    parameters: int
    changes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `mmscale baselines --json`."""
        return {
            "name": self.name,
            "run": self.config.run.name,
            "flops_per_token": self.flops,
            "ratio": self.ratio,
            "parameters": self.parameters,
            "changes": list(self.changes),
        }


def siblings(config: Config, *, experts: int | None = None, tolerance: float = TOLERANCE) -> list[Sibling]:
    """The siblings of a configuration, including itself (under the name of its kind).

    Width, heads, data and training are unchanged. Mixture-of-Depths layers have fewer FLOPs, so there are more of them
    (8 -> 14 and 24 -> 40 in the paper): the number that comes nearest, a multiple of the pipeline's chunks. The
    remaining difference is compensated by the width of the FFN.

    Args:
        config: a configuration of any kind.
        experts: experts of each modality in `4t4i`, of which `moe8x` has the sum; None: as in the given configuration,
            otherwise 4.
        tolerance: largest difference of FLOPs per token, as a share.

    Raises:
        ConfigError: no number of layers and width comes near enough, or a rule refuses a sibling.
    """
    counts = _counts(config, experts)
    target = flops_per_token(config).forward
    found: list[Sibling] = []
    for depth in (False, True):
        for name, model in _models(counts).items():
            if depth and ("mixed" in model.groups or model.untie or model.tokens_choose):
                continue  # the papers have no such models
            if model.untie and not _can_untie(config, model):
                continue
            label = f"mod_{name}" if depth else name
            made = _of_model(config, model, depth=depth)
            found.append(_sibling(config, label, made, depth=depth, target=target, tolerance=tolerance))
    return found


@dataclass(frozen=True)
class _Model:
    """What distinguishes a sibling.

    Attributes:
        kind: of feed-forward layers.
        groups: experts of each group.
        untie: untied parts.
        ungated: groups of one expert without a router.
        tokens_choose: token choice instead of expert choice.
    """

    kind: str
    groups: dict[str, int] = field(default_factory=dict)
    untie: tuple[str, ...] = ()
    ungated: tuple[str, ...] = ()
    tokens_choose: bool = False


def _models(counts: dict[str, int]) -> dict[str, _Model]:
    """The siblings by name; 1t1i is there once if one expert of each modality was requested."""
    own, total = group_name(counts), sum(counts.values())
    single = dict.fromkeys(counts, 1)
    text = TEXT if TEXT in counts else next(iter(counts))
    others = tuple(name for name in counts if name != text)
    hybrid = single | {text: counts[text]}
    return {
        "dense": _Model("dense"),
        group_name(single): _Model("moma", single),
        f"moe{total}x": _Model("moe", {"mixed": total}),
        own: _Model("moma", counts),
        "mot": _Model("dense", untie=("attention", "ffn", "norms")),
        f"{own}_untied": _Model("moma", counts, untie=("attention", "norms")),
        f"mot_{group_name(hybrid)}": _Model("moma", hybrid, untie=("attention", "norms"), ungated=others),
        f"tc_{total}x": _Model("moe", {"mixed": total}, tokens_choose=True),
        f"tc_{own}": _Model("moma", counts, tokens_choose=True),
    }


def _can_untie(config: Config, sibling: _Model) -> bool:
    """Whether an untied sibling breaks no rule of config/model/rules.py or config/experts/rules.py."""
    model = config.model
    kernels = "te" in (model.backend, model.experts.compute) or (
        config.precision.fp8 != "off" and not config.precision.emulated
    )
    plain = not model.qkv_bias and not (kernels and sibling.ungated)
    return plain and len(config.vocab.names) > 1 and not config.parallel.overlap_tensor


def group_name(counts: Mapping[str, int]) -> str:
    """Short name of modality groups, e.g. 4t4i; complete names if two begin with the same letter."""
    letters = [name[0] for name in counts]
    short = len(set(letters)) == len(letters)
    return "".join(f"{count}{name[0] if short else name}" for name, count in counts.items())


def text_of(sibling: Sibling, *, of: str) -> str:
    """A file that loads to the sibling's configuration; defaults are omitted.

    Args:
        sibling: what is written.
        of: path of the given configuration, for the comment.
    """
    lines = [
        f"# {sibling.name}, at the FLOPs per token of {of}; written by `mmscale baselines`.",
        f"# {sibling.flops:.6g} forward FLOPs per token, {sibling.ratio:.4f} times; {sibling.parameters:,} parameters.",
        *(f"# changed: {line}" for line in sibling.changes),
    ]
    settings = sibling.config.model_dump(mode="json", exclude_defaults=True)
    settings["model"] = {"kind": sibling.config.model.kind, **settings["model"]}
    return "\n".join(lines) + "\n" + yaml_text.dump(settings, width=110)


def _counts(config: Config, experts: int | None) -> dict[str, int]:
    """Experts of each modality."""
    names, given = config.vocab.names, config.model.experts.counts
    if experts is None and config.model.per_modality and max(given.values()) > 1:
        return {name: given[name] for name in names}
    if (
        experts is None
        and config.model.has_experts
        and not config.model.per_modality
        and sum(given.values()) % len(names) == 0
    ):
        return dict.fromkeys(names, sum(given.values()) // len(names))
    return dict.fromkeys(names, experts or EXPERTS)


def _sibling(
    config: Config, name: str, settings: dict[str, Any], *, depth: bool, target: float, tolerance: float
) -> Sibling:
    settings["run"]["name"] = f"{config.run.name}_{name}"
    model = settings["model"]
    if depth != (config.model.depth is not None):
        settings["parallel"].pop("pp_layers", None)  # does not fit another number of layers
        model["num_layers"] = _layers(config, settings, target)
    if not _near(settings, target, tolerance):
        model["ffn_hidden_size"] = _width(config, settings, target, tolerance)
    made = resolve(settings)
    flops = flops_per_token(made).forward
    if abs(flops / target - 1) > tolerance:
        raise ConfigError(
            f"{name}: {flops:.5g} forward FLOPs per token are the nearest to {target:.5g} that a whole number of "
            f"layers and an FFN width of {model['ffn_hidden_size']} reach; that is {abs(flops / target - 1):.1%} off",
            remedy=f"allow it with --tolerance {math.ceil(abs(flops / target - 1) * 1000) / 1000:g}",
        )
    changes = tuple(_changes(config, made))
    return Sibling(name, made, flops, flops / target, count_parameters(made).total, changes)


def _of_model(config: Config, sibling: _Model, *, depth: bool) -> dict[str, Any]:
    """Settings of a sibling with the given layers and width."""
    kind, groups, untie = sibling.kind, sibling.groups, list(sibling.untie)
    settings = config.model_dump(mode="json", exclude_defaults=True)
    model, parallel = settings["model"], settings.setdefault("parallel", {})
    settings.setdefault("run", {})
    model["kind"] = kind
    if sorted(untie) != sorted(config.model.untie):  # the given one may name the same parts in another order
        model.pop("untie", None)
        model |= {"untie": untie} if untie else {}
    given = model.pop("experts", {})
    given.pop("ungated", None)
    if depth:
        model["depth"] = (config.model.depth or DepthConfig()).model_dump(mode="json")
        model["depth"]["multiple"] = math.lcm(model["depth"]["multiple"], config.parallel.tp)
    else:
        model.pop("depth", None)
    if not KINDS[kind].experts:
        parallel.pop("ep", None)
        # Depth layers keep cut-offs if the experts did; a dense model without routing has none.
        kept = {"threshold_decay": given["threshold_decay"]} if depth and "threshold_decay" in given else {}
        model["experts"] = kept
        if not depth:
            model.pop("auxiliary", None)
        return settings
    if not KINDS[kind].per_modality:
        given.pop("share", None)
    tokens_choose = given.pop("token_choice", None) or {}
    if sibling.tokens_choose:
        given = {key: value for key, value in given.items() if key not in _EXPERT_CHOICE}
        top_k = min([tokens_choose.get("top_k", 1), *groups.values()])
        given["token_choice"] = tokens_choose | ({"top_k": top_k} if top_k > 1 else {})
        model.pop("auxiliary", None)
    model["experts"] = {**given, "counts": groups} | ({"ungated": list(sibling.ungated)} if sibling.ungated else {})
    routed = sum(count for name, count in groups.items() if name not in sibling.ungated)
    parallel["ep"] = _expert_parallel(config.parallel.ep, routed)
    return settings


def _expert_parallel(given: int, experts: int) -> int:
    """The largest divisor of the given expert-parallel size that leaves no rank without an expert.

    A divisor, because it then divides the data-parallel ranks too. It need not divide the groups: their experts may be
    distributed unevenly (mmscale.config.derived.experts_of_ranks).
    """
    return max(ranks for ranks in range(1, given + 1) if given % ranks == 0 and ranks <= experts)


def _forward(settings: dict[str, Any], **model: int) -> float:
    return flops_per_token(resolve({**settings, "model": {**settings["model"], **model}})).forward


def _near(settings: dict[str, Any], target: float, tolerance: float) -> bool:
    return abs(_forward(settings) / target - 1) <= tolerance


def _layers(config: Config, settings: dict[str, Any], target: float) -> int:
    """The number of layers whose FLOPs come nearest to the target."""
    chunks = config.parallel.pp * (config.parallel.vpp or 1)
    most = max(_MOST_LAYERS * config.model.num_layers, chunks)
    return min(range(chunks, most + 1, chunks), key=lambda layers: abs(_forward(settings, num_layers=layers) - target))


def _width(config: Config, settings: dict[str, Any], target: float, tolerance: float) -> int:
    """The FFN width whose FLOPs come near the target.

    FLOPs are linear in it, including shared experts of the same width.

    The width is a multiple of the largest power of two that is fine enough, at most 64 and at most that in the given
    width, to keep shapes of matrix products efficient. It is also a multiple of what the rules require.
    """
    least = config.parallel.tp * alignment(config)
    low, high = (_forward(settings, ffn_hidden_size=least * n) for n in (1, 2))
    slope = (high - low) / least
    wanted = (target - low) / slope + least
    step = math.gcd(config.model.ffn_hidden_size, 64)
    while True:
        unit = math.lcm(step, least)
        width = max(unit, round(wanted / unit) * unit)
        if step == 1 or abs(low + slope * (width - least) - target) <= tolerance * target:
            return width
        step //= 2


def _changes(before: Config, after: Config) -> list[str]:
    old, new = _settings(before), _settings(after)
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return [f"{key}: {_shown(old.get(key))} -> {_shown(new.get(key))}" for key in keys if key != "run.name"]


def _settings(config: Config) -> dict[str, Any]:
    """Single values by dotted key; groups of experts, token choice, untied parts and depth are single values here."""
    model = config.model.model_dump(mode="json")
    whole = {"model.experts.counts": model["experts"]["counts"], "model.experts.share": model["experts"]["share"]}
    whole |= {"model.depth": model["depth"], "model.untie": model["untie"]}
    whole["model.experts.token_choice"] = model["experts"]["token_choice"]
    whole["model.experts.ungated"] = model["experts"]["ungated"]
    single = {key: value for key, value in flatten(config).items() if not key.startswith(tuple(whole))}
    return {**single, **whole}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {item}" for name, item in value.items()) + "}" if value else "none"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "none" if value is None else str(value)
