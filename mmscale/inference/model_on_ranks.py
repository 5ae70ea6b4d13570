"""Generation over tensor-parallel ranks, for models that are too large for one process.

Adapts a run's model to transformers' `generate`. There is no cache: every token needs a pass over the whole sequence,
so this is for trying a model, not for serving it; inference engines can shard an export themselves. Every rank calls
`generate` with the same arguments and generates the same tokens: logits are gathered, generators have the same seed.
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

_BLOCK = 64  # sequences are padded to multiples of this number of tokens


class ModelOnRanks(PreTrainedModel, GenerationMixin):
    """A loaded run for `generate.generate` with `use_cache=False`.

    Args:
        run: the model; its context must outlive this object.
        routing: mode by which experts are assigned to tokens; not batch, with which a next token is not defined.

    Raises:
        UsageError: the checkpoint does not support that routing.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, run: RunModel, routing: Routing) -> None:
        assert not routing.leaks, routing
        run.require(routing)
        super().__init__(PretrainedConfig(vocab_size=run.config.vocab.padded_size))
        # Tells `generate` on which device ids must be.
        self.anchor = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        self.generation_config = GenerationConfig()
        self._run, self._routing = run, routing

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The complete rows, because there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, logits_to_keep: int = 1, **kwargs: Any
    ) -> CausalLMOutput:
        """Logits of the tokens after the last places of each row.

        Args:
            input_ids: [B, S], padded on the left.
            attention_mask: [B, S], 0 on padding.
            logits_to_keep: number of last places K; those before a row have the logits of its first place.
            kwargs: further arguments of transformers; there is no cache.

        Returns:
            `logits` [B, K, padded vocabulary].
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[kept.bool()].cpu().numpy() for ids, kept in zip(input_ids, mask, strict=True)]
        multiple = math.lcm(_BLOCK, self._run.groups.tp.size())
        length = -(-max(map(len, rows)) // multiple) * multiple
        batch, places = pack_rows([[row] for row in rows], vocabulary=self._run.vocabulary, seq_length=length)
        logits = self._run.logits(batch, self._routing)
        starts = torch.tensor([row[-1].start for row in places]).unsqueeze(1)
        back = torch.arange(logits_to_keep, 0, -1).unsqueeze(0)
        kept = starts + (torch.tensor([[len(ids)] for ids in rows]) - back).clamp(min=0)
        return CausalLMOutput(logits=logits[torch.arange(len(rows)).unsqueeze(1), kept].to(input_ids.device))
