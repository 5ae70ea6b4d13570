"""Rules about experts: their groups, capacities and computation (`model.experts`).

These rules hold on every machine. Whether this machine supports a setting is checked when the model is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mmscale.config.derived import expert_counts
from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config

# grouped_mm refuses matrices whose rows do not start at multiples of this [bytes] (aten/native/GroupedMMUtils.h).
_ROW_BYTES = 16


def _experts(config: Config) -> Iterator[Problem]:
    model, names = config.model, config.vocab.names
    experts = model.experts
    if not model.has_experts:
        settings = (
            ("counts", experts.counts),
            ("ungated", experts.ungated),
            ("shared", experts.shared),
            ("noise", experts.noise != "none"),
            ("choice", experts.choice != "sigmoid"),
            ("capacity", experts.capacity != "nominal"),
            ("token_choice", experts.token_choice is not None),
        )
        for key, given in settings:
            if given:
                yield Problem(
                    f"model.experts.{key} is set, but model.kind = {model.kind} has no experts",
                    "remove it or change the kind",
                )
        return
    if not model.per_modality and len(experts.counts) != 1:
        yield Problem(
            f"model.experts.counts has {len(experts.counts)} groups, model.kind = {model.kind} wants exactly one "
            "for all modalities",
            "write for instance counts: {mixed: 8}, or use kind: moma for a group per modality",
        )
    if model.per_modality and set(experts.counts) != set(names):
        yield Problem(
            f"model.experts.counts names {', '.join(experts.counts) or 'nothing'}, model.kind = {model.kind} wants one "
            f"group for each of vocab.modalities: {', '.join(names)}",
            "give every modality its number of experts",
        )
    total = sum(expert_counts(config).values())
    if 0 < total < config.parallel.ep:
        without = ", without those of model.experts.ungated" if experts.ungated else ""
        yield Problem(
            f"model.experts.counts has {total} experts altogether{without}, fewer than parallel.ep = "
            f"{config.parallel.ep}: a rank would hold none",
            "use parallel.ep of at most that",
        )


def _ungated(config: Config) -> Iterator[Problem]:
    model, names = config.model, config.model.experts.ungated
    if not names or not model.has_experts:
        return
    for name in names:
        if not model.per_modality or model.experts.counts.get(name) != 1:
            yield Problem(
                f"model.experts.ungated names {name}, which is no modality's group of one expert",
                f"write counts: {{{name}: 1, ...}}, or remove it from model.experts.ungated",
            )
    # Transformer-Engine's modules were not compared with one process for these groups.
    fp8 = config.precision.fp8 != "off" and not config.precision.emulated
    for key, value, given in (
        ("precision.fp8", config.precision.fp8, fp8),
        ("model.backend", model.backend, model.backend == "te"),
        ("model.experts.compute", model.experts.compute, model.experts.compute == "te"),
    ):
        if given:
            yield Problem(
                f"model.experts.ungated with {key} = {value}: these groups run on the torch backend only",
                "use model.backend=auto or torch, with precision.fp8=off or precision.fp8_emulate=true, or remove "
                "model.experts.ungated",
            )
    if len(set(names)) < len(names):
        yield Problem(f"model.experts.ungated names a group twice: {', '.join(names)}", "name each group once")
    if model.per_modality and set(names) == set(model.experts.counts):
        yield Problem(
            f"model.experts.ungated = [{', '.join(names)}]: no group is left whose tokens are routed",
            "use model.kind=dense with ffn in model.untie, which is the same model",
        )


def _token_choice(config: Config) -> Iterator[Problem]:
    experts = config.model.experts
    chosen = experts.token_choice
    if chosen is None or not config.model.has_experts:
        return
    for key, given, remedy in (
        ("choice", experts.choice != "sigmoid", "set model.experts.token_choice.scores"),
        ("capacity", experts.capacity != "nominal", "remove it"),
        ("capacity_factor", experts.capacity_factor != 1.0, "set model.experts.token_choice.capacity_factor"),
        ("noise", experts.noise != "none", "remove it"),
    ):
        if given:
            yield Problem(
                f"model.experts.{key} = {getattr(experts, key)} is a setting of expert choice, but "
                "model.experts.token_choice is set",
                remedy,
            )
    for name, count in expert_counts(config).items():
        if chosen.top_k > count:
            yield Problem(
                f"model.experts.token_choice.top_k = {chosen.top_k}, but the group {name} has only {count} experts",
                "lower top_k, or give every group at least as many experts",
            )
    if experts.cuda_graph:
        yield Problem(
            "model.experts.cuda_graph with model.experts.token_choice: a graph replays the shapes that it was captured "
            "with, but the tokens of an expert differ in every batch",
            "use model.experts.cuda_graph=false",
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
    if not model.has_experts:
        return
    scope = model.seq_length * (config.train.micro_batch_size if experts.scope == "micro_batch" else 1)
    if experts.capacity_multiple > scope:
        yield Problem(
            f"model.experts.capacity_multiple = {experts.capacity_multiple} is more than the {scope} tokens an expert "
            "chooses from",
            "lower it",
        )
    for name, count in expert_counts(config).items():
        share = experts.share.get(name, 1.0) if model.per_modality and experts.share != "auto" else 1.0
        if experts.capacity == "actual" or experts.token_choice is not None:
            continue  # capped at all tokens of the group
        if model.per_modality and experts.share == "auto":
            continue  # unknown until the data is known
        wanted = experts.capacity_factor * share / count
        if wanted > 1.0:
            yield Problem(
                f"model.experts: capacity_factor {experts.capacity_factor:g} * share {share:g} / {count} experts of "
                f"{name} = {wanted:g}: each expert would take more tokens than there are",
                "lower model.experts.capacity_factor",
            )


def _grouped(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    if not model.has_experts or model.experts.compute != "grouped_mm":
        return
    multiple = _ROW_BYTES // (2 if config.precision.dtype == "bf16" else 4)
    for key, width in (
        ("model.hidden_size", model.hidden_size),
        ("model.ffn_hidden_size / parallel.tp", model.ffn_hidden_size // tp),
    ):
        if width % multiple:
            yield Problem(
                f"model.experts.compute = grouped_mm: {key} = {width} is not a multiple of {multiple}, and its "
                f"kernels need rows of a multiple of {_ROW_BYTES} bytes",
                f"make it a multiple of {multiple}, or use model.experts.compute=bmm",
            )


def _graphs(config: Config) -> Iterator[Problem]:
    parallel, experts = config.parallel, config.model.experts
    if not experts.cuda_graph:
        return
    if not config.model.has_experts:
        yield Problem(
            f"model.experts.cuda_graph is set, but model.kind = {config.model.kind} has no experts", "remove it"
        )
    if experts.capacity == "actual":
        yield Problem(
            "model.experts.cuda_graph with model.experts.capacity = actual: a graph replays the shapes that it was "
            "captured with, and these capacities change with every micro-batch",
            "use model.experts.capacity=nominal or model.experts.cuda_graph=false",
        )
    if parallel.pp > 1:
        yield Problem(
            f"model.experts.cuda_graph with parallel.pp = {parallel.pp}: a graph keeps the activations of one "
            "micro-batch, and a pipeline stage has several in flight",
            "use parallel.pp=1 or model.experts.cuda_graph=false",
        )
    if parallel.recompute == "full":
        yield Problem(
            "model.experts.cuda_graph with parallel.recompute = full: graphs keep their activations permanently, so "
            "recomputing layers would save no memory",
            "use parallel.recompute=selective or none, or model.experts.cuda_graph=false",
        )
    why = "Transformer-Engine's modules update FP8 state between micro-batches, which a captured graph would repeat"
    fp8 = config.precision.fp8
    if experts.compute == "te":
        yield Problem(
            f"model.experts.cuda_graph with model.experts.compute = te: {why}",
            "use model.experts.compute=bmm or grouped_mm, or model.experts.cuda_graph=false",
        )
    elif experts.compute == "auto" and fp8 != "off" and not config.precision.emulated:
        yield Problem(
            f"model.experts.cuda_graph with precision.fp8 = {fp8}, for which Transformer-Engine computes the experts: "
            f"{why}",
            "use model.experts.cuda_graph=false or precision.fp8=off",
        )


RULES: tuple[Rule, ...] = (_experts, _ungated, _token_choice, _capacity, _grouped, _graphs)
