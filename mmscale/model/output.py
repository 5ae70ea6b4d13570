"""What comes out of a model: logits without a copy, or the output layer's input, for a loss in chunks.

Shapes: S tokens of a sequence, B sequences, H hidden width, V vocabulary rows of this tensor-parallel rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor


class LogitsModel(GPTModel):
    """A GPTModel that returns logits [B, S, V] if it gets labels, too.

    Without labels megatron-core copies logits from [S, B, V] (gpt_model.py, `_postprocess`); with labels it calls the
    method below, whose result is a view.
    """

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The logits, [S, B, V] -> [B, S, V]; the caller computes the loss."""
        del labels
        return logits.transpose(0, 1)


@contextlib.contextmanager
def without_logits(model: Any) -> Iterator[Tensor | None]:
    """Inside, a forward pass returns the output layer's input, [B, S, H] on every rank, instead of logits [B, S, V].

    Backward sums the gradients of that input over tensor-parallel ranks, as the output layer itself would.

    Args:
        model: a GPTModel, with or without its wrappers.

    Yields:
        The layer's weight, [V, H]; None: this chunk of the model has no output layer, and nothing changes.
    """
    inner: Any = unwrap_model(model)
    if not inner.post_process:
        yield None
        return
    layer = inner.output_layer

    def gathered(hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        if layer.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=inner.pg_collection.tp)
        return hidden, None

    layer.forward = gathered  # on this instance only, until the end of the `with` block
    try:
        yield inner.shared_embedding_or_output_weight() if inner.share_embeddings_and_output_weights else layer.weight
    finally:
        del layer.forward
