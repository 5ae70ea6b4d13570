"""The number of parameters of a configuration, summed from the table of tensors (mmscale.layers).

The only biases are those of `model.qkv_bias`. Reproduces Table 1 of MoMa, arXiv 2407.21770.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from mmscale.config import Config
from mmscale.config.derived import depth_tokens, ungated_groups
from mmscale.layers import LayerTensor, TensorPart, layer_tensors
from mmscale.layers.frozen import is_frozen
from mmscale.layers.whole import final_norm
from mmscale.plan.compute import nominal_shares, untied_share


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one layer, summed from the table of its tensors (mmscale.layers).

    Attributes:
        tensors: its parameters.
    """

    tensors: tuple[LayerTensor, ...]

    @cached_property
    def _parts(self) -> Counter[tuple[TensorPart, str | None]]:
        sums: Counter[tuple[TensorPart, str | None]] = Counter()
        for tensor in self.tensors:
            sums[tensor.part, tensor.group] += tensor.size
        return sums

    def of(self, part: TensorPart) -> int:
        """Parameters of a part, over all groups."""
        return sum(size for (own, _), size in self._parts.items() if own is part)

    def by_group(self, part: TensorPart) -> dict[str, int]:
        """Parameters of a part, by the name of the group of experts; only of tensors that belong to a group."""
        return {group: size for (own, group), size in self._parts.items() if own is part and group is not None}

    @property
    def total(self) -> int:
        """All parameters of the layer."""
        return sum(self._parts.values())

    @cached_property
    def experts(self) -> dict[str, int]:
        """All experts of each group, by group name."""
        return self.by_group(TensorPart.EXPERTS)

    @property
    def all_experts(self) -> int:
        """Experts of all groups."""
        return self.of(TensorPart.EXPERTS)

    @cached_property
    def sharded_by_tp(self) -> int:
        """Parameters that are sharded over tensor-parallel ranks but not over expert-parallel ranks."""
        return sum(tensor.size for tensor in self.tensors if tensor.tp_axis is not None and not tensor.spread)

    @cached_property
    def replicated(self) -> int:
        """Parameters of which every rank of the stage holds a copy."""
        return sum(tensor.size for tensor in self.tensors if tensor.tp_axis is None and not tensor.spread)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model.

    Attributes:
        embedding: input embedding, padded rows included.
        output: output layer; 0 if tied to the embedding.
        layers: every layer, in order.
        final_norm: the norm before the output layer, one after another if each modality has its own.
        active: parameters used for an average token, see `count_parameters`.
        frozen: parameters that `optim.freeze` names.
    """

    embedding: int
    output: int
    layers: tuple[LayerParameters, ...]
    final_norm: tuple[LayerTensor, ...]
    active: int
    frozen: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.output + self.final_norms + sum(layer.total for layer in self.layers)

    @property
    def final_norms(self) -> int:
        """Parameters of the norm before the output layer."""
        return sum(tensor.size for tensor in self.final_norm)

    def of(self, part: TensorPart) -> int:
        """Parameters of a part of all layers."""
        return sum(layer.of(part) for layer in self.layers)

    @property
    def experts(self) -> int:
        """Experts of all groups, without shared ones."""
        return self.of(TensorPart.EXPERTS)

    @property
    def routers(self) -> int:
        """Routers of all groups."""
        return self.of(TensorPart.ROUTER)

    @property
    def depth_routers(self) -> int:
        """Routers of the Mixture-of-Depths layers."""
        return self.of(TensorPart.DEPTH_ROUTER)

    @property
    def norms(self) -> int:
        """All norms."""
        return self.final_norms + self.of(TensorPart.NORM) + self.of(TensorPart.EXPERT_NORM)

    @property
    def per_modality(self) -> dict[str, int]:
        """Parameters that only this modality's tokens use: experts, router, expert norm and untied weights."""
        sums: Counter[str] = Counter()
        for layer in self.layers:
            for part in (TensorPart.EXPERTS, TensorPart.ROUTER, TensorPart.EXPERT_NORM):
                sums.update(layer.by_group(part))
        for tensor in chain(self.final_norm, *(layer.tensors for layer in self.layers)):
            if tensor.untied:
                sums[str(tensor.modality)] += tensor.size
        return dict(sums)

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """Plain data for `mmscale plan --json`."""
        return {
            "total": self.total,
            "active": self.active,
            "frozen": self.frozen,
            "per_modality": self.per_modality,
            "embedding": self.embedding,
            "output": self.output,
            "attention": self.of(TensorPart.ATTENTION),
            "ffn": self.of(TensorPart.FFN),
            "experts": self.experts,
            "shared_experts": self.of(TensorPart.SHARED),
            "routers": self.routers,
            "depth_routers": self.depth_routers,
            "auxiliary_routers": self.of(TensorPart.AUXILIARY),
            "norms": self.norms,
        }


def layer_parameters(config: Config, *, depth: bool) -> LayerParameters:
    """Parameters of a layer; `depth`: of a Mixture-of-Depths layer."""
    return LayerParameters(tuple(tensor for tensor in layer_tensors(config, depth=depth) if tensor.is_parameter))


def count_parameters(config: Config) -> Parameters:
    """Count parameters.

    `active` is the number used for an average token: all of a dense layer; in each group as many experts as take a
    token on average, which is the capacity factor, or as many as a token chooses; one modality's copy of an untied
    weight; for a Mixture-of-Depths layer the fraction of tokens that it processes. Embedding and output layer count
    completely, so that for a dense model all parameters are active.
    """
    model = config.model
    # All layers of a kind have the same parameters.
    kinds = {depth: layer_parameters(config, depth=depth) for depth in (False, True)}
    layers = tuple(kinds[model.is_depth_layer(index)] for index in range(model.num_layers))
    table = config.vocab.padded_size * model.hidden_size
    output = 0 if model.tie_embeddings else table
    one_expert = 3 * model.hidden_size * model.ffn_hidden_size if model.has_experts else 0
    chosen = model.experts.token_choice
    taken = model.experts.capacity_factor if chosen is None else chosen.top_k
    shares = nominal_shares(config)
    routed = 1.0 - sum(shares[group.name] for group in ungated_groups(config))  # share of tokens that take experts
    active = float(table + output + model.hidden_size)
    for index, layer in enumerate(layers):
        fraction = depth_tokens(config) / model.seq_length if model.is_depth_layer(index) else 1.0
        depth_router = layer.of(TensorPart.DEPTH_ROUTER)
        passed = layer.total - depth_router - layer.all_experts + routed * taken * one_expert
        skipped = sum((1.0 - untied_share(config, tensor)) * tensor.size for tensor in layer.tensors)
        active += depth_router + fraction * (passed - skipped)
    norms = tuple(final_norm(config))
    every = chain(norms, *(layer.tensors for layer in layers))
    frozen = sum(tensor.size for tensor in every if is_frozen(config, tensor))
    return Parameters(
        embedding=table,
        output=output,
        layers=layers,
        final_norm=norms,
        active=round(active),
        frozen=frozen,
    )


def trained(config: Config, parameters: Parameters) -> Parameters:
    """The parameters without frozen ones: those that have gradients, optimizer state and messages."""
    if not config.optim.freeze:
        return parameters
    layers = tuple(
        LayerParameters(tuple(tensor for tensor in layer.tensors if not is_frozen(config, tensor)))
        for layer in parameters.layers
    )
    norms = tuple(tensor for tensor in parameters.final_norm if not is_frozen(config, tensor))
    return replace(parameters, layers=layers, final_norm=norms)
