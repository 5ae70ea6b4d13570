"""Compares optimizers: held-out loss after equal steps, and CPU time of a step and of its update.

One process trains a model with each optimizer on the same data from the same initial weights. The optimizers take
turns step by step, so that a busy machine slows all of them; each has its own random state. All settings besides
`optim.optimizer` and `optim.moments` are the configuration's, so nothing is tuned for one of them unless the user does.

    mmscale bench optim --steps 200 --seeds 3
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmscale.config import Config
from mmscale.config.derived import global_micro_batches
from mmscale.config.load import load
from mmscale.data.prepared.prepare import prepare
from mmscale.data.stream.mixture import Mixture, open_mixture
from mmscale.data.stream.passes import SOURCES, open_passes
from mmscale.data.vocab import Vocabulary
from mmscale.errors import UsageError
from mmscale.runtime import device, groups, random_state
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build, resolve_share
from mmscale.train.optim.schedule import learning_rate
from mmscale.train.steps.batch import to_device
from mmscale.train.steps.evaluation import evaluate

QUICKSTART = "configs/quickstart.yaml"
# Settings of `optim` by the name of a contender.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "moments": "fp32"},
    "adamw_fp8": {"optimizer": "adamw", "moments": "fp8_coat"},
    "muon": {"optimizer": "muon", "moments": "fp32"},
    "muon_fp8": {"optimizer": "muon", "moments": "fp8_coat"},
}


def run(
    *,
    config: Config | None = None,
    data: str = "",
    optimizers: Sequence[str] | str = ("adamw", "adamw_fp8", "muon"),
    lrs: Sequence[float] | float = (),
    steps: int = 200,
    seeds: int = 3,
) -> dict[str, Any]:
    """Train with every optimizer, learning rate and seed.

    Args:
        config: model, data and schedule, which ends at `steps`; default: the quickstart's. Parallelism is ignored.
        data: a prepared data set; default: the configuration's, or a new one if it is missing.
        optimizers: names in `OPTIMIZERS`.
        lrs: peak learning rates; default: the configuration's.
        steps: optimizer steps.
        seeds: runs for each; their seeds are run.seed and the numbers that follow it.

    Returns:
        `machine`, `settings`, and `runs`: optimizer, lr, and over seeds `losses`, `step_ms` and `update_ms` [min,
        median, max over all steps but the first], both CPU time.

    Raises:
        UsageError: an optimizer is unknown, or there is nothing to measure.
    """
    names = (optimizers,) if isinstance(optimizers, str) else tuple(optimizers)
    if unknown := [name for name in names if name not in OPTIMIZERS]:
        raise UsageError(
            f"bench optim: no optimizer is called {unknown[0]}", remedy=f"there are {', '.join(OPTIMIZERS)}"
        )
    if steps < 2 or seeds < 1:
        raise UsageError(f"bench optim: steps = {steps}, seeds = {seeds}", remedy="at least two steps and one seed")
    given = load(QUICKSTART, []) if config is None else config
    rates = tuple(lrs) if isinstance(lrs, Sequence) else (lrs,)
    rates = tuple(float(rate) for rate in rates) or (given.optim.lr,)
    with contextlib.ExitStack() as stack:
        if not torch.distributed.is_initialized():
            groups.initialize(RankEnv())
            stack.callback(groups.finalize)
        base = resolve_share(stack.enter_context(_with_data(_alone(given, steps), data)))
        contenders = [(name, rate) for name in names for rate in rates]
        found = [_Results(name, rate) for name, rate in contenders]
        for seed in range(base.run.seed, base.run.seed + seeds):
            _train(base, found, seed=seed)
    return {
        "machine": device.device_name(),
        "torch": torch.__version__,
        "settings": {"data": base.data.path, "steps": steps, "seeds": seeds, "batch": base.train.global_batch_size},
        "runs": [one.as_dict() for one in found],
    }


def render(result: dict[str, Any]) -> str:
    """A Markdown table."""
    settings = result["settings"]
    lines = [
        f"{settings['steps']} steps of {settings['batch']} sequences, {settings['seeds']} seeds, {result['machine']}, "
        f"torch {result['torch']}; losses are held out, times are CPU time in ms: min / median / max",
        "",
        "| optimizer | lr | loss of each seed | mean loss | step | update |",
        "|---|---|---|---|---|---|",
    ]
    for one in result["runs"]:
        losses = ", ".join(f"{loss:.4f}" for loss in one["losses"])
        times = " | ".join(" / ".join(f"{value:.0f}" for value in one[key]) for key in ("step_ms", "update_ms"))
        lines.append(f"| {one['optimizer']} | {one['lr']:g} | {losses} | {one['loss']:.4f} | {times} |")
    return "\n".join(lines)


class _Results:
    """Figures of one optimizer and learning rate over seeds."""

    def __init__(self, optimizer: str, lr: float) -> None:
        self.optimizer, self.lr = optimizer, lr
        self.losses: list[float] = []
        self.steps_s: list[float] = []
        self.updates_s: list[float] = []

    def as_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "lr": self.lr,
            "losses": self.losses,
            "loss": statistics.mean(self.losses),
            "step_ms": _spread(self.steps_s),
            "update_ms": _spread(self.updates_s),
        }


def _spread(seconds: Sequence[float]) -> list[float]:
    """Smallest, median and largest [ms]."""
    return [1e3 * of(seconds) for of in (min, statistics.median, max)]


def _alone(config: Config, steps: int) -> Config:
    """One process, a schedule that ends at `steps`, and no auxiliary routers, which have an optimizer of their own."""
    changed = config.model_dump()
    changed["parallel"] = {}
    changed["train"]["steps"] = steps
    changed["model"]["auxiliary"]["mode"] = "off"
    warmup = config.optim.warmup
    changed["optim"] |= {"warmup": min(warmup, steps // 2), "restart": 0, "decay": None}
    return Config.model_validate(changed)


@contextlib.contextmanager
def _with_data(config: Config, given: str) -> Iterator[Config]:
    """The configuration with the data to use; prepared in a temporary folder if there is none."""
    path = given or config.data.path
    if given or config.data.blend or (path and Path(path).exists()):
        yield (
            config
            if not given
            else config.model_copy(update={"data": config.data.model_copy(update={"path": given, "blend": ()})})
        )
        return
    with tempfile.TemporaryDirectory(prefix="mmscale-bench-") as folder:
        sys.stderr.write("preparing the data\n")
        prepare(config, Path(folder) / "data", progress=False)
        yield config.model_copy(update={"data": config.data.model_copy(update={"path": f"{folder}/data"})})


class _Contender:
    """One model that trains with one optimizer."""

    def __init__(self, config: Config, results: _Results) -> None:
        update = {**OPTIMIZERS[results.optimizer], "lr": results.lr, "min_lr": min(config.optim.min_lr, results.lr)}
        self.config = config.model_copy(update={"optim": config.optim.model_copy(update=update)})
        self.results = results
        self.groups = groups.collection()
        self.parts = build(self.config, self.groups)
        self.random = random_state.capture()
        self._updates: list[float] = []
        apply = self.parts.optimizer.step_with_ready_grads

        def timed() -> Any:
            before = time.process_time()
            done = apply()
            self._updates.append(time.process_time() - before)
            return done

        self.parts.optimizer.step_with_ready_grads = timed  # type: ignore[method-assign]

    def step(self, mixture: Mixture, number: int, *, tokens: int) -> None:
        """One optimizer step on the micro-batches of its number."""
        config, per_step = self.config, global_micro_batches(self.config)
        vocabulary = Vocabulary.from_config(config.vocab)
        batches = [to_device(mixture.micro_batch(number * per_step + index), vocabulary) for index in range(per_step)]
        lr = learning_rate(config.optim, step=number + 1, steps=config.train.steps, tokens=tokens)
        random_state.restore(self.random)
        device.synchronize()
        before = time.process_time()
        self.parts.stepper.train(batches, lr=lr)
        device.synchronize()
        seconds = time.process_time() - before
        self.random = random_state.capture()
        if number > 0:  # the first step creates the optimizer's state
            self.results.steps_s.append(seconds)
            self.results.updates_s.append(self._updates[-1])

    def held_out(self, mixture: Mixture) -> float:
        """Loss over the first evaluation batches (train.eval_batches), with batch routing."""
        found = evaluate(
            self.config,
            stepper=self.parts.stepper,
            mixture=mixture,
            groups=self.groups,
            batches=self.config.train.eval_batches,
        )
        return found["loss"]


def _train(base: Config, results: Sequence[_Results], *, seed: int) -> None:
    """Train every contender with one seed, in turns."""
    config = base.model_copy(update={"run": base.run.model_copy(update={"seed": seed})})
    vocabulary = Vocabulary.from_config(config.vocab)
    mixture = open_mixture(config, "train", vocabulary=vocabulary)
    groups.destroy_layout()
    groups.initialize_layout(seed=seed)
    device.set_seeds(seed)
    begin, contenders = random_state.capture(), []
    for one in results:
        random_state.restore(begin)
        contenders.append(_Contender(config, one))
    tokens = config.train.global_batch_size * config.model.seq_length
    for number in range(config.train.steps):
        for place in range(len(contenders)):  # another one is first in each step
            contenders[(number + place) % len(contenders)].step(mixture, number, tokens=number * tokens)
        if (number + 1) % 50 == 0:
            sys.stderr.write(f"seed {seed}: step {number + 1}/{config.train.steps}\n")
    passes = open_passes(config, vocabulary=vocabulary)
    if SOURCES not in passes:
        raise UsageError("bench optim: the data has no held-out documents", remedy="prepare it with a held-out split")
    for contender in contenders:
        contender.results.losses.append(contender.held_out(passes[SOURCES]))
