"""Estimates the time of an optimizer step from data-sheet figures and assumed fractions of them, to compare layouts.

Assumptions are those of `tables.gpus.Efficiency`, each a part of `assumptions`. Those about GPUs have not been fitted
to a run of mmscale; `mmscale bench calibrate` measures those of a machine.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

from mmscale.config import Config
from mmscale.config.derived import (
    dense_replicas,
    depth_tokens,
    micro_batches_per_step,
    overlap_data_parallel,
    overlap_p2p,
)
from mmscale.plan.activations import Kernels, layer_activations, on_gpu, recomputed_modules
from mmscale.plan.communication import MessageKind, Operation, Traffic, communication
from mmscale.plan.compute import dealt_slots, expert_slots, fullest_slots, layer_flops, ungated_slots
from mmscale.plan.muon_cost import muon_cost
from mmscale.plan.parameters import Parameters
from mmscale.plan.stages import dtype_bytes, first_and_last, rank_tokens, stage_layers, stage_parameters
from mmscale.tables.gpus import Gpu
from mmscale.tables.settings import KINDS

# Bytes moved to convert a bf16 element to FP8: read for the amax and for the cast, written and written transposed.
_CAST = 6
# Parts of `layer_activations` that only layers with experts or Mixture-of-Depths have.
_ROUTED = ("router", "chosen", "experts", "combine", "depth")
_OVER_REPLICAS = (MessageKind.GRAD_REDUCE, MessageKind.PARAM_GATHER, MessageKind.MUON)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest stage.

    Attributes:
        products: matrix products, or starting their kernels if that takes longer.
        attention: scores and weighted sums.
        elementwise: operations limited by memory bandwidth.
        recompute: repeated forward passes.
        tp: tensor and sequence parallelism.
        cp: keys and values, logits and hidden states of the parts of a sequence; of a ring the part that attention
            does not hide.
        ep: tokens to their experts and back.
        pp: sends between stages that do not overlap.
        bubble: waiting for other stages.
        dp: reducing gradients and gathering parameters, without the overlapped part.
        optimizer: the update, with Muon's products and messages, and FP8 copies of the weights.
    """

    products: float
    attention: float
    elementwise: float
    recompute: float
    tp: float
    cp: float
    ep: float
    pp: float
    bubble: float
    dp: float
    optimizer: float

    @property
    def total(self) -> float:
        """The step [s]."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def compute(self) -> float:
        """Arithmetic [s]."""
        return self.products + self.attention + self.elementwise + self.recompute + self.optimizer

    @property
    def communication(self) -> float:
        """Messages that are not overlapped [s]."""
        return self.tp + self.cp + self.ep + self.pp + self.dp

    def as_dict(self) -> dict[str, float]:
        """Plain data in seconds."""
        return {part.name: round(getattr(self, part.name), 6) for part in fields(self)} | {
            "total": round(self.total, 6)
        }


@dataclass(frozen=True)
class _Pass:
    """Seconds of one micro-batch on a stage; products, attention and element-wise operations of the forward pass."""

    products: float
    waits: tuple[float, float]  # for kernels to start, forward and backward
    attention: float
    elementwise: float
    backward: float
    recompute: float

    @property
    def forward(self) -> float:
        return self.products + self.waits[0] + self.attention + self.elementwise


def step_time(config: Config, world: int, gpu: Gpu, *, parameters: Parameters) -> StepTime:
    """Seconds of an optimizer step.

    Args:
        config: a configuration that passes the rules for `world` ranks.
        world: ranks, one device each.
        gpu: figures of the device.
        parameters: result of `count_parameters`.
    """
    seen: dict[tuple[bool, bool, int, int], StepTime] = {}
    for stage in range(config.parallel.pp):
        layers = stage_layers(config, stage)
        key = (*first_and_last(config, stage), len(layers), sum(map(config.model.is_depth_layer, layers)))
        if key not in seen:
            seen[key] = _stage_time(config, world, gpu, stage=stage, parameters=parameters)
    return max(seen.values(), key=lambda time: time.total)


def mfu(config: Config, world: int, gpu: Gpu, *, seconds: float, flops: float) -> float:
    """Model FLOP/s divided by the device's bf16 peak, a share.

    Args:
        config: tokens of a step.
        world: number of ranks.
        gpu: the device.
        seconds: of a step.
        flops: of a token, forward and backward.
    """
    tokens = config.train.global_batch_size * config.model.seq_length
    return flops * tokens / (seconds * world * gpu.bf16)


def _stage_time(config: Config, world: int, gpu: Gpu, *, stage: int, parameters: Parameters) -> StepTime:
    parallel = config.parallel
    micro_batches = micro_batches_per_step(config, world)
    one = _compute(config, gpu, stage)
    sums: Counter[MessageKind] = Counter()
    ring = 0.0
    for traffic in communication(config, world, stage=stage, parameters=parameters):
        seconds = _seconds(traffic, config, world, gpu)
        if traffic.kind is MessageKind.CP and traffic.operation is Operation.SEND:
            ring += seconds
        else:
            sums[traffic.kind] += seconds  # type: ignore[assignment]
    # Every step of a ring but the last sends while it computes. A device that waits for messages does not wait for
    # kernels to start, because its host goes on starting them.
    hidden = micro_batches * 3 * one.attention * (parallel.cp - 1) / parallel.cp
    hidden += 0.0 if gpu.host else micro_batches * sum(one.waits)
    sums[MessageKind.CP] += max(0.0, ring - hidden)  # type: ignore[assignment]
    reduce, gather = sums[MessageKind.GRAD_REDUCE], sums[MessageKind.PARAM_GATHER]
    overlapped = overlap_data_parallel(config, nccl=True)
    # They can overlap only with the last backward and the first forward pass of a step.
    exposed = max(0.0, reduce - one.backward) if overlapped[0] else reduce
    exposed += max(0.0, gather - one.forward) if overlapped[1] else gather
    tensor = sums[MessageKind.TP] + sums[MessageKind.SP]
    pipeline = 0.0 if overlap_p2p(config) else sums[MessageKind.PP]
    shown = tensor + sums[MessageKind.CP] + sums[MessageKind.EP] + pipeline
    busy = micro_batches * (one.forward + one.backward + one.recompute) + shown
    bubble = busy / micro_batches * (parallel.pp - 1) / (parallel.vpp or 1)
    dense, experts = stage_parameters(config, parameters, stage)
    replicas = dense_replicas(config, world)
    shard = dense / replicas + experts / max(1, replicas // parallel.ep)
    # Weights are cast once a step, because megatron-core keeps FP8 weights for all micro-batches.
    casts = _CAST if _peak(config, gpu, fp8=True) > _peak(config, gpu, fp8=False) else 0
    muon = muon_cost(config, parameters, stage=stage, world=world)
    peak, reached = gpu.bf16 if config.optim.muon.dtype == "bf16" else gpu.fp32, gpu.efficiency
    orthogonalized = muon.flops / (peak * _reached(muon.narrowest, gpu)) + sums[MessageKind.MUON]
    return StepTime(
        products=micro_batches * (3 * one.products + sum(one.waits)),
        attention=micro_batches * one.attention * 3,
        elementwise=micro_batches * one.elementwise * (1 + reached.backward_moves),
        recompute=micro_batches * one.recompute,
        tp=tensor,
        cp=sums[MessageKind.CP],
        ep=sums[MessageKind.EP],
        pp=pipeline,
        bubble=bubble,
        dp=exposed,
        optimizer=(shard * reached.adam + (dense + experts) * (8 + casts)) / (gpu.bandwidth * reached.memory)
        + orthogonalized
        + reached.fixed,
    )


def _compute(config: Config, gpu: Gpu, stage: int) -> _Pass:
    """Seconds of a micro-batch on a stage, without recomputation."""
    model, tp = config.model, config.parallel.tp
    tokens, reached, kernels = rank_tokens(config), gpu.efficiency, _kernels(config, gpu)
    bandwidth = gpu.bandwidth * reached.memory
    share = reached.attention_te if kernels is Kernels.TE else reached.attention
    products = attention = elementwise = feed_forward = 0.0
    waits = [0.0, 0.0]  # forward and backward
    counts = Counter(model.is_depth_layer(layer) for layer in stage_layers(config, stage))
    example = {model.is_depth_layer(layer): layer for layer in stage_layers(config, stage)}
    plain, fast = _peak(config, gpu, fp8=False), _peak(config, gpu, fp8=True)
    width = min(model.hidden_size, model.num_attention_heads * model.head_dim // tp)
    inner = min(model.hidden_size, model.ffn_hidden_size // tp)
    for depth, count in counts.items():
        flops = layer_flops(config, depth=depth)
        ffn = flops.ffn + _waited_for(config, depth=depth)
        expert = (ffn / (fast * _reached(inner, gpu)) + flops.routers / plain) * tokens / tp
        seconds = flops.projections / (fast * _reached(width, gpu)) * tokens / tp + expert
        started = KINDS[model.kind].kernels * (1.3 if depth else 1.0) * reached.launch
        parts = layer_activations(config, example[depth], kernels=kernels)
        cast = _cast_bytes(config, depth=depth) if fast > plain else 0.0
        routed = reached.routed_moves * sum(parts.get(name, 0.0) for name in _ROUTED)
        plainly = reached.moves * sum(size for name, size in parts.items() if name not in _ROUTED)
        moved = (plainly + routed + cast) / bandwidth
        inside = reached.moves * parts.get("ffn", 0.0) + routed - reached.routed_moves * parts.get("depth", 0.0)
        feed_forward += count * (expert + inside / bandwidth)
        within = flops.attention * tokens / tp / (plain * share)
        elementwise += count * moved
        attention += count * within
        # If starting kernels takes longer than running them, the device waits for the host. A host runs them itself.
        # Backward starts twice as many.
        back = 2 * (seconds + within) + reached.backward_moves * moved
        for place, busy in enumerate((seconds + within + moved, back)):
            starting = (1 + place) * started
            waits[place] += count * (starting if gpu.host else max(0.0, starting - busy))
        products += count * seconds
    again = recomputed_modules(config)
    # Only layers; a loss in chunks repeats the output layer and its logits.
    repeated = products + waits[0] + attention + elementwise if config.parallel.recompute == "full" else 0.0
    repeated += attention if "core_attn" in again else 0.0
    repeated += feed_forward if "mlp" in again else 0.0
    if first_and_last(config, stage)[1]:
        rows = config.vocab.padded_size / tp
        product = 2 * model.hidden_size * rows * tokens / (plain * _reached(int(min(model.hidden_size, rows)), gpu))
        products += product
        elementwise += reached.logits * rows * tokens / bandwidth
        repeated += product if config.parallel.loss_chunk else 0.0
    backward = 2 * (products + attention) + waits[1] + elementwise * reached.backward_moves
    return _Pass(products, (waits[0], waits[1]), attention, elementwise, backward, repeated)


def _waited_for(config: Config, *, depth: bool) -> float:
    """FLOPs per token of a layer by which the fullest expert-parallel rank exceeds the average one."""
    model = config.model
    if not model.has_experts:
        return 0.0
    length = depth_tokens(config) if depth else model.seq_length
    more = config.parallel.cp * (fullest_slots(config, length) - sum(dealt_slots(config, length).values()))
    return length / model.seq_length * 2 * 3 * model.hidden_size * model.ffn_hidden_size * more


def _cast_bytes(config: Config, *, depth: bool) -> float:
    """Bytes moved for casting inputs of a layer's products to FP8, in one forward pass."""
    model = config.model
    length = depth_tokens(config) if depth else model.seq_length
    slots = sum(expert_slots(config, length).values()) if model.has_experts else 1.0
    slots += sum(ungated_slots(config, length).values())
    inputs: float = model.hidden_size + model.num_attention_heads * model.head_dim
    inputs += slots * (model.hidden_size + model.ffn_hidden_size)
    return _CAST * config.train.micro_batch_size * length * inputs / (config.parallel.tp * config.parallel.cp)


def _peak(config: Config, gpu: Gpu, *, fp8: bool) -> float:
    """FLOP/s of matrix products in the configuration's formats."""
    if dtype_bytes(config) == 4:
        return gpu.fp32
    if fp8 and config.precision.fp8 != "off" and gpu.fp8 is not None:
        return gpu.fp8
    return gpu.bf16


def _reached(side: int, gpu: Gpu) -> float:
    """Fraction of the peak that a product with this shortest side reaches."""
    return gpu.efficiency.products * side / (side + gpu.efficiency.half_width)


def _kernels(config: Config, gpu: Gpu) -> Kernels:
    """Implementation of layers on this device."""
    return Kernels.HOST if gpu.host else on_gpu(config)


def _seconds(traffic: Traffic, config: Config, world: int, gpu: Gpu) -> float:
    """Seconds of messages without overlap.

    Ranks have megatron-core's order tp-cp-dp-pp, and experts are distributed over cp and then dp. A ring over several
    machines uses as many adapters as the group has ranks in a machine; in an exchange each rank sends through its own.
    """
    parallel = config.parallel
    node = gpu.per_node
    # Distance between neighbours of the group, in ranks.
    stride = {
        MessageKind.TP: 1,
        MessageKind.SP: 1,
        MessageKind.CP: parallel.tp,
        MessageKind.EP: parallel.tp,
        MessageKind.PP: world // parallel.pp,
        MessageKind.GRAD_REDUCE: parallel.tp,
        MessageKind.PARAM_GATHER: parallel.tp,
        MessageKind.MUON: parallel.tp,
    }[traffic.kind]
    if traffic.kind in _OVER_REPLICAS and traffic.ranks < dense_replicas(config, world):
        stride *= parallel.ep
    inside = max(1, min(traffic.ranks, node // stride))
    link, network = gpu.link * gpu.efficiency.link, gpu.network * gpu.efficiency.network
    if inside >= traffic.ranks:
        return traffic.sent / link + traffic.calls * gpu.efficiency.latency[0]
    if traffic.operation is Operation.ALL_TO_ALL:
        remote = (traffic.ranks - inside) / (traffic.ranks - 1)
        seconds = traffic.sent * max(remote / network, (1 - remote) / link)
    elif traffic.operation is Operation.SEND:
        seconds = traffic.sent / network
    else:
        seconds = traffic.sent / min(link, inside * network)
    return seconds + traffic.calls * gpu.efficiency.latency[1]


def assumptions(gpu: Gpu, config: Config) -> list[str]:
    """The assumptions behind the times, in words."""
    formats = "FP8" if config.precision.fp8 != "off" and gpu.fp8 is not None else config.precision.dtype
    reached, attention = gpu.efficiency, _kernels(config, gpu)
    share = reached.attention_te if attention is Kernels.TE else reached.attention
    return [
        f"{gpu.name} ({gpu.source}): {_peak(config, gpu, fp8=True) / 1e12:.3g} TFLOP/s in {formats}, "
        f"{gpu.bandwidth / 1e12:.3g} TB/s, {gpu.link / 1e9:.3g} GB/s inside machines of {gpu.per_node}, "
        f"{gpu.network / 1e9:.3g} GB/s between them",
        f"efficiency: {reached.products:.0%} in matrix products (half of it with a side of {reached.half_width:.0f}), "
        f"{share:.0%} in attention, {reached.memory:.0%} of memory, {reached.link:.0%} inside machines, "
        f"{reached.network:.0%} between them; {1e6 * reached.launch:.0f} us to launch each of "
        f"{KINDS[config.model.kind].kernels} kernels per layer",
        "overlapped, if the settings say so: gradients with one backward pass, parameters with one forward pass, sends "
        "between stages with interleaving. Messages of TP and EP are not overlapped",
    ]
