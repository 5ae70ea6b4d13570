"""The shape that each tensor of an exported model must have, from the run's configuration alone.

Names and numbers only. Which tensors there are is for hf_weights.py to say.

Letters: V rows of the vocabulary, H hidden width, D width of a head, F inner width, E experts of a group, W inner width
of an auxiliary router.
"""

from __future__ import annotations

from collections.abc import Iterable

from mmscale.config import Config
from mmscale.config.derived import shared_width

Shape = tuple[int, ...]


def shapes(
    config: Config, names: Iterable[str], *, auxiliary_size: int = 0, rows: int | None = None
) -> dict[str, Shape]:
    """The shapes of some tensors.

    Args:
        config: the run's configuration.
        names: of tensors of the exported model.
        auxiliary_size: W; 0: there are no auxiliary routers.
        rows: V; None: as in the configuration. A foreign model has fewer.
    """
    general = _general(config, rows=rows or config.vocab.padded_size)
    return {name: _expert_shape(config, name, auxiliary_size) or _of(name, general) for name in names}


def _of(name: str, known: dict[str, Shape]) -> Shape:
    """The entry whose key is the longest ending of the name."""
    parts = name.split(".")
    return next(known[end] for start in range(len(parts)) if (end := ".".join(parts[start:])) in known)


def _general(config: Config, *, rows: int) -> dict[str, Shape]:
    """Shapes by the end of a name, outside of experts and auxiliary routers; all other weights are norms [H]."""
    model = config.model
    hidden, inner, head = model.hidden_size, model.ffn_hidden_size, model.head_dim
    queries, keys = model.num_attention_heads * head, model.query_groups * head
    return {
        "embed_tokens.weight": (rows, hidden),
        "lm_head.weight": (rows, hidden),
        "q_proj.weight": (queries, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "o_proj.weight": (hidden, queries),
        "q_norm.weight": (head,),
        "k_norm.weight": (head,),
        "gate_proj.weight": (inner, hidden),
        "up_proj.weight": (inner, hidden),
        "down_proj.weight": (hidden, inner),
        "depth_router": (hidden,),
        "depth_threshold": (1,),
        "weight": (hidden,),
    }


def _expert_shape(config: Config, name: str, width: int) -> Shape | None:
    """Shapes inside of experts and auxiliary routers; None: it is another tensor."""
    hidden, inner = config.model.hidden_size, config.model.ffn_hidden_size
    parts = name.split(".")
    last = parts[-1]
    if "experts" in parts:
        count = config.model.experts.counts[parts[parts.index("experts") + 1]]
    elif "shared" in parts:
        shared = shared_width(config)
        return {"gate_up_proj": (hidden, 2 * shared), "down_proj": (shared, hidden)}.get(last)
    else:
        count = 1  # a Mixture-of-Depths layer has one decision
    if parts[-2] in ("auxiliary", "depth_auxiliary"):
        return {"hidden": (width, hidden), "out": (count, width), "threshold": (count,)}[last]
    own: dict[str, Shape] = {
        "router": (count, hidden),
        "gate_up_proj": (count, hidden, 2 * inner),
        "down_proj": (count, inner, hidden),
        "threshold": (count,),
    }
    return own.get(last)
