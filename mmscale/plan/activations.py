"""The tensors that autograd keeps for backward, part by part.

The list follows the code of mmscale.model: it was made from what torch saves
(`torch.autograd.graph.saved_tensors_hooks`), and a test compares the sums with that. Temporary tensors that exist only
within a layer are `workspace` in memory.py.

With context parallelism a rank has its part of the tokens, but keys, values and router logits of all of them.

Letters: h hidden width, f SwiGLU width, d head width; bytes are per rank and micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from mmscale.config import Config
from mmscale.config.derived import depth_tokens, expert_counts, sends_keys_around, shared_width
from mmscale.plan.compute import dealt_slots, dealt_ungated_slots, fullest_slots
from mmscale.plan.stages import dtype_bytes, rank_tokens

_FP32 = 4
# Bytes of an expert's slot: token numbers (three times int64), gate and validity.
_SLOT_BYTES = 3 * 8 + _FP32 + 1


class Kernels(StrEnum):
    """The implementation of a layer, which determines what autograd keeps.

    HOST: on a CPU. RMSNorm consists of elementary operations that keep fp32 copies; attention is one call per document,
        with context parallelism one call with one mask.
    CUDA: on a GPU, torch backend. RMSNorm is one kernel; attention has one mask for all documents of a micro-batch.
    TE: on a GPU, Transformer-Engine's layers. As CUDA, but attention has no mask and does not repeat keys and values,
        which are copied if a micro-batch has several sequences.
    """

    HOST = "host"
    CUDA = "cuda"
    TE = "te"

    @property
    def norm_copies(self) -> bool:
        """Whether a norm keeps two fp32 tensors of its input's size instead of the input itself."""
        return self is Kernels.HOST


def on_gpu(config: Config) -> Kernels:
    """Kernels of a configuration on a GPU. With `model.backend: auto` Transformer-Engine is assumed to be installed."""
    plain = config.precision.emulated or (config.model.untie and config.precision.fp8 == "off")
    if config.model.backend == "auto" and plain:
        return Kernels.CUDA  # as in model/spec.py
    return Kernels.CUDA if config.model.backend == "torch" else Kernels.TE


def masked(config: Config, kernels: Kernels) -> bool:
    """Whether attention has one mask for all documents of a micro-batch."""
    return kernels is Kernels.CUDA or (kernels is Kernels.HOST and config.parallel.cp > 1)


def recomputed_modules(config: Config) -> frozenset[str]:
    """Parts of a layer that backward recomputes, if it does not recompute the whole layer."""
    return frozenset(config.parallel.recompute_modules if config.parallel.recompute == "selective" else ())


def layer_activations(
    config: Config, layer: int, *, kernels: Kernels = Kernels.CUDA, again: frozenset[str] = frozenset()
) -> dict[str, float]:
    """Bytes that backward of one layer needs, for one micro-batch on one rank, by part.

    Args:
        config: gives layout and model.
        layer: global index.
        kernels: implementation of layers.
        again: recomputed parts (`recomputed_modules`), of which only inputs are kept.

    Returns:
        `norms`, `attention`, `ffn` (dense and shared experts), `router`, `chosen` (tokens in experts' slots),
        `experts`, `combine` (fp32 outputs that are added at the tokens), `depth` (selection and update of a
        Mixture-of-Depths layer), `mask`.
    """
    model, tp, cp, size = config.model, config.parallel.tp, config.parallel.cp, dtype_bytes(config)
    h, batch = model.hidden_size, config.train.micro_batch_size
    depth = model.is_depth_layer(layer)
    length = depth_tokens(config) if depth else model.seq_length
    tokens = batch * length / cp
    per_expert = model.normalizes_experts
    # Besides its output a norm keeps its input, or on a host an fp32 copy of the input and the normalised values.
    norm = 2 * _FP32 if kernels.norm_copies else size
    parts = {"norms": tokens * h * (norm + _untied_norm(config, kernels)) * (1 if per_expert else 2) / tp}
    parts["attention"] = tokens * _attention(config, norm=norm, kernels=kernels, again="core_attn" in again)
    if "mlp" in again:
        parts["ffn"] = tokens * size * h / tp
    elif not model.has_experts:
        # The first projection's two halves, SiLU, the shifted linear half, their product; and the input.
        parts["ffn"] = tokens * size * (5 * model.ffn_hidden_size / tp + h / _input_shards(config, "ffn"))
    else:
        parts |= _experts(config, length, norm=norm if per_expert else 0, kernels=kernels)
    if depth:
        parts["depth"] = batch * model.seq_length * h * _FP32 / (cp * tp) + tokens * h * (_FP32 + size)
    if masked(config, kernels) and depth:  # the other layers share one mask
        parts["mask"] = tokens * length * size
    return parts


def _attention(config: Config, *, norm: int, kernels: Kernels, again: bool) -> float:
    """Bytes per token of this rank for attention, including its input."""
    model, tp, cp, size = config.model, config.parallel.tp, config.parallel.cp, dtype_bytes(config)
    d = model.head_dim
    query, key = model.num_attention_heads * d, model.query_groups * d
    joint = query + 2 * key  # one tensor holds queries, keys and values as projected; k and v are views of it
    # Every rank gathers all heads and uses one key/value head, which it shares with other ranks.
    if model.query_groups < tp:
        joint, key = joint * tp, d * tp
    # A view keeps the whole tensor alive: values do if they are not copied, keys if the norm keeps its input.
    repeated = 0 if kernels is Kernels.TE else query - key
    viewed = cp == 1 and repeated == 0 and (kernels is Kernels.CUDA or config.train.micro_batch_size == 1)
    kept_joint = viewed or again
    elements = 0.0
    if model.qk_norm:
        uncast = size == norm or size == _FP32  # the norm keeps its input itself, not an fp32 copy
        kept_joint = kept_joint or uncast
        elements += norm * query + (norm - size if uncast else norm) * key
        elements += _untied_norm(config, kernels) * (query + key)
    if again:
        elements += size * (query + (2 if cp > 1 else 1) * key)
    elif cp > 1:
        # Keys and values: of all tokens, repeated for every query head, or of this rank's pieces (ragged.py). In a ring
        # those of this rank's tokens.
        gathered = cp + (0.5 if kernels is Kernels.TE else 0)
        if sends_keys_around(config) and kernels is Kernels.TE:
            gathered = 1
        elements += size * (query + 2 * gathered * (key + repeated)) + size * query + _FP32 * model.num_attention_heads
    else:
        values = 0 if viewed else key + repeated
        elements += size * (query + key + repeated + values) + size * query + _FP32 * model.num_attention_heads
    # The output projection's input; the tensor that views keep alive.
    elements += size * query + (size * joint if kept_joint else 0)
    angles = 4 * d * size
    return elements / tp + angles + size * model.hidden_size / _input_shards(config, "attention")


def _input_shards(config: Config, part: str) -> int:
    """Among how many ranks the kept input of a projection is shared. Untied linears keep the gathered rows, sorted."""
    return 1 if part in config.model.untie else config.parallel.tp


def _untied_norm(config: Config, kernels: Kernels, *, part: str = "norms") -> int:
    """Bytes per element that an untied norm keeps in addition: normalised values and each token's weights.

    Both have the model's type. The other norms of a host keep normalised values too, in fp32.
    """
    if part not in config.model.untie:
        return 0
    return 2 * dtype_bytes(config) - (_FP32 if kernels.norm_copies else 0)


def _experts(config: Config, length: int, *, norm: int, kernels: Kernels) -> dict[str, float]:
    """Bytes for experts over sequences of `length` tokens; norm: bytes per element kept by a norm of their outputs."""
    fused = config.model.experts.fused_swiglu
    # Gate and up projection and their product; with torch's own operations also SiLU of the gate.
    widths = 3 if (kernels is not Kernels.HOST if fused is None else fused) else 4
    model, tp, size = config.model, config.parallel.tp, dtype_bytes(config)
    h, whole = model.hidden_size, config.train.micro_batch_size * length
    tokens = whole / config.parallel.cp
    ungated = whole * sum(dealt_ungated_slots(config, length).values())
    slots = whole * sum(dealt_slots(config, length).values()) + ungated
    # Equal to `slots` if expert parallelism divides every group.
    worked_on = whole * fullest_slots(config, length) + ungated
    width = shared_width(config)
    # Every tensor-parallel rank has complete chosen tokens and outputs; only the inner width is sharded.
    parts = {
        "router": tokens * h / tp * _FP32 + whole * sum(expert_counts(config).values()) * _per_score(config),
        "chosen": worked_on * size * h,
        "experts": worked_on * size * widths * model.ffn_hidden_size / tp,
        "combine": slots * (h * (2 * _FP32 + norm) + _SLOT_BYTES),
    }
    if width:
        parts["ffn"] = tokens * (size * (h + widths * width / tp) + norm * h)
    return parts


def _per_score(config: Config) -> int:
    """Bytes that are kept for each token and expert: the score, and for token choice what the gate is made of."""
    chosen = config.model.experts.token_choice
    if chosen is None:
        return _FP32
    masked_scores = _FP32 if chosen.top_k > 1 else 0  # which are divided by their sum
    return _FP32 + 1 + masked_scores


def recomputed_input(config: Config) -> float:
    """Bytes that a fully recomputed layer keeps: its input."""
    return rank_tokens(config) * config.model.hidden_size * dtype_bytes(config) / config.parallel.tp


def output_activations(config: Config, *, kernels: Kernels = Kernels.CUDA) -> float:
    """Bytes kept by the final norm and the output layer's input; logits are counted separately."""
    size = dtype_bytes(config)
    norm = (2 * _FP32 if kernels.norm_copies else size) + _untied_norm(config, kernels, part="final_norm")
    return rank_tokens(config) * config.model.hidden_size * (norm + size) / config.parallel.tp


def shared_mask(config: Config, *, kernels: Kernels = Kernels.CUDA) -> float:
    """Bytes of the mask [B, S / CP, S] that confines attention to documents, made once for a micro-batch."""
    return rank_tokens(config) * config.model.seq_length * dtype_bytes(config) if masked(config, kernels) else 0.0


def expert_choice(parts: Mapping[str, float]) -> float:
    """The parts that only expert choice needs: scores, tokens in slots, outputs that are added at tokens [bytes]."""
    return sum(parts.get(name, 0.0) for name in ("router", "chosen", "combine"))


def total(parts: Mapping[str, float]) -> float:
    """Sum of the parts [bytes]."""
    return sum(parts.values())
