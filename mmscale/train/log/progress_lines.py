"""Progress of training on stderr; stdout is reserved for results.

The output of a run for people: a banner before step 1, a live line on a terminal, plain lines in a log file. This
module only formats. Only rank 0's instance prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mmscale.config import Config
from mmscale.config.derived import data_parallel_size, mean_shares, micro_batches_per_step, tokens_per_step
from mmscale.runs.unrouted import note, unrouted
from mmscale.runtime.activity import ActivityReporter
from mmscale.wording import duration, numbered

_BAR = 20  # characters


class Progress:
    """The progress of one attempt.

    Args:
        steps: Steps of the whole run.
        enabled: False on all ranks except the first, which then print nothing.
        console: Where to print; stderr if None.
        copy: Receives every permanent line and every logged step as plain text, for a log file.
        starting: Shows the start of the run until the first step is shown.
    """

    def __init__(
        self,
        steps: int,
        *,
        enabled: bool = True,
        console: Console | None = None,
        copy: Callable[[str], None] = lambda text: None,
        starting: ActivityReporter | None = None,
    ) -> None:
        self._starting = starting
        self.steps = steps
        self.enabled = enabled
        self._copy = copy
        self._console = console or Console(stderr=True, highlight=False)
        self._values: dict[str, float] = {}
        self._noted = False
        self._live: Live | None = None
        if enabled and self._console.is_terminal:
            # transient: the bar is removed when the run ends; the lines above it stay.
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, step: int) -> None:
        """A step that is not logged is done: the bar moves, a log file gets no line."""
        if self._live is not None:
            self._started()
            self._live.update(Text(f"{_bar(step, self.steps)} {line(step, self.steps, self._values)}", no_wrap=True))

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """A logged step is done.

        Args:
            step: Steps done.
            values: The values written to metrics.jsonl.
        """
        if not self.enabled:
            return
        self._started()
        self._values.update(values)
        if self._live is not None:
            self.step(step)
            self._copy(line(step, self.steps, values))
        else:
            self.say(line(step, self.steps, values))
        high = note(unrouted(values))
        if high is not None and not self._noted:
            self._noted = True  # once per attempt; later lines contain the share only
            self.say(f"note: step {step}: {high}")

    def say(self, message: str) -> None:
        """Print a permanent line, e.g. about a checkpoint or a held-out loss."""
        if self.enabled:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)
            self._copy(message)

    def _started(self) -> None:
        if self._starting is not None:
            self._starting.close()
            self._starting = None

    def close(self) -> None:
        """Restore the terminal; the last values stay as a line."""
        self._started()
        if self._live is not None:
            self._live.stop()
            self._live = None


def line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """`step 120/1000  loss 2.3456 (text 2.1000, image 3.4000)  grad 0.81  lr 1.0e-04  12.3k tokens/s  left 3m10s`."""
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4f}{_by_modality(values)}")
    if "grad_norm" in values:
        parts.append(f"grad {values['grad_norm']:.3g}")
    if "lr" in values:
        parts.append(f"lr {values['lr']:.2e}")
    if shares := unrouted(values):
        parts.append(f"unrouted {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}")
    if "tokens_per_second" in values:
        parts.append(f"{count(values['tokens_per_second'])} tokens/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values.get("rank_time_median_s"):
        excess = values["rank_time_max_s"] / values["rank_time_median_s"] - 1.0
        parts.append(f"rank {int(values['slowest_rank'])} +{excess:.0%}")
    if "step_time_s" in values and step < steps:
        parts.append(f"left {duration((steps - step) * values['step_time_s'])}")
    return "  ".join(parts)


def _by_modality(values: Mapping[str, float]) -> str:
    losses = [f"{key.removeprefix('loss/')} {value:.4f}" for key, value in values.items() if key.startswith("loss/")]
    return f" ({', '.join(losses)})" if losses else ""


def _bar(step: int, steps: int) -> str:
    full = min(_BAR, _BAR * step // max(steps, 1))
    return "━" * full + "╌" * (_BAR - full)


def count(number: float) -> str:
    """A number in short form: 812, 12.3k, 7.32M, 1.41B."""
    if not math.isfinite(number):
        return str(number)
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # Otherwise 999,950 would be shown as 1000k.
        if abs(number) >= limit * 0.9995:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}" if number != int(number) else str(int(number))


def banner(
    config: Config,
    *,
    world_size: int,
    device: str,
    plan: Mapping[str, Any] | None = None,
    share: Mapping[str, float] | None = None,
    capacities: Mapping[str, float] | None = None,
    sources: Mapping[str, float] | None = None,
    attempt: int = 1,
    start_step: int = 0,
    folder: Path | None = None,
) -> str:
    """A few lines that describe the run before it starts.

    Args:
        config: The resolved configuration.
        world_size: Ranks.
        device: Name of a rank's device.
        plan: `mmscale.plan.plan(config)`; its `parameters` are shown.
        share: Share of each modality in the training data.
        capacities: Share of each modality in the slots of experts; shown if it is not that of the data.
        sources: Share of each data set in the training sequences, by its folder.
        attempt: Number of this attempt.
        start_step: Steps done in the checkpoint that the attempt resumes from.
        folder: of the run or of its stage; None: of the run.
    """
    parallel = config.parallel
    grid = {"tp": parallel.tp, "pp": parallel.pp, "vpp": parallel.vpp, "cp": parallel.cp, "ep": parallel.ep}
    sizes = [f"{name} {size}" for name, size in grid.items() if size is not None]
    sizes.append(f"dp {data_parallel_size(config, world_size)}")
    train, model = config.train, config.model
    micro_batches = micro_batches_per_step(config, world_size)
    rows = [("run", _run_line(config, folder, attempt=attempt, start_step=start_step))]
    rows.append(
        ("model", f"{model.kind}, {numbered(model.num_layers, 'layer')} x {model.hidden_size}{_experts(config)}")
    )
    if plan is not None:
        rows.append(("parameters", _parameters(plan.get("parameters", {}))))
    ranks = numbered(world_size, "rank")
    rows.append(("layout", f"{ranks}: {', '.join(sizes)}, {_format(config)}, on {device}"))
    batch = f"{count(tokens_per_step(config))} tokens = {train.global_batch_size} sequences x {model.seq_length}"
    portions = f"{numbered(micro_batches, 'micro-batch', 'micro-batches')} of {train.micro_batch_size} per replica"
    rows.append(("step", f"{batch}; {portions}"))
    if share:
        rows.append(("data", _percent(share)))
    if capacities and _percent(capacities) != _percent(share or {}):
        rows.append(("experts", f"slots for {_percent(capacities)} of the tokens (model.experts.share)"))
    if sources:
        rows.append(("sources", ", ".join(f"{name} {value:.1%}" for name, value in sources.items())))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _percent(share: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in share.items())


def source_shares(config: Config) -> dict[str, float]:
    """Share of each data set in the training sequences of the whole run, by its folder; limits are not applied."""
    shares = zip(config.data.sources, mean_shares(config), strict=True)
    return {
        source.path if source.max_epochs is None else f"{source.path} (until max_epochs = {source.max_epochs})": share
        for source, share in shares
        if share
    }


def _run_line(config: Config, folder: Path | None, *, attempt: int, start_step: int) -> str:
    text = f"{folder or Path(config.run.dir) / config.run.name}, attempt {attempt}"
    if start_step:
        return f"{text}, resumes after step {start_step} of {config.train.steps}"
    return f"{text}, {config.train.steps} steps"


def _format(config: Config) -> str:
    precision = config.precision
    if precision.fp8 == "off":
        return precision.dtype
    recipe = "NVFP4" if precision.fp8 == "nvfp4" else f"FP8 ({precision.fp8})"
    return f"{precision.dtype} with {'emulated ' if precision.fp8_emulate else ''}{recipe}"


def _experts(config: Config) -> str:
    experts = config.model.experts
    groups = [f"{number} {name}" for name, number in experts.counts.items()] if config.model.has_experts else []
    if experts.shared and groups:
        groups.append(f"{experts.shared} shared")
    text = f", experts {' + '.join(groups)}" if groups else ""
    if groups and experts.token_choice is not None:
        text += f", each token chooses {experts.token_choice.top_k}"
    depth = config.model.depth
    return text if depth is None else f"{text}, depth every {depth.every} layers at {depth.capacity:.0%}"


def _parameters(parameters: Mapping[str, Any]) -> str:
    parts = [f"{count(parameters[name])} {name}" for name in ("total", "active") if name in parameters]
    by_modality = parameters.get("per_modality") or {}
    return ", ".join(parts + [f"{count(number)} for {name} alone" for name, number in by_modality.items()])
