"""Rules between settings, in words. Every violated rule is reported at once.

Shapes of single values are schema.py's. Why a rule exists stands next to it; file names without a path are of
megatron-core 0.16.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mmscale.config import derived
from mmscale.config.schema import Config, OptimConfig, PrepareConfig
from mmscale.errors import ConfigError

# <pad> <s> </s> <boi> <eoi>, see data/vocab.py (which imports this package, so the number is repeated here).
_SPECIAL_TOKENS = 5
_LEVELS = (2, 256)
_MAX_SHIFTS = 8
_SHORTEST_WINDOW = 8  # steps; the median absolute deviation of fewer is mostly chance


_RESERVED = frozenset(
    [
        "append",
        "apply",
        "buffers",
        "children",
        "clear",
        "copy",
        "cpu",
        "cuda",
        "double",
        "eval",
        "extend",
        "fromkeys",
        "get",
        "half",
        "float",
        "forward",
        "insert",
        "items",
        "keys",
        "modules",
        "parameters",
        "pop",
        "popitem",
        "setdefault",
        "to",
        "train",
        "training",
        "type",
        "update",
        "values",
    ]
)


class Problem(NamedTuple):
    """A violated rule: what is wrong and what helps."""

    cause: str
    remedy: str


def as_error(problems: Sequence[Problem]) -> ConfigError:
    """One error for all problems: the first is its cause and remedy, each other one is a further line of the cause."""
    first, *others = problems
    lines = [first.cause, *(f"also: {problem.cause}; {problem.remedy}" for problem in others)]
    return ConfigError("\n".join(lines), remedy=first.remedy)


def violations(config: Config, *, world_size: int | None = None) -> list[Problem]:
    """All violated rules; those about the number of ranks only if `world_size` is known."""
    problems = [problem for rule in _RULES for problem in rule(config)]
    if world_size is not None:
        problems += _world(config, world_size)
    return problems


def check(config: Config, *, world_size: int | None = None) -> None:
    """Check every rule between settings.

    Args:
        config: a configuration whose single values are valid.
        world_size: number of ranks; None while it is not known.

    Raises:
        ConfigError: at least one rule is violated.
    """
    problems = violations(config, world_size=world_size)
    if problems:
        raise as_error(problems)


def _vocab(config: Config) -> Iterator[Problem]:
    modalities = config.vocab.modalities
    if not modalities:
        yield Problem("vocab.modalities is empty", "name at least a text modality with its number of ids")
        return
    if len(set(config.vocab.names)) < len(modalities):
        yield Problem(
            f"vocab.modalities: names repeat: {', '.join(config.vocab.names)}", "give each modality its own name"
        )
    for name in sorted({*config.vocab.names, *config.model.experts.counts}):
        # Names become parts of parameter names; torch refuses dots and what its containers are called themselves.
        if "." in name or name in _RESERVED:
            yield Problem(
                f"the modality or expert group {name!r} cannot be part of a parameter's name",
                "choose a name without dots that no torch module has as an attribute, e.g. text or image",
            )
    if modalities[0].size < _SPECIAL_TOKENS:
        yield Problem(
            f"vocab.modalities.0.size: {modalities[0].name} has {modalities[0].size} ids, fewer than the "
            f"{_SPECIAL_TOKENS} "
            "special tokens that stand in the first range",
            "give the first modality more ids",
        )
    unknown = sorted(set(config.train.modality_weights) - set(config.vocab.names))
    if unknown:
        yield Problem(
            f"train.modality_weights: {', '.join(unknown)} is not in vocab.modalities "
            f"({', '.join(config.vocab.names)})",
            "use the names of vocab.modalities",
        )
    weights = [config.train.modality_weights.get(name, 1.0) for name in config.vocab.names]
    if not any(weights):
        yield Problem(
            "train.modality_weights: every modality has weight 0, nothing is learned", "give one a positive weight"
        )


def _attention(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    heads, groups = model.num_attention_heads, model.query_groups
    if model.kv_channels is None and model.hidden_size % heads:
        yield Problem(
            f"model.hidden_size = {model.hidden_size} is not divisible by model.num_attention_heads = {heads}",
            "change one of them or set model.kv_channels",
        )
    elif model.head_dim % 2:
        yield Problem(f"model: the head width {model.head_dim} is odd, rotary embedding turns pairs", "make it even")
    if heads % groups:
        yield Problem(
            f"model.num_attention_heads = {heads} is not divisible by model.num_query_groups = {groups}", "make it so"
        )
    if heads % tp:
        yield _not_divisible("model.num_attention_heads", heads, tp)
    elif groups % tp:
        # mcore would copy key/value heads to several ranks (attention.py); no parity test covers that here.
        yield _not_divisible("model.num_query_groups", groups, tp)


def _widths(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    if tp == 1:
        return
    if model.ffn_hidden_size % tp:
        yield _not_divisible("model.ffn_hidden_size", model.ffn_hidden_size, tp)
    shared = derived.shared_width(config)
    if shared % tp:
        yield _not_divisible("model.experts: the width of all shared experts together", shared, tp)
    if config.vocab.padded_size % tp:
        yield Problem(
            f"vocab.pad_multiple = {config.vocab.pad_multiple} pads to {config.vocab.padded_size} rows, which "
            f"parallel.tp = {tp} "
            "does not divide",
            f"make vocab.pad_multiple a multiple of {tp}",
        )
    if model.seq_length % tp:
        # Sequence parallelism is always on: without it nobody would reduce the routers' gradients over TP.
        yield Problem(
            f"model.seq_length = {model.seq_length} is not divisible by parallel.tp = {tp}; above tp = 1 sequence "
            "parallelism "
            "splits every sequence over the tensor-parallel ranks",
            "change one of them",
        )


def _not_divisible(name: str, value: int, tp: int) -> Problem:
    return Problem(f"{name} = {value} is not divisible by parallel.tp = {tp}", "change one of them")


def _experts(config: Config) -> Iterator[Problem]:
    kind, experts, names = config.model.kind, config.model.experts, config.vocab.names
    if kind == "dense":
        for key, given in (("counts", experts.counts), ("shared", experts.shared), ("noise", experts.noise != "none")):
            if given:
                yield Problem(
                    f"model.experts.{key} is set, but model.kind = dense has no experts", "remove it or change the kind"
                )
        return
    if kind == "moe" and len(experts.counts) != 1:
        yield Problem(
            f"model.experts.counts has {len(experts.counts)} groups, model.kind = moe wants exactly one for all "
            "modalities",
            "write for instance counts: {mixed: 8}, or use kind: moma for a group per modality",
        )
    if kind == "moma" and set(experts.counts) != set(names):
        yield Problem(
            f"model.experts.counts names {', '.join(experts.counts) or 'nothing'}, model.kind = moma wants one group "
            "for each of "
            f"vocab.modalities: {', '.join(names)}",
            "give every modality its number of experts",
        )
    ep = config.parallel.ep
    for name, count in experts.counts.items():
        if count % ep:
            yield Problem(
                f"model.experts.counts.{name} = {count} is not divisible by parallel.ep = {ep}; every expert-parallel "
                "rank holds "
                "the same number of experts of each group",
                "change one of them",
            )


def _capacity(config: Config) -> Iterator[Problem]:
    model, experts, names = config.model, config.model.experts, config.vocab.names
    if experts.share != "auto":
        if set(experts.share) != set(names):
            yield Problem(
                f"model.experts.share names {', '.join(experts.share) or 'nothing'}, vocab.modalities has "
                f"{', '.join(names)}",
                "give every modality its share, or write auto",
            )
        elif not math.isclose(sum(experts.share.values()), 1.0, abs_tol=1e-6):
            yield Problem(
                f"model.experts.share sums to {sum(experts.share.values()):g}, not to 1", "make the shares sum to 1"
            )
    if model.kind == "dense":
        return
    scope = model.seq_length * (config.train.micro_batch_size if experts.scope == "micro_batch" else 1)
    if experts.capacity_multiple > scope:
        yield Problem(
            f"model.experts.capacity_multiple = {experts.capacity_multiple} is more than the {scope} tokens an expert "
            "chooses from",
            "lower it",
        )
    for name, count in experts.counts.items():
        share = experts.share.get(name, 1.0) if model.kind == "moma" and experts.share != "auto" else 1.0
        if model.kind == "moma" and experts.share == "auto":
            continue  # not known before the data is
        wanted = experts.capacity_factor * share / count
        if wanted > 1.0:
            yield Problem(
                f"model.experts: capacity_factor {experts.capacity_factor:g} * share {share:g} / {count} experts of "
                f"{name} = "
                f"{wanted:g}: each expert would take more tokens than there are",
                "lower model.experts.capacity_factor",
            )


def _depth(config: Config) -> Iterator[Problem]:
    depth, tp = config.model.depth, config.parallel.tp
    if depth is None:
        return
    if depth.multiple % tp:
        # Rounding the selection to TP itself would make the loss depend on the layout.
        yield Problem(
            f"model.depth.multiple = {depth.multiple} is not divisible by parallel.tp = {tp}; the selected tokens are "
            "split over "
            "the tensor-parallel ranks",
            f"make model.depth.multiple a multiple of {tp}",
        )
    if depth.multiple > config.model.seq_length:
        yield Problem(
            f"model.depth.multiple = {depth.multiple} is more than model.seq_length = {config.model.seq_length}: a "
            "layer would "
            "have to select more tokens than there are",
            "lower model.depth.multiple",
        )


def _auxiliary(config: Config) -> Iterator[Problem]:
    model, stage = config.model, config.auxiliary
    if model.auxiliary.mode == "stage":
        yield Problem(
            "model.auxiliary.mode = stage is what `mmscale train CONFIG --stage auxiliary` sets by itself",
            "write off and run that command after the main run, or write joint",
        )
    for key, given in (
        ("model.auxiliary.mode = joint", model.auxiliary.mode == "joint"),
        ("model.experts.threshold_decay", model.experts.threshold_decay > 0.0),
    ):
        if given and not model.routes:
            yield Problem(f"{key} is set, but a dense model without Mixture-of-Depths routes nothing", "remove it")
    if model.experts.threshold_decay >= 1.0:
        yield Problem("model.experts.threshold_decay = 1 never moves from its start", "use a value below 1, e.g. 0.99")
    size = stage.global_batch_size or config.train.global_batch_size
    micro = stage.micro_batch_size or config.train.micro_batch_size
    if size % micro:
        yield Problem(
            f"auxiliary: the global batch of {size} sequences is not divisible by micro-batches of {micro}",
            "change auxiliary.global_batch_size or auxiliary.micro_batch_size",
        )


def _layout(config: Config) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.cp > 1:
        yield Problem(
            f"parallel.cp = {parallel.cp}: context parallelism is refused: expert choice and Mixture-of-Depths rank "
            "the tokens of "
            "whole sequences, which no rank would see",
            "use parallel.cp=1; parallel.tp splits long sequences as well",
        )
    if parallel.ep > 1 and config.model.kind == "dense":
        yield Problem(
            f"parallel.ep = {parallel.ep}, but model.kind = dense has no experts to spread", "use parallel.ep=1"
        )
    if parallel.vpp is not None and (parallel.pp == 1 or parallel.vpp == 1):
        yield Problem(
            f"parallel.vpp = {parallel.vpp} with parallel.pp = {parallel.pp}: interleaving needs two stages and two "
            "chunks of each",
            "use parallel.vpp=null or more stages and chunks",
        )
    chunks = parallel.pp * (parallel.vpp or 1)
    if layers % chunks:
        yield Problem(
            f"model.num_layers = {layers} is not divisible by parallel.pp * vpp = {parallel.pp} * {parallel.vpp or 1} "
            f"= {chunks}",
            "change one of them",
        )
    yield from _pipeline_sends(config)
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield Problem(
            "parallel.overlap_param_gather needs parallel.overlap_grad_reduce: both work on the same buckets",
            "set parallel.overlap_grad_reduce=true",
        )


def _pipeline_sends(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    overlap, batch = derived.overlap_p2p(config), derived.batch_p2p(config)
    if parallel.pp > 1 and overlap and parallel.vpp is None:
        yield Problem(
            "parallel.overlap_p2p needs interleaving (mcore's schedules.py refuses it)", "set parallel.vpp or drop it"
        )
    if overlap and batch:
        yield Problem(
            "parallel.overlap_p2p and parallel.batch_p2p exclude each other: batched sends wait for their receives",
            "set parallel.batch_p2p=false",
        )
    elif parallel.pp == 2 and parallel.vpp is not None and batch:
        # Batched, both neighbours are the same peer and messages match in the wrong order: silently wrong losses.
        yield Problem(
            "parallel.batch_p2p with parallel.pp = 2 and vpp mixes up the two directions to the only neighbour: "
            "losses are wrong",
            "leave parallel.overlap_p2p and parallel.batch_p2p at null",
        )


def _batches(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.global_batch_size % train.micro_batch_size:
        yield Problem(
            f"train.global_batch_size = {train.global_batch_size} is not divisible by train.micro_batch_size = "
            f"{train.micro_batch_size}",
            "change one of them",
        )


def _optim(config: Config) -> Iterator[Problem]:
    yield from _optimizer(config.optim, config.train.steps, section="optim", of="train")
    stage = config.auxiliary
    yield from _optimizer(stage.optim, stage.steps, section="auxiliary.optim", of="auxiliary")


def _optimizer(optim: OptimConfig, steps: int, *, section: str, of: str) -> Iterator[Problem]:
    if optim.warmup > steps:
        yield Problem(
            f"{section}.warmup = {optim.warmup} steps is more than {of}.steps = {steps}", "shorten the warm-up"
        )
    if optim.min_lr > optim.lr:
        yield Problem(
            f"{section}.min_lr = {optim.min_lr:g} is above {section}.lr = {optim.lr:g}", f"lower {section}.min_lr"
        )
    if optim.schedule in ("wsd", "power") and optim.decay is not None and optim.warmup + optim.decay > steps:
        yield Problem(
            f"{section}.warmup + {section}.decay = {optim.warmup} + {optim.decay} steps is more than "
            f"{of}.steps = {steps}",
            "shorten one of them",
        )
    for key, beta in (("beta1", optim.beta1), ("beta2", optim.beta2)):
        if beta >= 1.0:
            yield Problem(f"{section}.{key} = {beta:g} never forgets, Adam divides by 1 - {key}", "use a value below 1")
    for key, value in optim.model_dump().items():
        if isinstance(value, float) and not math.isfinite(value):
            yield Problem(f"{section}.{key} = {value} is not a finite number", "give a finite number")


def _anomaly(config: Config) -> Iterator[Problem]:
    anomaly = config.resilience.anomaly
    if anomaly.window < _SHORTEST_WINDOW:
        yield Problem(
            f"resilience.anomaly.window = {anomaly.window} steps say little about what is usual",
            f"use at least {_SHORTEST_WINDOW}",
        )
    if not math.isfinite(anomaly.threshold):
        yield Problem(
            f"resilience.anomaly.threshold = {anomaly.threshold} is not a finite number", "give a finite number"
        )


def _memory(config: Config) -> Iterator[Problem]:
    if config.resilience.memory_group < 2:
        yield Problem(
            f"resilience.memory_group = {config.resilience.memory_group} leaves nobody to keep a rank's parity",
            "use 2 (a mirror) or more; resilience.memory_every=0 turns the memory tier off",
        )


def _data(config: Config) -> Iterator[Problem]:
    if config.data.path is not None and config.data.blend:
        yield Problem("data.path and data.blend are both set", "keep one of them")
    prepare = config.data.prepare
    if prepare is None:
        return
    if prepare.source == "documents" and not prepare.documents:
        yield Problem(
            "data.prepare.documents is empty, but data.prepare.source = documents",
            "name the files, or use source: digits",
        )
    if prepare.source != "documents" and prepare.documents:
        yield Problem(
            f"data.prepare.documents is set, but data.prepare.source = {prepare.source} reads no documents",
            "remove one of them",
        )
    if prepare.source == "emoji" and not prepare.emoji.languages:
        yield Problem("data.prepare.emoji.languages is empty", "name at least one, e.g. [en]")
    if prepare.augment > _MAX_SHIFTS:
        yield Problem(
            f"data.prepare.augment = {prepare.augment}: there are {_MAX_SHIFTS} shifts by one pixel",
            f"use at most {_MAX_SHIFTS}",
        )
    if prepare.held_out >= 1.0:
        yield Problem("data.prepare.held_out = 1 leaves nothing to train on", "use a value below 1")
    yield from _images(config, prepare)


def _images(config: Config, prepare: PrepareConfig) -> Iterator[Problem]:
    image = prepare.image
    codes = next((modality.size for modality in config.vocab.modalities if modality.name == "image"), None)
    if image.kind == "vq":
        if image.path is None:
            yield Problem(
                "data.prepare.image.path is missing, kind = vq needs the folder of its model", "give the folder"
            )
        return  # how many tokens an image has is the model's affair
    if image.kind == "kmeans":
        if image.size % image.patch:
            yield Problem(
                f"data.prepare.image.size = {image.size} is not divisible by data.prepare.image.patch = {image.patch}",
                "change one of them",
            )
        if image.residual and codes is not None and image.residual >= codes:
            yield Problem(
                f"data.prepare.image.residual = {image.residual} leaves none of the {codes} ids of vocab.modalities' "
                "image to the first codebook",
                "use fewer residual codes, or give image more ids",
            )
        if image.residual and image.path is not None:
            yield Problem(
                "data.prepare.image.residual and path are both set: a codebook that is reused is taken as it is",
                "remove one of them",
            )
    elif codes is not None and not _LEVELS[0] <= codes <= _LEVELS[1]:
        yield Problem(
            f"vocab.modalities: image has {codes} ids, data.prepare.image.kind = levels wants one for each of "
            f"{_LEVELS[0]} to {_LEVELS[1]} grey levels",
            "change the size of the image modality, or use kind: kmeans",
        )
    if image.kind == "levels":
        codes_per_image = image.size**2 * image.channels
    else:
        codes_per_image = (image.size // image.patch) ** 2 * (2 if image.residual else 1)
    tokens = codes_per_image + 2  # <boi> and <eoi>
    for key, limit in (
        ("data.prepare.max_document_tokens", prepare.max_document_tokens),
        ("model.seq_length", config.model.seq_length),
    ):
        if codes is not None and tokens > limit:
            yield Problem(
                f"{key} = {limit} is less than the {tokens} tokens of one image, and an image is never cut",
                "raise it, or use smaller images or larger patches",
            )


def _world(config: Config, world_size: int) -> list[Problem]:
    parallel, train = config.parallel, config.train
    model_ranks = parallel.tp * parallel.pp
    if world_size % model_ranks:
        cause = (
            f"parallel.tp * pp = {parallel.tp} * {parallel.pp} = {model_ranks} does not divide the {world_size} ranks"
        )
        return [Problem(cause, "`mmscale plan CONFIG --gpus N` lists layouts that do")]
    problems = []
    replicas = derived.data_parallel_size(config, world_size)
    if replicas % parallel.ep:
        cause = (
            f"parallel.ep = {parallel.ep} does not divide the {replicas} data-parallel ranks ({world_size} ranks / tp "
            "* pp = "
            f"{model_ranks}); experts are spread over data-parallel ranks"
        )
        problems.append(Problem(cause, "`mmscale plan CONFIG --gpus N` lists layouts that do"))
    portion = train.micro_batch_size * replicas
    if train.global_batch_size % portion:
        cause = (
            f"train.global_batch_size = {train.global_batch_size} is not divisible by train.micro_batch_size * "
            "data-parallel ranks = "
            f"{train.micro_batch_size} * {replicas} = {portion}"
        )
        problems.append(Problem(cause, f"use a multiple of {portion}, or other numbers of ranks"))
    elif parallel.vpp is not None and derived.micro_batches_per_step(config, world_size) % parallel.pp:
        per_step = derived.micro_batches_per_step(config, world_size)
        cause = (
            f"the interleaved schedule (parallel.vpp) runs micro-batches in rounds of parallel.pp = {parallel.pp}; "
            f"{per_step} per step is not divisible"
        )
        problems.append(Problem(cause, "change train.global_batch_size or train.micro_batch_size"))
    return problems


_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _vocab,
    _attention,
    _widths,
    _experts,
    _capacity,
    _depth,
    _layout,
    _batches,
    _optim,
    _auxiliary,
    _anomaly,
    _memory,
    _data,
)
