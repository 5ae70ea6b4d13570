"""Feed-forward layers of MoMa (arXiv 2407.21770) for transformers: dense, or groups of experts with causal routers.

Shipped next to the weights. Every decision depends on one token alone; attention and Mixture-of-Depths are in
modeling_moma.py.

Shapes: H hidden width, N tokens of a layer in one list, E experts of a group, F inner width of an expert.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_moma import MomaConfig
from .untied_moma import apply, untied


class MomaAuxiliaryRouter(nn.Module):
    """Predicts from one token alone the router's choice among all tokens: SiLU(x W1) W2 (section 2.4).

    Its decision has no gradient, so its weights are buffers: DDP waits for a gradient of every parameter, and
    transformers makes every loaded parameter trainable.
    """

    hidden: torch.Tensor
    out: torch.Tensor
    threshold: torch.Tensor

    def __init__(self, hidden_size: int, width: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.empty(width, hidden_size))
        self.register_buffer("out", torch.empty(outputs, width))
        self.register_buffer("threshold", torch.empty(outputs))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, fp32, and whether their sigmoid is above the threshold: [..., H] -> [..., E] and [..., E] bool.

        Both in one method, because an offloaded module has its parameters only inside forward.
        """
        logits = F.linear(F.silu(F.linear(tokens, self.hidden).float()), self.out.float())
        return logits, logits.sigmoid() > self.threshold.float()


def swiglu(tokens: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """[N, H] x [H, 2F] x [F, H] -> [N, H]."""
    gate, up = (tokens @ gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down


class MomaExpertGroup(nn.Module):
    """Experts of some modalities with their routers: the auxiliary one decides, the main one's sigmoid is the gate.

    With token choice the main router decides, and its scores are the gates.
    """

    threshold: torch.Tensor | None
    router_bias: torch.Tensor | None

    def __init__(self, config: MomaConfig, modalities: list[int], experts: int) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.modalities = tuple(modalities)
        self.inner = inner
        self.router = nn.Parameter(torch.empty(experts, hidden))
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.routing = config.routing
        self.choice = config.choice
        self.token_choice = config.token_choice
        causal = config.token_choice is not None  # auxiliary routers and cut-offs are those of other layers, then
        auxiliary = config.auxiliary_size and not causal
        self.auxiliary = MomaAuxiliaryRouter(hidden, config.auxiliary_size, experts) if auxiliary else None
        self.register_buffer("threshold", torch.empty(experts) if config.keeps_thresholds and not causal else None)
        self.register_buffer("router_bias", torch.empty(experts) if causal else None)
        self.norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps) if config.norm == "post_per_expert" else None

    def forward(self, tokens: torch.Tensor, modality: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        """Sum of gate * expert at each token.

        Args:
            tokens: [N, H].
            modality: [N], index of each token's modality, -1 for padding.
            unused: a tensor; `moe_tp_experts` of transformers 5.8 wants three, since experts elsewhere get weights too.

        Returns:
            [N, H] fp32, 0 where no expert takes the token; of a tensor-parallel rank a part of the sum.

        Raises:
            ValueError: it is to be trained on tensor-parallel ranks.
        """
        if self.down_proj.shape[-2] != self.inner and self.router.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "experts sharded by tp_plan are for inference: each rank would get a part of the router's gradient. "
                "Use torch.no_grad(), or train with data parallelism"
            )
        member = modality == self.modalities[0]
        for index in self.modalities[1:]:
            member = member | (modality == index)
        logits = F.linear(tokens.float(), self.router.float())
        if self.token_choice is None:
            chosen, gates = self._decide(tokens, logits), logits.sigmoid()
        else:
            chosen, gates = self.best(logits)
        chosen = chosen & member.unsqueeze(1)
        expert, token = chosen.t().nonzero(as_tuple=True)  # sorted by expert
        parts = tokens[token].split(chosen.sum(dim=0).tolist())
        out = torch.cat([swiglu(p, self.gate_up_proj[e], self.down_proj[e]) for e, p in enumerate(parts)])
        if self.norm is not None:
            out = self.norm(out)
        total = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        return total.index_add(0, token, out.float() * gates[token, expert].unsqueeze(1))

    def ranked(self, logits: torch.Tensor) -> torch.Tensor:
        """The values by which experts ranked tokens in training, to compare with cut-offs: [N, E] -> [N, E], fp32."""
        if self.choice == "sigmoid" or logits.shape[-1] == 1:
            return logits
        exact = logits.double()
        if self.choice == "competitive":
            return (exact - exact.mean(dim=-1, keepdim=True)).float()
        return torch.log_softmax(exact, dim=-1).float()

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """The scores of token choice: [N, E] -> [N, E], fp32."""
        assert self.token_choice is not None
        return logits.sigmoid() if self.token_choice["scores"] == "sigmoid" else logits.softmax(dim=-1)

    def best(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token by token choice, [N, E] bool, and their gates, [N, E]."""
        assert self.token_choice is not None and self.router_bias is not None
        scores, top_k = self.scores(logits), self.token_choice["top_k"]
        order = (scores + self.router_bias.float()).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
        gates = scores * chosen
        return chosen, gates / (gates.sum(dim=-1, keepdim=True) + 1e-20) if top_k > 1 else gates

    def _decide(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Which experts take a token, [N, E] bool, from the token alone."""
        if self.routing == "threshold":
            assert self.threshold is not None
            return self.ranked(logits) > self.threshold.float()
        assert self.auxiliary is not None
        scores, above = self.auxiliary(tokens)
        if self.routing == "top1":
            return F.one_hot(scores.argmax(dim=-1), logits.shape[-1]).bool()
        return above


class MomaSharedExpert(nn.Module):
    """A SwiGLU for every token."""

    def __init__(self, config: MomaConfig, inner: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(hidden, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(inner, hidden))
        self.norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps) if config.norm == "post_per_expert" else None

    def forward(self, tokens: torch.Tensor, modality: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, H]; the other arguments are those of `MomaExpertGroup`."""
        out = swiglu(tokens, self.gate_up_proj, self.down_proj)
        return out if self.norm is None else self.norm(out)


class MomaUngatedExpert(MomaSharedExpert):
    """A SwiGLU for every token of some modalities."""

    def __init__(self, config: MomaConfig, modalities: list[int]) -> None:
        super().__init__(config, config.intermediate_size)
        self.modalities = tuple(modalities)

    def forward(self, tokens: torch.Tensor, modality: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, H] fp32, 0 for tokens of other modalities; arguments of `MomaExpertGroup`."""
        (token,) = torch.stack([modality == index for index in self.modalities]).any(dim=0).nonzero(as_tuple=True)
        out = super().forward(tokens[token], modality, unused)
        total = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        return total.index_add(0, token, out.float())


class MomaSparseMLP(nn.Module):
    """All groups of experts, and the shared ones."""

    def __init__(self, config: MomaConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({group["name"]: _group(config, group) for group in _groups(config)})
        width = config.shared_intermediate_size
        self.shared = MomaSharedExpert(config, width) if width else None

    def forward(self, tokens: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        """[N, H] and [N] -> [N, H]."""
        total = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        unused = tokens.new_zeros(())
        for group in self.experts.values():
            total = total + group(tokens, modality, unused)
        if self.shared is not None:
            total = total + self.shared(tokens, modality, unused)
        return total.to(tokens.dtype)


class MomaDenseMLP(nn.Module):
    """One SwiGLU for all tokens, or one for each modality."""

    def __init__(self, config: MomaConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = untied(config, "ffn", lambda: nn.Linear(hidden, inner, bias=False))
        self.up_proj = untied(config, "ffn", lambda: nn.Linear(hidden, inner, bias=False))
        self.down_proj = untied(config, "ffn", lambda: nn.Linear(inner, hidden, bias=False))

    def forward(self, tokens: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        """[N, H] and [N] -> [N, H]."""
        gate, up = apply(self.gate_proj, tokens, modality), apply(self.up_proj, tokens, modality)
        return apply(self.down_proj, F.silu(gate) * up, modality)


def _group(config: MomaConfig, group: dict[str, Any]) -> nn.Module:
    if group.get("ungated"):
        return MomaUngatedExpert(config, group["modalities"])
    return MomaExpertGroup(config, group["modalities"], group["experts"])


def _groups(config: MomaConfig) -> list[dict[str, Any]]:
    return config.expert_groups or []


__all__ = ["MomaAuxiliaryRouter", "MomaDenseMLP", "MomaSparseMLP"]
