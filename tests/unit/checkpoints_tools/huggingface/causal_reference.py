# The slow reference of the model (tests/unit/model/reference.py) with causal routing: one token and expert at a time.
"""What an exported model must compute, in plain loops in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from mmscale.config import Config
from tests.unit.model.reference import Facts, Reference, Weights


class CausalReference(Reference):
    """Decisions of the auxiliary routers, or of averaged cut-offs; gates of the true ones.

    Args:
        config: of the model.
        weights: its parameters and buffers by the checkpoint's names.
        routing: causal, top1 or threshold.
    """

    def __init__(self, config: Config, weights: Weights, *, routing: str = "causal") -> None:
        super().__init__(config, weights)
        self.routing = routing
        self.margin = 1.0  # how close any decision came to its threshold

    def gates(
        self, prefix: str, group: str, hidden: list[Tensor], facts: list[Facts]
    ) -> dict[tuple[int, int, int], Tensor]:
        """Gate of every choice (expert, sequence, token) of a group."""
        if group in self.model.experts.ungated:
            return super().gates(prefix, group, hidden, facts)
        router = self.weights[f"{prefix}mlp.router.{group}"]
        wanted = set(range(len(self.config.vocab.names)))
        if self.model.kind == "moma":
            wanted = {self.config.vocab.names.index(group)}
        chosen = {}
        for b, x in enumerate(hidden):
            for i, token in enumerate(x):
                if facts[b].modality[i] not in wanted:
                    continue
                logits = router @ token
                for expert in self._experts(prefix, group, token, logits):
                    chosen[expert, b, i] = torch.sigmoid(logits[expert])
        return chosen

    def _experts(self, prefix: str, group: str, token: Tensor, logits: Tensor) -> list[int]:
        if self.routing == "threshold":
            return self._above(self._cut_by(logits), self.weights[f"{prefix}mlp.threshold.{group}"])
        scores = self._auxiliary(f"{prefix}mlp.auxiliary.{group}", token)
        if self.routing == "top1":
            return [max(range(len(scores)), key=lambda e: float(scores[e]))]
        return self._above(torch.sigmoid(scores), self.weights[f"{prefix}mlp.auxiliary.{group}.threshold"])

    def _cut_by(self, logits: Tensor) -> Tensor:
        """What is compared with cut-offs, by `model.experts.choice`."""
        choice = self.model.experts.choice
        if choice == "sigmoid" or len(logits) == 1:
            return logits
        if choice == "competitive":
            return torch.stack([logit - sum(logits) / len(logits) for logit in logits])
        return torch.stack([torch.log(torch.exp(logit) / sum(torch.exp(logits))) for logit in logits])

    def _auxiliary(self, name: str, token: Tensor) -> Tensor:
        inner = self.weights[f"{name}.hidden"] @ token
        return self.weights[f"{name}.out"] @ (inner * torch.sigmoid(inner))

    def _above(self, scores: Tensor, thresholds: Tensor) -> list[int]:
        self.margin = min(self.margin, float((scores - thresholds).abs().min()))
        return [e for e in range(len(scores)) if scores[e] > thresholds[e]]

    def layer(self, number: int, hidden: list[Tensor], facts: list[Facts]) -> list[Tensor]:
        """Layer `number` from 0; a depth layer takes the tokens that it decides for one by one."""
        if not self.model.is_depth_layer(number):
            return self.inner_layer(number, hidden, facts)
        prefix = f"decoder.layers.{number}."
        result = []
        for x, own in zip(hidden, facts, strict=True):
            taken = [i for i in range(len(x)) if own.modality[i] >= 0 and self._kept(prefix, x[i])]
            rows = list(x)
            if taken:
                (out,) = self.inner_layer(number, [x[taken]], [own.take(taken)])
                for place, i in enumerate(taken):
                    gate = torch.sigmoid(x[i] @ self.weights[f"{prefix}depth_router"])
                    rows[i] = x[i] + gate * (out[place] - x[i])
            result.append(torch.stack(rows))
        return result

    def _kept(self, prefix: str, token: Tensor) -> bool:
        if self.routing == "threshold":
            score = (self.weights[f"{prefix}depth_router"] @ token).reshape(1)
            return bool(self._above(score, self.weights[f"{prefix}depth_threshold.logit"]))
        score = torch.sigmoid(self._auxiliary(f"{prefix}depth_auxiliary", token))
        return bool(self._above(score, self.weights[f"{prefix}depth_auxiliary.threshold"]))
