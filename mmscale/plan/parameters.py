"""How many parameters a configuration has, exactly as the built model has them (a test compares the two).

Letters: h hidden width, f SwiGLU width, d head width. Nothing has a bias. Reproduces Table 1 of MoMa, arXiv 2407.21770.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mmscale.config import Config
from mmscale.config.derived import depth_tokens, shared_width


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one layer.

    Attributes:
        attention: query, key, value and output projections.
        ffn: the dense feed-forward network; 0 with experts.
        experts: all experts of each group, by group name.
        routers: router of each group, by group name.
        expert_norms: norm of each group's expert outputs (norm placement post_per_expert), by group name.
        shared: shared experts.
        norms: all other norms.
        depth_router: router of a Mixture-of-Depths layer, else 0.
        auxiliary: auxiliary routers for causal inference.
    """

    attention: int
    ffn: int
    experts: dict[str, int]
    routers: dict[str, int]
    expert_norms: dict[str, int]
    shared: int
    norms: int
    depth_router: int
    auxiliary: int = 0

    @property
    def total(self) -> int:
        """All parameters of the layer."""
        return self.sharded_by_tp + self.all_experts + self.replicated

    @cached_property
    def sharded_by_tp(self) -> int:
        """Parameters that tensor-parallel ranks share out and expert-parallel ranks do not."""
        return self.attention + self.ffn + self.shared

    @cached_property
    def all_experts(self) -> int:
        """Experts of all groups."""
        return sum(self.experts.values())

    @cached_property
    def replicated(self) -> int:
        """Parameters that every rank of the stage holds whole."""
        routers = self.depth_router + sum(self.routers.values()) + self.auxiliary
        return self.norms + routers + sum(self.expert_norms.values())


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model.

    Attributes:
        embedding: input embedding, padded rows included.
        output: output layer; 0 if tied to the embedding.
        layers: every layer, in order.
        final_norm: the norm before the output layer.
        active: what an average token passes through, see `count_parameters`.
    """

    embedding: int
    output: int
    layers: tuple[LayerParameters, ...]
    final_norm: int
    active: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.output + self.final_norm + sum(layer.total for layer in self.layers)

    @property
    def experts(self) -> int:
        """Experts of all groups, without shared ones."""
        return sum(layer.all_experts for layer in self.layers)

    @property
    def routers(self) -> int:
        """Routers of all groups."""
        return sum(sum(layer.routers.values()) for layer in self.layers)

    @property
    def depth_routers(self) -> int:
        """Routers of the Mixture-of-Depths layers."""
        return sum(layer.depth_router for layer in self.layers)

    @property
    def norms(self) -> int:
        """All norms."""
        return self.final_norm + sum(layer.norms + sum(layer.expert_norms.values()) for layer in self.layers)

    @property
    def per_modality(self) -> dict[str, int]:
        """Experts, router and expert norm of each group: what only this modality's tokens pass through."""
        sums: dict[str, int] = {}
        for layer in self.layers:
            for name, experts in layer.experts.items():
                own = experts + layer.routers[name] + layer.expert_norms.get(name, 0)
                sums[name] = sums.get(name, 0) + own
        return sums

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """Plain data for `mmscale plan --json`."""
        return {
            "total": self.total,
            "active": self.active,
            "per_modality": self.per_modality,
            "embedding": self.embedding,
            "output": self.output,
            "attention": sum(layer.attention for layer in self.layers),
            "ffn": sum(layer.ffn for layer in self.layers),
            "experts": self.experts,
            "shared_experts": sum(layer.shared for layer in self.layers),
            "routers": self.routers,
            "depth_routers": self.depth_routers,
            "auxiliary_routers": sum(layer.auxiliary for layer in self.layers),
            "norms": self.norms,
        }


def layer_parameters(config: Config, layer: int) -> LayerParameters:
    """Parameters of the layer with this global index (from 0)."""
    model = config.model
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_dim
    heads, groups = model.num_attention_heads, model.query_groups
    dense = model.kind == "dense"
    counts = {} if dense else model.experts.counts
    shared = 0 if dense else shared_width(config)
    # Normalised experts carry their own norms, and then the sub-layer as a whole has none.
    per_expert = model.norm == "post_per_expert" and not dense
    width = model.auxiliary_width or 0
    predicted = [*counts.values(), *([1] if model.is_depth_layer(layer) else [])]
    norms = h * (1 if per_expert else 2) + (2 * d if model.qk_norm else 0)
    return LayerParameters(
        attention=h * (heads + 2 * groups) * d + heads * d * h,
        ffn=3 * h * f if dense else 0,
        experts={name: count * 3 * h * f for name, count in counts.items()},
        routers={name: count * h for name, count in counts.items()},
        expert_norms=dict.fromkeys(counts, h) if per_expert else {},
        shared=3 * h * shared,
        norms=norms + (h if per_expert and shared else 0),
        depth_router=h if model.is_depth_layer(layer) else 0,
        auxiliary=sum(width * (h + count) for count in predicted),
    )


def count_parameters(config: Config) -> Parameters:
    """Count parameters.

    `active` follows an average token: all of a dense layer; of each group's experts as many as take the token on
    average, which is the capacity factor; of a Mixture-of-Depths layer the fraction of tokens that it processes.
    Embedding and output layer count whole, so that a dense model has as many active parameters as parameters.
    """
    model = config.model
    # All layers of a kind are alike.
    examples = {model.is_depth_layer(index): index for index in range(model.num_layers)}
    kinds = {kind: layer_parameters(config, index) for kind, index in examples.items()}
    layers = tuple(kinds[model.is_depth_layer(index)] for index in range(model.num_layers))
    table = config.vocab.padded_size * model.hidden_size
    output = 0 if model.tie_embeddings else table
    one_expert = 0 if model.kind == "dense" else 3 * model.hidden_size * model.ffn_hidden_size
    active = float(table + output + model.hidden_size)
    for index, layer in enumerate(layers):
        fraction = depth_tokens(config) / model.seq_length if model.is_depth_layer(index) else 1.0
        passed = layer.total - layer.depth_router - layer.all_experts + model.experts.capacity_factor * one_expert
        active += layer.depth_router + fraction * passed
    return Parameters(embedding=table, output=output, layers=layers, final_norm=model.hidden_size, active=round(active))
