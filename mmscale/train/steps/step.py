"""One optimizer step, or one evaluation, through megatron's pipeline schedules.

A step waits for the device once, for the gradient's norm (`measure` in optim/optimizer.py). Between `compute` and
`apply` the caller decides whether the step is applied. Loss sums of an evaluation stay on the device until
`reduce_sums`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from mmscale.config import Config
from mmscale.config.derived import CONDITIONAL
from mmscale.data.stream.answer_requests import WantedTokens
from mmscale.data.stream.conditions import conditional_names
from mmscale.model.output import without_logits
from mmscale.runtime import device
from mmscale.train.optim.optimizer import apply, measure, set_learning_rate
from mmscale.train.steps.batch import Batch
from mmscale.train.steps.chunked_loss import chunked_cross_entropy, logits_of
from mmscale.train.steps.loss import Loss, Objective, cross_entropy, loss_of, picked
from mmscale.train.steps.loss_weights import LossWeights
from mmscale.train.steps.step_observers import StepObserver, loss_weights_among


@dataclass(frozen=True)
class StepResult:
    """The result of one step.

    Attributes:
        grad_norm: norm of the whole gradient before clipping; NaN if any gradient or loss is not finite.
        applied: False if the weights are unchanged.
        losses: means over the whole batch, e.g. `loss`, `loss/<modality>` and `z_loss`.
        sums: [M + 1, 2] loss sums of this rank's micro-batches (zeros before the last pipeline stage); without rows in
            a stage whose loss is not the model's.
    """

    grad_norm: float
    applied: bool
    losses: dict[str, float] = field(default_factory=dict)
    sums: Tensor = field(default_factory=lambda: torch.zeros(0, 2))

    @property
    def figures(self) -> dict[str, float]:
        """The values by which a step is judged: gradient norm and losses; finite if and only if all ranks' are."""
        return {"grad_norm": self.grad_norm, **{k: v for k, v in self.losses.items() if k != "z_loss"}}


class Steps(Protocol):
    """The computation of a stage. The guard decides between `compute` and `apply`. Every rank calls every method."""

    @property
    def modules(self) -> Sequence[torch.nn.Module]:
        """This rank's part of the model; replicas of its parameters must stay equal."""

    def accumulate(self, batches: Sequence[Batch]) -> object:
        """Run this rank's micro-batches forward and compute gradients; nothing is applied."""

    def compute(self, batches: Sequence[Batch]) -> StepResult:
        """`accumulate`, then the norm and losses over all ranks, the same on each. Not applied yet."""

    def apply(self, computed: StepResult, *, lr: float) -> StepResult:
        """Take the optimizer step with the gradients of the last `compute`."""

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Loss sums of the model over this rank's micro-batches, [M + 1, 2], and rows of conditional losses."""

    def pick(self, batches: Sequence[Batch], wanted: Sequence[WantedTokens]) -> list[Tensor]:
        """As `loss.picked`, for each of this rank's micro-batches; empty before the last pipeline stage."""

    def figures(self) -> dict[str, float]:
        """Further metrics of a logged step, the same on every rank."""

    def materialized(self) -> contextlib.AbstractContextManager[None]:
        """Inside, all ranks hold the newest parameters."""

    def before_reduction(self, call: Callable[[], None]) -> None:
        """From now on, call this right before the gradients of a step are reduced over ranks."""


class Stepper:
    """Forward, backward and update of the chunks on this rank."""

    def __init__(
        self,
        config: Config,
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer | None,
        groups: ProcessGroupCollection,
        *,
        observers: Sequence[StepObserver] = (),
    ) -> None:
        self.config = config
        self.observers = observers
        self.loss_weights = loss_weights_among(observers)
        self.chunks = chunks
        self.optimizer = optimizer
        self.groups = groups
        names = config.vocab.names
        self.objective = Objective(
            modalities=len(names),
            weights=tuple(config.train.modality_weights.get(name, 1.0) for name in names),
            z_loss=config.train.z_loss,
        )
        # Without an optimizer the model is only evaluated, so the plug-in is not loaded.
        self.loss: Loss = self.objective if optimizer is None else loss_of(config, self.objective)
        self._schedule = get_forward_backward_func(
            pp_size=config.parallel.pp, vp_size=config.parallel.vpp if config.parallel.vpp else None
        )
        self._sends = P2PCommunicator(groups.pp, chunks[0].config) if config.parallel.pp > 1 else None

    @property
    def modules(self) -> Sequence[torch.nn.Module]:
        """The chunks."""
        return self.chunks

    def train(self, batches: Sequence[Batch], *, lr: float) -> StepResult:
        """One optimizer step, applied if it is finite: for callers without an anomaly policy.

        Args:
            batches: this rank's part of the global batch.
            lr: learning rate of the step.
        """
        computed = self.compute(batches)
        return self.apply(computed, lr=lr) if math.isfinite(computed.grad_norm) else computed

    def compute(self, batches: Sequence[Batch]) -> StepResult:
        """Accumulate the gradients of this rank's micro-batches, then measure gradients and losses over all ranks."""
        assert self.optimizer is not None
        sums = self.accumulate(batches)
        norm, total = measure(self.optimizer, sums, self.groups)
        losses = mean_losses(total, self.config.vocab.names)
        return StepResult(sums=sums, grad_norm=norm, applied=False, losses=losses)

    def apply(self, computed: StepResult, *, lr: float) -> StepResult:
        """Take the optimizer step, and let the observers learn from it.

        If `apply` is not called, weights, moments, Adam's step count and learning rate are unchanged.
        """
        assert self.optimizer is not None
        set_learning_rate(self.optimizer, self.config, lr)
        result = replace(computed, applied=apply(self.optimizer, computed.grad_norm))
        if result.applied:
            for observer in self.observers:
                observer.finish(lr=lr)
        return result

    def figures(self) -> dict[str, float]:
        """Those of loss-based weights, if there are any."""
        return {} if self.loss_weights is None else self.loss_weights.figures()

    def before_reduction(self, call: Callable[[], None]) -> None:
        """From now on, call this at the end of the last backward pass of every step."""
        transformer = self.chunks[0].config
        reduce: Callable[..., Any] = transformer.finalize_model_grads_func  # type: ignore[assignment]

        def finalize(*arguments: Any, **more: Any) -> Any:
            call()
            return reduce(*arguments, **more)

        transformer.finalize_model_grads_func = finalize

    def accumulate(self, batches: Sequence[Batch]) -> Tensor:
        """Zero the gradients, then forward and backward all micro-batches; gradients end up reduced and divided.

        Returns:
            Loss sums of this rank as `evaluate` returns them; they are not reduced.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        for observer in self.observers:
            observer.begin(batches)
        return self._run(batches, forward_only=False)

    @contextlib.contextmanager
    def materialized(self) -> Iterator[None]:
        """Inside, all ranks hold the newest parameters; every rank enters it.

        With overlapped gathering the shards of other ranks arrive only in the next forward pass, so a checkpoint
        written right after a step would otherwise hold the parameters of the previous step.
        """
        overlapping = [chunk for chunk in self.chunks if getattr(chunk, "use_forward_hook", False)]
        for chunk in overlapping:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for chunk in overlapping:
                chunk.enable_forward_pre_hook()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Loss sums of this rank's micro-batches, without noise, dropout and gradients; as `Steps.evaluate`."""
        for chunk in self.chunks:
            chunk.eval()
        return self._run(batches, forward_only=True)

    @torch.no_grad()
    def pick(self, batches: Sequence[Batch], wanted: Sequence[WantedTokens]) -> list[Tensor]:
        """As `Steps.pick`, without noise and dropout."""
        for chunk in self.chunks:
            chunk.eval()
        pairs = list(zip(batches, wanted, strict=True))
        return self._scheduled(self._forward_picking, batches, pairs, forward_only=True)

    def _run(self, batches: Sequence[Batch], *, forward_only: bool) -> Tensor:
        # Held-out losses are always cross entropy, whatever the training loss.
        weights = None if forward_only else self.loss_weights
        forward = functools.partial(self._forward, self.objective if forward_only else self.loss, weights)
        reports = self._scheduled(forward, batches, batches, forward_only=forward_only)
        if not reports:
            modalities, given = self.objective.modalities, batches[0].given
            rows = modalities + 1 + (0 if given is None else len(given) * modalities)
            return torch.zeros(rows, 2, device=device.taken())
        return torch.stack(reports).sum(dim=0)

    def _scheduled(
        self, forward: Callable[..., Any], batches: Sequence[Batch], given: Sequence[Any], *, forward_only: bool
    ) -> list[Tensor]:
        """Reports of the micro-batches in their order; empty before the last pipeline stage.

        `given` is what `forward` gets of each.
        """
        # Every stage and every chunk reads the same micro-batches, because all layers need modality ids.
        in_flight = 1 if self._sends is None else 2 * self.config.parallel.pp
        iterators = [_one_by_one(batches, given, in_flight=in_flight) for _ in self.chunks]
        reports: list[Tensor] = self._schedule(
            forward_step_func=forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=self.config.model.seq_length,
            micro_batch_size=self.config.train.micro_batch_size,
            forward_only=forward_only,
            p2p_communicator=self._sends,
            pg_collection=self.groups,
        )
        return reports

    def _forward(
        self, loss: Loss, weights: LossWeights | None, batches: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        batch = next(batches)
        if self.config.parallel.loss_chunk == 0:
            return _output(model, batch), functools.partial(self._sums, loss, weights, batch)
        hidden, weight = _hidden(model, batch)
        return hidden, functools.partial(self._chunked_sums, weights, batch, weight)

    def _forward_picking(
        self, batches: Iterator[tuple[Batch, WantedTokens]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch, wanted = next(batches)
        pick = functools.partial(picked, wanted=wanted, group=self.groups.tp)
        if self.config.parallel.loss_chunk == 0:
            return _output(model, batch), functools.partial(_report, pick)
        hidden, weight = _hidden(model, batch)
        if weight is not None:
            logits = functools.partial(logits_of, weight=weight)
            pick = functools.partial(pick, logits=logits, chunk=self.config.parallel.loss_chunk)
        return hidden, functools.partial(_report, pick)

    def _sums(
        self, loss: Loss, weights: LossWeights | None, batch: Batch, logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if loss is self.objective:
            return self._of_tokens(weights, batch, *cross_entropy(logits, batch.labels, self.groups.tp))
        return loss(logits, batch.labels, batch.label_modality, batch.loss_mask, self.groups.tp)

    def _of_tokens(
        self, weights: LossWeights | None, batch: Batch, ce: Tensor, log_z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = None if weights is None else weights.weights(batch, ce)
        modality, mask = batch.label_modality, batch.loss_mask
        return self.objective.of_tokens(ce, log_z, modality, mask, given=batch.given, token_weights=own)

    def _chunked_sums(
        self, weights: LossWeights | None, batch: Batch, weight: Tensor | None, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert weight is not None  # megatron-core calls it only in the chunk with the output layer
        chunk = self.config.parallel.loss_chunk
        ce, log_z = chunked_cross_entropy(hidden, weight, batch.labels, self.groups.tp, chunk=chunk)
        return self._of_tokens(weights, batch, ce, log_z)


def _one_by_one(batches: Sequence[Batch], given: Sequence[Any], *, in_flight: int) -> Iterator[Any]:
    """What is given of each micro-batch; frees what layers keep of those that have gone backward.

    An attention mask of S^2 elements is among it, so that keeping all would cost gigabytes in a step of hundreds.
    """
    for number, one in enumerate(given):
        if number >= in_flight:
            batches[number - in_flight].params.forget()
        yield one


def _output(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Logits [B, S, V] (a view of [S, B, V]), or hidden states before the last pipeline stage."""
    output: Tensor = model(
        input_ids=batch.tokens,
        position_ids=None,
        attention_mask=None,
        labels=batch.labels,
        packed_seq_params=batch.params,
    )
    return output


def _report(of: Callable[[Tensor], Tensor], output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result that the schedules require of a loss function. This one only reports; nothing is differentiated."""
    nothing = torch.zeros((), device=output.device)
    return nothing, nothing.to(torch.int32) + 1, of(output)


def _hidden(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The output layer's input, [B, S, H], and its weight; None if this chunk of the model has no output layer."""
    with without_logits(model) as weight:
        return _output(model, batch), weight


def reduce_sums(sums: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Loss sums of the whole batch, fp64 on the host, the same on every rank.

    They are added up over data- and context-parallel ranks; those of the last pipeline stage count.

    Args:
        sums: of this rank, as returned by `Steps.evaluate`.
        groups: process groups; every rank calls it.
    """
    total = sums.double()
    torch.distributed.all_reduce(total, group=groups.dp_cp)
    if groups.pp.size() > 1:
        last = torch.distributed.get_global_rank(groups.pp, groups.pp.size() - 1)
        torch.distributed.broadcast(total, src=last, group=groups.pp)
    return total.cpu()


def mean_losses(sums: Tensor, names: Sequence[str]) -> dict[str, float]:
    """`loss`, `loss/<modality>`, `z_loss` and `conditional_loss/<pair>`, in nats per token, of what has labels.

    Args:
        sums: from `reduce_sums`: a row for each modality with the sum of losses and the number of labels, one with the
            sum of z-losses, and one for each pair of modalities.
        names: of the modalities.
    """
    losses, number = sums[: len(names)].t()
    values = {}
    if number.sum() > 0:
        values["loss"] = float(losses.sum() / number.sum())
        values["z_loss"] = float(sums[len(names), 0] / number.sum())
    for name, loss, count in zip(names, losses, number, strict=True):
        if count > 0:
            values[f"loss/{name}"] = float(loss / count)
    for name, (loss, count) in zip(conditional_names(names), sums[len(names) + 1 :], strict=False):
        if count > 0:
            values[f"{CONDITIONAL}{name}"] = float(loss / count)
    return values
