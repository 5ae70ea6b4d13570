"""Runs built models and compares them with reference.py: logits and the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mmscale.config import Config
from mmscale.model.capacity import TokenCounts
from mmscale.model.mixed_modal import MixedModalParams
from tests.unit.model.reference import Batch, Facts, Reference

# Measured against fp64 over all models of the tests: logits 3e-6; gradients 8e-6, and 1.1e-5 with four layers.
TOLERANCE = 2e-5
_SMALL = 0.02


def params_of(batch: Batch, **facts: Any) -> MixedModalParams:
    """What layers are told of a batch."""
    modalities = max(2, int(batch.modality.max()) + 1)
    own = (batch.modality.unsqueeze(-1) == torch.arange(modalities)).sum(dim=1).numpy()
    return MixedModalParams.of(
        modality_ids=batch.modality,
        position_ids=batch.position,
        document_ids=batch.document,
        counts=TokenCounts(own, own[None]),
        **facts,
    )


def run_model(model: GPTModel, batch: Batch, **facts: Any) -> Tensor:
    """Logits [B, S, padded vocabulary]."""
    return model(batch.ids, batch.position, None, packed_seq_params=params_of(batch, **facts))


def gradients(model: GPTModel, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter; a parameter without one is a failure."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def relative(got: Tensor, want: Tensor, *, floor: float = 1e-30) -> float:
    """Largest difference relative to the largest wanted value, or to `floor` if that is larger."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=floor))


def differences(model: GPTModel, config: Config, batch: Batch) -> tuple[float, dict[str, float]]:
    """Relative differences of logits, and of each parameter's gradient, between a model and the fp64 reference."""
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    biases = {name: buffer.double() for name, buffer in model.named_buffers() if "router_bias" in name}
    want = Reference(config, weights | biases).logits(batch)
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (want * direction).sum().backward()
    got = run_model(model, batch)
    own = gradients(model, (got.double() * direction).sum())
    wanted = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}
    # Gradients that are small by cancellation (a router's under post norm) keep no relative precision in fp32.
    floor = _SMALL * max(float(gradient.abs().max()) for gradient in wanted.values())
    return relative(got, want), {name: relative(own[name], gradient, floor=floor) for name, gradient in wanted.items()}


def assert_agrees(model: GPTModel, config: Config, batch: Batch) -> None:
    """Logits and all gradients are the reference's."""
    logits, grads = differences(model, config, batch)
    bad = {name: value for name, value in grads.items() if value >= TOLERANCE}
    assert logits < TOLERANCE and not bad, f"logits {logits:.1e}, gradients {bad}"


def facts_of(batch: Batch) -> list[Facts]:
    """The same facts for the loops."""
    columns = (batch.modality.tolist(), batch.position.tolist(), batch.document.tolist())
    return [Facts(*rows) for rows in zip(*columns, strict=True)]


def weights_of(model: GPTModel) -> dict[str, Tensor]:
    """Detached parameters by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def run_layer(model: GPTModel, number: int, hidden: Tensor, params: MixedModalParams) -> Tensor:
    """One layer of a built model, [S, B, H] -> [S, B, H]."""
    out, _ = model.decoder.layers[number](
        hidden, packed_seq_params=params, rotary_pos_emb=model.rotary_pos_emb(params.modality_ids.shape[0])
    )
    return out
