"""The peer of `mmscale bench step`: transformers' unmodified Mixtral in a plain PyTorch training loop.

Eight experts, one of them for each token, have the FLOPs of 4t4i. Token choice; attention over the whole sequence,
because it does not support documents; torch.optim.AdamW with its defaults, gradients clipped. Nothing is tuned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmscale.config import Config
from mmscale.errors import UsageError
from mmscale.model.build import DTYPES
from mmscale.runtime import device
from mmscale.train.proof.synthetic import SyntheticMixture


class Peer:
    """A Mixtral of the shape of a configuration, with its training loop.

    Args:
        config: its widths, layers, heads, vocabulary and batch are used; one of sum(experts) experts is active per
            token.
    """

    def __init__(self, config: Config) -> None:
        try:
            from transformers import MixtralConfig, MixtralForCausalLM
        except ImportError as error:
            raise UsageError(
                "bench step: the peer needs transformers, which is not installed",
                remedy="pip install 'mmscale[hf]', or leave it out: --variants dense,moe8x,4t4i,4t4i_mod",
            ) from error
        model, optim = config.model, config.optim
        torch.manual_seed(config.run.seed)
        self.model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=config.vocab.padded_size,
                hidden_size=model.hidden_size,
                intermediate_size=model.ffn_hidden_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_attention_heads,
                num_key_value_heads=model.query_groups,
                max_position_embeddings=model.seq_length,
                num_local_experts=sum(model.experts.counts.values()),
                num_experts_per_tok=1,
                use_cache=False,
            )
        ).to(device=device.taken(), dtype=DTYPES[config.precision.dtype])
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        self.clip_grad = optim.clip_grad
        self.micro_batches = config.train.global_batch_size // config.train.micro_batch_size
        self.mixture = SyntheticMixture(config, share={"text": 0.5, "image": 0.5}, padding=0.0)
        self.batches: list[Tensor] = []

    def prepare(self, step: int) -> None:
        """Token ids of the same micro-batches as for all contenders."""
        numbers = range(step * self.micro_batches, (step + 1) * self.micro_batches)
        self.batches = [torch.from_numpy(self.mixture.micro_batch(n).tokens).to(device.taken()) for n in numbers]

    def forward_backward(self) -> None:
        """Gradients of all micro-batches."""
        self.optimizer.zero_grad()
        for tokens in self.batches:
            loss = self.model(input_ids=tokens, labels=tokens).loss
            (loss / len(self.batches)).backward()

    def update(self) -> None:
        """Clip gradients and take the optimizer's step."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
