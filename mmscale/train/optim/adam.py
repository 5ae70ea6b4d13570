"""`HostFusedAdam`, and the switches that make megatron-core use it or another optimizer.

AdamW with the state layout of Apex's and Transformer-Engine's FusedAdam, for machines without them (CPU hosts). Its
purpose is not speed: megatron-core 0.16.1 cannot reload the state that it saves from torch.optim.AdamW.

torch.optim.AdamW keeps a `step` tensor per parameter. megatron-core's distributed optimizer writes one number, and when
loading it assigns the *same* tensor to all parameters (distrib_optimizer.py:820-825). torch then increments it once per
parameter: with 5 parameters step 7 becomes 12, and the bias correction is silently wrong. Even before that,
`sharded_state_dict(is_loading=True)` fails on an assert (:642) because no state exists yet. FusedAdam's layout, with
`step` in the parameter group, has neither problem.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

from mmscale.errors import ConfigError

_LARGEST_START = 1.5  # times the usual size of an update


class HostFusedAdam(torch.optim.Optimizer):
    """AdamW (or Adam with L2 regularisation), arithmetic of torch.optim.AdamW, state layout of FusedAdam.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay of the running averages of gradient and squared gradient.
        eps: Added to the denominator, after the bias correction.
        weight_decay: Decay per step, as a fraction of `lr`.
        adam_w_mode: Decoupled weight decay (AdamW); if False the decay is added to the gradient (Adam).
        bias_correction: Correct the averages for their start at zero.
        capturable: CUDA graphs of the update, which megatron-core asks about from 0.17 on; a host has none.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("there are no CUDA graphs on a host")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    # torch wraps these methods to exclude them from torch.compile. The wrapper imports torch._dynamo and
    # torch._inductor at its first call, which takes 1 second of CPU in every rank. Nothing is compiled on a host, so it
    # is removed.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["params"]:
                # Like FusedAdam, do not count the steps of an empty group; megatron-core aligns the counts when saving.
                continue
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [_gradient(param) for param in params]
        for param in params:
            state = self.state[param]
            if len(state) == 0:
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        averages = [self.state[param]["exp_avg"] for param in params]
        squares = [self.state[param]["exp_avg_sq"] for param in params]
        self.update(group, params, grads, averages, squares)

    def update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        averages: list[Tensor],
        squares: list[Tensor],
    ) -> None:
        """Update parameters and both moments in place. A custom optimizer overrides this method.

        Parameters are this rank's flat fp32 shards, or pieces of them: the update of an element may depend only on that
        element's gradient and moments, and on the hyperparameters of the group.

        Args:
            group: `lr`, `betas`, `eps`, `weight_decay`, and `step`, from 1.
            params: fp32.
            grads: of the same shapes, clipped.
            averages: the first moment of each, zeros before step 1.
            squares: the second moment.
        """
        lr, (beta1, beta2), step, decay = group["lr"], group["betas"], group["step"], group["weight_decay"]
        if not group["bias_correction"]:
            # torch's kernels always divide by 1 - beta^step, which is 1 for this step.
            step = 1 << 24
        # The fused kernels need one pass over memory and no temporary copy of the parameters.
        update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        update(
            params,
            grads,
            averages,
            squares,
            [],
            # `torch.full` on the device: `torch.tensor(step)` would copy, and wait, once per parameter.
            [torch.full((), float(step), device=param.device) for param in params],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def require_slow_start(betas: tuple[float, float]) -> None:
    """Refuse decays with which moments that start from zero in the middle of a run would give too large updates.

    The correction of the start at zero depends on the number of steps of the whole optimizer, so it is 1 by then.
    After n steps with a constant gradient an update is (1 - beta1^n) / sqrt(1 - beta2^n) times its usual size: 0.45 to
    1.1 times with 0.9 and 0.95, but 6.5 times with 0.9 and 0.999.

    Raises:
        ConfigError: the largest of these factors is above 1.5.
    """
    beta1, beta2 = betas
    factor = max((1 - beta1**n) / math.sqrt(1 - beta2**n) for n in range(1, 1000))
    if factor > _LARGEST_START:
        raise ConfigError(
            f"Adam has no moments of the matrices that Muon trained, and updates that start without them would be "
            f"{factor:.1f} times too large with optim.beta1 = {beta1:g} and optim.beta2 = {beta2:g}",
            remedy="lower optim.beta2 (0.95 is safe with a beta1 of 0.9), keep optim.optimizer=muon, or copy the "
            "weights alone: `mmscale ckpt reshard RUN@STEP NEW --weights`",
        )


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


@contextlib.contextmanager
def made_by(make: type[Any], **options: Any) -> Iterator[None]:
    """Inside, megatron-core creates this Adam, with these additional options, whatever else is installed."""
    before = optimizer.Adam, distrib_optimizer.Adam

    def adam(*args: Any, **given: Any) -> torch.optim.Optimizer:
        return make(*args, **given, **options)

    # The former is called; the latter is used in an isinstance check.
    optimizer.Adam, distrib_optimizer.Adam = adam, make
    try:
        yield
    finally:
        optimizer.Adam, distrib_optimizer.Adam = before


def install() -> bool:
    """Make megatron-core use `HostFusedAdam` where it would fall back to torch's AdamW. May be called repeatedly.

    Returns:
        Whether megatron-core uses it now.
    """
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        optimizer.Adam = HostFusedAdam  # optimizer/__init__.py:363
        optimizer.USING_PYTORCH_OPTIMIZER = False  # :359
        distrib_optimizer.Adam = HostFusedAdam  # distrib_optimizer.py:515, the isinstance check
        distrib_optimizer.HAVE_APEX_OR_TE = True  # :640, 672, 818
        distrib_optimizer.USING_APEX_OPTIMIZER = True  # :654, 677
    return optimizer.Adam is HostFusedAdam
