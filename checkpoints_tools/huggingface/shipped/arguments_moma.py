"""Arguments of `forward`: those that versions of transformers pass, and those that are refused.

Shipped next to the weights. An argument that a model does not know must never be ignored: transformers 5.24 renamed
`past_key_values` to `cache`, and a model that ignores the cache generates every token without its context.
"""

import inspect
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

# The name of the cache in outputs, in masks and in gradient checkpointing in this version of transformers.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# Arguments of the loss; of recording decorators and the debugger in transformers; of attention functions (vLLM's).
LOSS = frozenset({"num_items_in_batch", "shift_labels", "ignore_index"})
_KNOWN = frozenset(
    {"output_attentions", "output_hidden_states", "debug_io", "debug_io_dir", "prune_layers", "attention_instances"}
)
# Arguments of transformers that this model does not support; only values without effect are accepted.
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    "output_router_logits": (None, False),
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"), (None,)),
}
_PACKED = (
    "one document per row, or several with position_ids that start again at each, use_cache=False and no attention_mask"
)


def refuse_unknown(kwargs: dict[str, Any], *, where: str, also: frozenset[str] = frozenset()) -> None:
    """Refuse keyword arguments that would be ignored.

    Args:
        kwargs: the arguments without a named parameter.
        where: the model's class, for the message.
        also: further known names.

    Raises:
        TypeError: an argument is unknown, or requests a feature that this model lacks.
    """
    for name, value in kwargs.items():
        if name in _KNOWN or name in also:
            continue
        if name not in _ASKS_NOTHING:
            raise TypeError(f"{where}.forward() got an unexpected keyword argument {name!r}")
        if not any(value is harmless for harmless in _ASKS_NOTHING[name]):
            remedy = (
                f"; give it {_PACKED}"
                if None in _ASKS_NOTHING[name] and name.startswith(("cu_", "max_", "seq_"))
                else ""
            )
            raise TypeError(f"{where}.forward() does not support {name}={type(value).__name__}{remedy}")


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache under either of its names.

    Raises:
        TypeError: there are two.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("give either cache or past_key_values: they are two names of one argument")
    return past_key_values if cache is None else cache


def refuse_mixed_documents(
    position_ids: torch.Tensor | None, attention_mask: Any, cache: Cache | None, *, padding: torch.Tensor
) -> None:
    """Refuse packed documents if they would attend to each other.

    transformers distinguishes documents of a row by their positions only if there is neither a mask nor a cache.

    Args:
        position_ids: [B, S], or None.
        attention_mask: [B, past + S] with 0 for padding, one of four dimensions that decides by itself, or None.
        cache: of earlier tokens, or a new one.
        padding: [B, S] bool, tokens of no modality.

    Raises:
        ValueError: positions restart inside a row, and nothing would separate the documents.
    """
    decides_itself = attention_mask is not None and (not torch.is_tensor(attention_mask) or attention_mask.dim() != 2)
    separated = attention_mask is None and cache is None
    if position_ids is None or position_ids.shape[-1] < 2 or decides_itself or separated:
        return
    if torch.compiler.is_compiling():
        return
    token = ~padding
    if attention_mask is not None:
        token = token & attention_mask[:, -position_ids.shape[-1] :].to(padding.device, torch.bool)
    jumps = position_ids.diff(dim=-1) != 1
    if bool((jumps & token[:, 1:] & token[:, :-1]).any()):
        raise ValueError(f"position_ids start again inside a row: packed documents would be mixed; give {_PACKED}")


__all__ = ["CACHE", "LOSS", "one_cache", "refuse_mixed_documents", "refuse_unknown"]
