"""Generation over tensor-parallel ranks, for models that one process cannot hold.

A run's model becomes what transformers' `generate` takes. No cache: every token costs a pass over the whole sequence,
so this is for a look at a model, not for serving it; an export is served by engines that split it themselves. Every
rank calls `generate` with the same arguments and draws the same tokens: logits are gathered, generators seeded alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mmscale.data.stream.packed import pack_rows
from mmscale.inference.model import RunModel
from mmscale.tables.routings import Routing

_BLOCK = 64  # sequences are computed in multiples of so many tokens


class ModelOnRanks(PreTrainedModel, GenerationMixin):
    """A loaded run for `generate.generate` with `use_cache=False`.

    Args:
        run: the model; its context must outlive this.
        routing: who decides which experts take a token; not batch, which knows no next token.

    Raises:
        UsageError: the checkpoint has nothing for that routing.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, run: RunModel, routing: Routing) -> None:
        assert not routing.leaks, routing
        run.require(routing)
        super().__init__(PretrainedConfig(vocab_size=run.config.vocab.padded_size))
        self.anchor = torch.nn.Parameter(torch.empty(0), requires_grad=False)  # says on which device ids are wanted
        self.generation_config = GenerationConfig()
        self._run, self._routing = run, routing

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """All of every row, every time."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        """Logits of what follows each row.

        Args:
            input_ids: [B, S], padded on the left.
            attention_mask: [B, S], 0 on padding.
            kwargs: what transformers gives besides; there is no cache.

        Returns:
            `logits` [B, 1, padded vocabulary].
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[kept.bool()].cpu().numpy() for ids, kept in zip(input_ids, mask, strict=True)]
        multiple = math.lcm(_BLOCK, self._run.groups.tp.size())
        length = -(-max(map(len, rows)) // multiple) * multiple
        batch, places = pack_rows([[row] for row in rows], vocabulary=self._run.vocabulary, seq_length=length)
        logits = self._run.logits(batch, self._routing)
        last = torch.tensor([row[-1].start + len(ids) - 1 for row, ids in zip(places, rows, strict=True)])
        return CausalLMOutput(logits=logits[torch.arange(len(rows)), last].unsqueeze(1).to(input_ids.device))
