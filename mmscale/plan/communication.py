"""Bytes that a rank sends in one optimizer step, by kind, counted from the calls of model, schedules and optimizer.

Not counted: the few numbers of the gradient norm and of logged losses, auxiliary routers, and the start and end of a
run. Volumes are those of ring algorithms, which are minimal.

Letters: S tokens of a sequence, B sequences of a micro-batch, H hidden width, K tokens that a depth layer selects.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from mmscale.config import Config
from mmscale.config.derived import (
    dense_replicas,
    depth_tokens,
    expert_counts,
    micro_batches_per_step,
    overlap_data_parallel,
    sends_keys_around,
)
from mmscale.plan.activations import recomputed_modules
from mmscale.plan.compute import dealt_slots, dealt_ungated_slots, fullest_slots
from mmscale.plan.muon_cost import muon_cost
from mmscale.plan.parameters import Parameters, count_parameters, trained
from mmscale.plan.stages import dtype_bytes, first_and_last, rank_tokens, stage_layers, stage_parameters

_FP32 = 4
# megatron-core's buckets of overlapped reduction, in elements (distributed_data_parallel.py).
_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000


class MessageKind(StrEnum):
    """The purpose of messages.

    TP: sums over tensor-parallel ranks (loss, normalised experts, gradients of replicated weights).
    SP: gathering and scattering of the sequence around tensor-parallel matrix products.
    CP: keys and values, router logits and hidden states of the parts of a sequence, and sums of experts' outputs.
    EP: tokens to their experts and back.
    PP: hidden states and their gradients between stages, and the gradient of tied embeddings.
    GRAD_REDUCE: gradients over context- and data-parallel ranks.
    PARAM_GATHER: updated parameters over them.
    MUON: Muon's momentum to the owners of whole matrices, and updates back, over them; likewise over TP ranks as TP.
    """

    TP = "tp"
    SP = "sp"
    CP = "cp"
    EP = "ep"
    PP = "pp"
    GRAD_REDUCE = "grad_reduce"
    PARAM_GATHER = "param_gather"
    MUON = "muon"


class Operation(StrEnum):
    """The collective, or `send` to one other rank."""

    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    ALL_TO_ALL = "all_to_all"
    SEND = "send"


@dataclass(frozen=True)
class Traffic:
    """All messages of one kind, operation and group of a rank in one optimizer step.

    Attributes:
        kind: their purpose.
        operation: the collective.
        ranks: size of the group.
        calls: number of calls.
        payload: total bytes of the full tensors that are gathered, reduced, exchanged or sent.
    """

    kind: MessageKind
    operation: Operation
    ranks: int
    calls: int
    payload: float

    @property
    def sent(self) -> float:
        """Bytes that each rank of the group sends."""
        if self.operation is Operation.SEND:
            return self.payload
        share = self.payload * (self.ranks - 1) / self.ranks
        return 2 * share if self.operation is Operation.ALL_REDUCE else share


class _Ledger:
    """Sums calls and bytes by (kind, operation, ranks); groups of one rank are ignored."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[MessageKind, Operation, int]] = Counter()
        self.payload: Counter[tuple[MessageKind, Operation, int]] = Counter()

    def add(self, kind: MessageKind, operation: Operation, ranks: int, *, payload: float, calls: int = 1) -> None:
        if ranks > 1 and calls > 0 and payload > 0:
            self.calls[kind, operation, ranks] += calls
            self.payload[kind, operation, ranks] += calls * payload  # type: ignore[assignment]

    def entries(self) -> list[Traffic]:
        return [Traffic(*key, calls=calls, payload=self.payload[key]) for key, calls in self.calls.items()]


def communication(
    config: Config, world: int, *, stage: int = 0, parameters: Parameters | None = None
) -> tuple[Traffic, ...]:
    """Everything that a rank of a pipeline stage sends in one optimizer step.

    Args:
        config: a configuration that passes the rules for `world` ranks.
        world: ranks.
        stage: pipeline stage; the fullest rank of it, if expert parallelism does not divide a group of experts.
        parameters: result of `count_parameters`, if it is available.
    """
    parameters = parameters or count_parameters(config)
    parallel = config.parallel
    tp, micro_batches = parallel.tp, micro_batches_per_step(config, world)
    first, last = first_and_last(config, stage)
    ledger = _Ledger()
    layers = Counter(config.model.is_depth_layer(layer) for layer in stage_layers(config, stage))
    for depth, count in layers.items():
        _layer(ledger, config, depth=depth, times=count * micro_batches)
    tokens = rank_tokens(config)
    hidden = tokens * config.model.hidden_size * dtype_bytes(config)
    if first:  # the embedding's partial rows, and their gradient
        ledger.add(MessageKind.SP, Operation.REDUCE_SCATTER, tp, payload=hidden, calls=micro_batches)
        ledger.add(MessageKind.SP, Operation.ALL_GATHER, tp, payload=hidden, calls=micro_batches)
    if last:  # the output layer, then peak and sums of the sharded softmax
        ledger.add(MessageKind.SP, Operation.ALL_GATHER, tp, payload=hidden, calls=2 * micro_batches)
        ledger.add(MessageKind.SP, Operation.REDUCE_SCATTER, tp, payload=hidden, calls=micro_batches)
        ledger.add(MessageKind.TP, Operation.ALL_REDUCE, tp, payload=tokens * _FP32, calls=micro_batches)
        ledger.add(MessageKind.TP, Operation.ALL_REDUCE, tp, payload=2 * tokens * _FP32, calls=micro_batches)
    if parallel.pp > 1:
        chunks = parallel.vpp or 1
        forward, backward = chunks - int(last), chunks - int(first)
        calls = (forward + backward) * micro_batches
        ledger.add(MessageKind.PP, Operation.SEND, parallel.pp, payload=hidden / tp, calls=calls)
        if config.model.tie_embeddings and (first or last):
            ledger.add(MessageKind.PP, Operation.ALL_REDUCE, 2, payload=parameters.embedding / tp * _FP32)
    _states(ledger, config, world, stage, parameters)
    return tuple(ledger.entries())


def sent_by_kind(traffic: tuple[Traffic, ...]) -> dict[str, float]:
    """Bytes that a rank sends in a step, by kind, including zeros."""
    sums = dict.fromkeys((kind.value for kind in MessageKind), 0.0)
    for entry in traffic:
        sums[entry.kind.value] += entry.sent
    return sums


def _layer(ledger: _Ledger, config: Config, *, depth: bool, times: int) -> None:
    """Messages of a number of passes through a layer: forward, backward, and the repeated forward of recompute."""
    model, parallel, size = config.model, config.parallel, dtype_bytes(config)
    tp, cp, batch = parallel.tp, parallel.cp, config.train.micro_batch_size
    length = depth_tokens(config) if depth else model.seq_length
    inner = batch * length / cp
    forwards = times * (2 if parallel.recompute == "full" else 1)
    feed_forwards = times * 2 if "mlp" in recomputed_modules(config) else forwards
    row = model.hidden_size * size

    def gather(payload: float, calls: int) -> None:
        ledger.add(MessageKind.SP, Operation.ALL_GATHER, tp, payload=payload, calls=calls)

    def scatter(payload: float, calls: int) -> None:
        ledger.add(MessageKind.SP, Operation.REDUCE_SCATTER, tp, payload=payload, calls=calls)

    def split(payload: float, calls: int, backwards: int) -> None:
        """Messages by which context-parallel ranks gather, or sum and scatter; backward does the opposite."""
        ledger.add(MessageKind.CP, Operation.ALL_GATHER, cp, payload=payload, calls=calls)
        ledger.add(MessageKind.CP, Operation.REDUCE_SCATTER, cp, payload=payload, calls=backwards)

    keys = 2 * max(model.query_groups / tp, 1) * model.head_dim * size  # keys and values of this rank's heads
    attentions = times * 2 if "core_attn" in recomputed_modules(config) else forwards
    if sends_keys_around(config):
        _ring(ledger, cp, part=inner * keys, forwards=attentions, backwards=times)
    else:
        split(batch * length * keys, attentions, times)
    hidden = inner * row
    # Attention: gather before QKV, scatter after the projection. Backward gathers the input again for the gradient of
    # the weights (tensor_parallel/layers.py); untied linears keep what they gathered (model/untied.py).
    again = {part: 0 if part in model.untie else times for part in ("attention", "ffn")}
    gather(hidden, forwards + times + again["attention"])
    scatter(hidden, forwards + times)
    if model.query_groups < tp:  # ranks that share a key/value head gather all heads (attention.py)
        heads = inner * (model.num_attention_heads + 2 * model.query_groups) * model.head_dim * size
        gather(heads, forwards)
        scatter(heads, times)
    if not model.has_experts:
        gather(hidden, feed_forwards + times + again["ffn"])
        scatter(hidden, feed_forwards + times)
    else:
        _experts(ledger, config, length, forwards=feed_forwards, backwards=times)
    if depth:
        whole = batch * model.seq_length
        gather(whole / cp * _FP32, forwards)  # scores
        gather(whole / cp * row, forwards + times)  # hidden states; the gradient of the scattered update
        split(whole * _FP32, forwards, times)
        # Hidden states; the summed update, in the opposite direction.
        split(whole * row, forwards + times, forwards + times)
        gather(hidden, forwards + times)  # the layer's output; the gradient of the scattered selection


def _ring(ledger: _Ledger, cp: int, *, part: float, forwards: int, backwards: int) -> None:
    """Transformer-Engine's ring: forward passes on a rank's keys and values, backward also their gradients.

    A step of backward sends both in one message, but the first sends no gradients, and the last nothing else.
    """
    ledger.add(MessageKind.CP, Operation.SEND, cp, payload=part, calls=(cp - 1) * forwards)
    ledger.add(MessageKind.CP, Operation.SEND, cp, payload=part * 2 * (cp - 1) / cp, calls=cp * backwards)


def _experts(ledger: _Ledger, config: Config, length: int, *, forwards: int, backwards: int) -> None:
    """A MoMa feed-forward sub-layer over sequences of `length` tokens."""
    model, tp, ep, cp = config.model, config.parallel.tp, config.parallel.ep, config.parallel.cp
    sequence = config.train.micro_batch_size * length * model.hidden_size * dtype_bytes(config)
    scores = config.train.micro_batch_size * length * sum(expert_counts(config).values()) * _FP32
    hidden, logits = sequence / cp, scores / cp
    slots = dealt_slots(config, length)
    for payload in (sequence, scores):
        ledger.add(MessageKind.CP, Operation.ALL_GATHER, cp, payload=payload, calls=forwards)
        ledger.add(MessageKind.CP, Operation.REDUCE_SCATTER, cp, payload=payload, calls=backwards)
    ledger.add(MessageKind.CP, Operation.REDUCE_SCATTER, cp, payload=sequence, calls=forwards)  # the experts' outputs
    ledger.add(MessageKind.CP, Operation.ALL_GATHER, cp, payload=sequence, calls=backwards)
    whole = model.normalizes_experts  # outputs are summed before their norm, and then only scattered
    ledger.add(MessageKind.SP, Operation.ALL_GATHER, tp, payload=hidden, calls=forwards + backwards)
    ledger.add(
        MessageKind.SP, Operation.REDUCE_SCATTER, tp, payload=hidden, calls=backwards + (0 if whole else forwards)
    )
    ledger.add(MessageKind.SP, Operation.ALL_GATHER, tp, payload=logits, calls=forwards)
    if whole:
        for share in (*slots.values(), *dealt_ungated_slots(config, length).values()):
            ledger.add(MessageKind.TP, Operation.ALL_REDUCE, tp, payload=share * sequence, calls=forwards)
        if model.experts.shared:
            ledger.add(MessageKind.TP, Operation.ALL_REDUCE, tp, payload=hidden, calls=forwards)
    else:
        ledger.add(MessageKind.SP, Operation.REDUCE_SCATTER, tp, payload=logits, calls=backwards)
    # Tokens sent to experts, and outputs sent back by the experts of the fullest rank.
    for exchanged in (sum(slots.values()), fullest_slots(config, length)):
        ledger.add(MessageKind.EP, Operation.ALL_TO_ALL, ep, payload=exchanged * sequence, calls=forwards + backwards)


def _states(ledger: _Ledger, config: Config, world: int, stage: int, parameters: Parameters) -> None:
    """Messages for gradients and updated parameters, once a step."""
    parallel, size = config.parallel, dtype_bytes(config)
    replicas = dense_replicas(config, world)
    parameters = trained(config, parameters)
    dense, experts = stage_parameters(config, parameters, stage)
    reduce_overlapped, gather_overlapped = overlap_data_parallel(config, nccl=True)
    # Without overlap, both optimizers (dense and expert parameters) gather all parameters after their part of the step
    # (distrib_optimizer.py, step_with_ready_grads).
    gathers = 2 if experts and not gather_overlapped else 1
    for elements, ranks in ((dense, replicas), (experts, replicas // parallel.ep)):
        for kind, operation, width, overlapped in (
            (MessageKind.GRAD_REDUCE, Operation.REDUCE_SCATTER, _FP32, reduce_overlapped),
            (MessageKind.PARAM_GATHER, Operation.ALL_GATHER, size, gather_overlapped),
        ):
            bucket = max(_BUCKET, _BUCKET_PER_RANK * ranks)
            calls = max(1, round(elements / bucket)) if overlapped else (parallel.vpp or 1)
            times = gathers if kind is MessageKind.PARAM_GATHER else 1
            ledger.add(kind, operation, ranks, payload=elements * width / calls, calls=calls * times)
    muon = muon_cost(config, parameters, stage=stage, world=world)
    for elements, ranks in ((muon.dense, replicas), (muon.experts, replicas // parallel.ep)):
        payload = elements / max(1, ranks) * _FP32
        ledger.add(MessageKind.MUON, Operation.ALL_TO_ALL, ranks, payload=payload, calls=2)
        ledger.add(MessageKind.TP, Operation.ALL_TO_ALL, parallel.tp, payload=payload, calls=2)
    replicated = sum(parameters.layers[layer].replicated for layer in stage_layers(config, stage))
    replicated += parameters.final_norms if first_and_last(config, stage)[1] else 0
    ledger.add(MessageKind.TP, Operation.ALL_REDUCE, parallel.tp, payload=replicated * _FP32)
