"""Proposes a configuration for a data set and a budget: vocabulary, images, model, layout, rate, batch, steps.

The proposal follows rules of thumb, each with its reason and its source, and is a starting point for a sweep. It reads
no data and measures no machine: the caller passes facts. `mmscale train` accepts the proposal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

from mmscale.config.load import resolve
from mmscale.errors import UsageError
from mmscale.plan.layouts import evaluate
from mmscale.plan.memory import GIB
from mmscale.plan.proposal import Proposal
from mmscale.plan.search import search
from mmscale.plan.sizing_inputs import Facts, Machine
from mmscale.plan.vocabulary import PASSES, multiple, of_documents, of_prepared, tokens
from mmscale.tables.settings import KINDS

TOKENS_PER_PARAMETER = 20
USED = 0.85  # fraction of the budget for steps; evaluation, saves and the start take the rest
LEAST_PER_PARAMETER = 4  # tokens per parameter, if the data is too small for the budget
MOST_TOKENS = {"cpu": 2048, "gpu": 8192}  # largest sequence length, unless the longest document needs more
# Width, layers and heads, with the aspect ratios of published small models and heads of 16 to 128.
SHAPES = (
    (64, 4, 4),
    (128, 4, 4),
    (192, 6, 6),
    (256, 8, 4),
    (384, 8, 6),
    (512, 8, 8),
    (768, 12, 12),
    (1024, 16, 16),
    (1536, 24, 24),
    (2048, 24, 16),
)


@dataclass(frozen=True)
class ModelSize:
    """A size of model.

    Attributes:
        width: of hidden states.
        layers: number of them.
        heads: of attention.
        tokens: number of tokens that it can be trained on within the budget.
    """

    width: int
    layers: int
    heads: int
    tokens: float

    @property
    def ratio(self) -> float:
        """Tokens for each active parameter."""
        return self.tokens / _active(self.width, self.layers)


def propose(facts: Facts, machine: Machine, *, budget_s: float, name: str = "mine") -> Proposal:
    """A configuration for documents, a machine and a time.

    Args:
        facts: about the documents.
        machine: to train on.
        budget_s: wall clock of the whole training [s].
        name: of the run.

    Raises:
        UsageError: there are no documents, the budget is too short for a run, or no model fits into memory.
    """
    if not facts.documents:
        raise UsageError("plan --data: there are no documents", remedy="name a data set or files with documents")
    smallest = 12 * SHAPES[0][0] ** 2 * SHAPES[0][1]
    affordable = USED * budget_s * machine.tokens_per_second(smallest)
    found = Proposal()
    ids = (
        of_prepared(found, facts) if facts.is_prepared else of_documents(found, facts, affordable=affordable, name=name)
    )
    unique, longest, share = tokens(found, facts, ids)
    shapes = _shapes(machine, budget_s, unique)
    for shape in shapes:
        tried = Proposal(settings={"run": {"name": name}} | copy.deepcopy(found.settings), rules=list(found.rules))
        smaller = shape is not shapes[0]
        _model(tried, facts, machine, shape, unique=unique, longest=longest, share=share, smaller=smaller)
        if _layout(tried, machine):
            return tried
    raise UsageError(
        f"plan --data: no model fits into {machine.memory:g} GiB a device with sequences of "
        f"{tried.settings['model']['seq_length']:,} tokens",
        remedy="leave out the longest documents, or name a device with more memory (--gpu h200)",
    )


def _model(
    found: Proposal,
    facts: Facts,
    machine: Machine,
    shape: ModelSize,
    *,
    unique: int,
    longest: int,
    share: Mapping[str, float],
    smaller: bool,
) -> None:
    """Determine sequence length, model, batch, rate and steps."""
    length = max(256, multiple(longest, 64))
    reason = f"the longest document has {longest:,} tokens{'' if facts.is_prepared else ' at most'} and none is cut"
    if not facts.is_prepared:
        if length > MOST_TOKENS[machine.kind]:
            length = MOST_TOKENS[machine.kind]
            reason = f"the longest document may have {longest:,} tokens; longer ones than {length:,} are rejected"
        found.settings["data"]["prepare"]["max_document_tokens"] = length
    found.put(
        "model.seq_length",
        length,
        f"{reason}; 256 at least, short documents are packed",
        "Ding et al., arXiv 2404.10830 (best-fit packing)",
    )
    width, layers, heads, tokens = shape.width, shape.layers, shape.heads, shape.tokens
    ffn = multiple(8 * width / 3, 8)
    kind = "moma" if sum(part > 0 for part in share.values()) > 1 else "dense"
    active = _active(width, layers)
    why = f"of all sizes the nearest to {TOKENS_PER_PARAMETER}"
    if tokens >= PASSES * unique and shape.ratio >= LEAST_PER_PARAMETER:
        why = f"the largest size with {LEAST_PER_PARAMETER} or more that reads the data {PASSES} times in the budget"
    less = "; larger ones do not fit into memory" if smaller else ""
    found.tokens_per_second = machine.tokens_per_second(active)
    found.put(
        "model.hidden_size",
        width,
        f"{layers} layers x {width} have {active / 1e6:.2g} M active parameters without embeddings, "
        f"{tokens / active:.3g} tokens for each: {why}{less}",
        "Chinchilla, arXiv 2203.15556; configs/emoji.yaml has 3",
    )
    found.settings["model"] |= {
        "kind": kind,
        "num_layers": layers,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "norm": "pre",
    }
    experts = 4 if tokens >= 1e9 else 2
    if KINDS[kind].experts:
        counts = dict.fromkeys(share, experts)
        found.put(
            "model.experts",
            {"counts": counts},
            f"{experts} experts a modality; 4 from 1e9 tokens on",
            "MoMa's 4t4i (arXiv 2407.21770); configs/emoji.yaml",
            shown=" + ".join(f"{number} {key}" for key, number in counts.items()),
        )
    found.passes = tokens / max(1, unique)
    if found.passes > 4:
        found.put(
            "model.dropout",
            0.1,
            f"{found.passes:.1f} passes: repeated data is worth less after 4",
            "Muennighoff et al., arXiv 2305.16264; docs/emoji.md",
        )
    _steps(found, facts, machine, tokens, length=length, parameters=_total(width, layers, len(share), experts, kind))
    _auxiliary(found, kind)


def _shapes(machine: Machine, budget_s: float, unique: int) -> list[ModelSize]:
    """The shape that suits data and budget best, then smaller ones."""
    found = []
    for width, layers, heads in SHAPES:
        tokens = min(USED * budget_s * machine.tokens_per_second(_active(width, layers)), PASSES * unique)
        found.append(ModelSize(width, layers, heads, tokens))
    whole = [shape for shape in found if shape.tokens >= PASSES * unique and shape.ratio >= LEAST_PER_PARAMETER]
    # If the data is too small for the budget, a larger model learns more from the same passes.
    best = whole[-1] if whole else min(found, key=lambda one: abs(math.log(one.ratio / TOKENS_PER_PARAMETER)))
    return found[found.index(best) :: -1]


def _layout(found: Proposal, machine: Machine) -> bool:
    """Add a layout that fits into memory to a proposal; False: there is none."""
    if machine.memory is None:
        return True
    config = resolve(found.settings)
    if evaluate(config, machine.ranks, gpu_memory=machine.memory, gpu=machine.gpu).fits:
        return True
    fitting = [
        one for one in search(config, machine.ranks, gpu_memory=machine.memory, gpu=machine.gpu).layouts if one.fits
    ]
    if not fitting:
        return False
    best = fitting[0]
    parallel = best.config.parallel.model_dump(mode="json", exclude_defaults=True)
    found.put(
        "parallel",
        parallel,
        f"the fastest of {len(fitting)} layouts that fit into {machine.memory:g} GiB a device: "
        f"{best.memory.total / GIB:.3g} GiB with micro-batches of {best.config.train.micro_batch_size}; as plain data "
        f"parallelism {evaluate(config, machine.ranks).memory.total / GIB:.3g} GiB",
        "mmscale plan CONFIG",
        shown=", ".join(f"{key} {value}" for key, value in parallel.items()),
    )
    found.settings["train"]["micro_batch_size"] = best.config.train.micro_batch_size
    multiple = best.config.data.document_multiple
    if multiple != config.data.document_multiple:  # the search pads documents for its context parallelism
        found.put("data.document_multiple", multiple, "a multiple of 2 * parallel.cp", "docs/context_parallel.md")
    return True


def _steps(found: Proposal, facts: Facts, machine: Machine, tokens: float, *, length: int, parameters: int) -> None:
    batch = 0.58 * tokens**0.571
    ranks = machine.ranks
    sequences = max(ranks, multiple(batch / length, ranks))
    while sequences > ranks and tokens / (sequences * length) < 200:
        sequences -= ranks  # use smaller batches, because a schedule needs a certain number of steps
    micro = next(size for size in (8, 4, 2, 1) if sequences % (size * ranks) == 0)
    steps = round(tokens / (sequences * length))
    if steps < 20:
        raise UsageError(
            f"plan --data: the budget is enough for {steps} steps of {sequences * length:,} tokens",
            remedy="give more time (--budget 1h), or a faster machine (--gpu h100 --gpus 8)",
        )
    found.seconds = steps * sequences * length / found.tokens_per_second
    found.put(
        "train.global_batch_size",
        sequences,
        f"0.58 x tokens^0.571 = {batch:,.0f} tokens, as sequences of {length} for {ranks} ranks; fewer where that "
        "leaves under 200 steps",
        "Step Law, arXiv 2503.04715",
    )
    found.settings["train"] |= {"micro_batch_size": micro}
    by_data = found.passes > PASSES - 0.01
    why = f"more than {PASSES} passes only overfit" if by_data else f"{USED:.0%} of the budget"
    found.put(
        "train.steps",
        steps,
        f"{tokens / 1e6:,.3g} M tokens = {found.passes:.1f} passes over the data; {why}",
        "arXiv 2305.16264" if by_data else f"{found.tokens_per_second:,.0f} tokens/s are assumed: look at step 50",
    )
    every = max(1, steps // 10)
    found.settings["train"] |= {"eval_every": 0 if facts.held_out == 0 else every, "eval_batches": 8}
    law = 1.79 * parameters**-0.713 * tokens**0.307
    rate = float(f"{min(4e-3, law):.1g}")
    found.put(
        "optim.lr",
        rate,
        f"1.79 x parameters^-0.713 x tokens^0.307 = {law:.2g}, at most 4e-3; try half and twice it",
        "Step Law, arXiv 2503.04715",
    )
    found.settings["optim"] |= {
        "min_lr": 0.0,
        "schedule": "linear",
        "warmup": max(1, min(steps // 20, 2000)),
        "weight_decay": 0.1,
    }
    found.settings["precision"] = {"dtype": "fp32" if machine.kind == "cpu" else "bf16"}
    found.settings["checkpoint"] = {"every": every, "keep": 3}
    found.settings["log"] = {"every": max(1, min(steps // 40, 50))}


def _auxiliary(found: Proposal, kind: str) -> None:
    if not KINDS[kind].experts:
        return
    steps = max(20, min(300, found.settings["train"]["steps"] // 4))
    found.settings["auxiliary"] = {
        "steps": steps,
        "calibration_batches": 8,
        "checkpoint_every": steps,
        "optim": {"lr": 3e-3, "min_lr": 0.0, "warmup": steps // 10, "weight_decay": 0.0},
    }


def _active(width: int, layers: int) -> int:
    """Parameters used for a token, without the vocabulary: attention 4 d^2, SwiGLU 8 d^2."""
    return 12 * width * width * layers


def _total(width: int, layers: int, modalities: int, experts: int, kind: str) -> int:
    """The same with all experts."""
    copies = modalities * experts if KINDS[kind].experts else 1
    return layers * width * width * (4 + 8 * copies)
