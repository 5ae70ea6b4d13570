"""Renders a fitted scaling law as plain data, as text and as a picture. scaling.py fits it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmscale.report.figure_style import COLOURS, GREY, dress, new_figure
from mmscale.report.scaling import Fit, Observations, Terms, barrier_parameters, cheapest_barrier, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMES = ("constant", "A", "alpha", "B", "beta")


def summary(fit: Fit, seen: Mapping[tuple[str, ...], Observations], *, tokens: Sequence[float] = ()) -> dict[str, Any]:
    """The fit as plain data with stable keys.

    Args:
        fit: the law.
        seen: the observations that it was fitted to.
        tokens: numbers of tokens at which to predict the barrier; none: the largest number that a pair was trained on,
            and 4 and 16 times that.

    Returns:
        `modalities` and `pairs`: constants with intervals (`low`, `high`; absent without replicas), runs, largest
        misfit; a pair's `C` is its constant's negative, and `barrier` is the number of parameters above which there is
        synergy (None: never).
    """
    laws = fit.law.pairs
    most = {names: float(np.max(seen[names].all_tokens)) for names in laws}
    return {
        "modalities": {
            name: _constants(terms, [one.alone[name] for one in fit.replicas], "E") | _quality(fit, seen, (name,))
            for name, terms in fit.law.alone.items()
        },
        "pairs": {
            "+".join(names): _constants(terms, [one.pairs[names] for one in fit.replicas], "C")
            | _quality(fit, seen, names)
            | _barrier(
                terms,
                [one.pairs[names] for one in fit.replicas],
                tokens or [most[names] * factor for factor in (1, 4, 16)],
            )
            for names, terms in laws.items()
        },
        "replicas": len(fit.replicas),
    }


def render(result: Mapping[str, Any]) -> str:
    """The summary as tables in Markdown."""
    head = ("", "E or C", "A", "alpha", "B", "beta", "runs", "largest misfit")
    lines = [_row(head), _row(["---"] * len(head))]
    for label, found in [*result["modalities"].items(), *result["pairs"].items()]:
        first = "E" if label in result["modalities"] else "C"
        cells = [_with_interval(found[name]) for name in (first, *_NAMES[1:])]
        lines.append(_row([label, *cells, str(found["runs"]), f"{found['largest_misfit']:.2%}"]))
    if result["replicas"]:
        lines += ["", f"In brackets: the middle 90 % of {result['replicas']} fits to resampled residuals."]
    for label, found in result["pairs"].items():
        lines += ["", f"{label}: together better than apart (synergy)"]
        for entry in found["barrier"]:
            lines.append(f"- at {_amount(entry['tokens'])} tokens: {_above(entry)}")
        if cheapest := found["cheapest"]:
            lines.append(
                f"- with the least compute: from {_amount(cheapest['parameters'])} parameters and "
                f"{_amount(cheapest['tokens'])} tokens on"
            )
    return "\n".join(lines)


def picture(fit: Fit, seen: Mapping[tuple[str, ...], Observations]) -> Figure:
    """Measured against predicted losses; and for each pair the barrier between competition and synergy."""
    pairs = list(fit.law.pairs)
    figure = new_figure(width=5.0 * (1 + len(pairs)), height=4.4)
    panels = figure.subplots(1, 1 + len(pairs), squeeze=False)[0]
    _draw_fit(panels[0], fit, seen)
    for axes, names in zip(panels[1:], pairs, strict=True):
        _draw_barrier(axes, fit, names, seen[names])
    return figure


def _constants(terms: Terms, replicas: Sequence[Terms], first: str) -> dict[str, Any]:
    sign = -1.0 if first == "C" else 1.0
    found: dict[str, Any] = {}
    for name in _NAMES:
        factor = sign if name == "constant" else 1.0
        values = [factor * getattr(one, name) for one in replicas]
        entry = {"value": factor * getattr(terms, name)}
        if values:
            entry["low"], entry["high"] = interval(values)
        found[first if name == "constant" else name] = entry
    return found


def _quality(fit: Fit, seen: Mapping[tuple[str, ...], Observations], names: tuple[str, ...]) -> dict[str, Any]:
    return {"runs": len(seen[names].loss), "largest_misfit": float(np.abs(np.expm1(fit.residuals[names])).max())}


def _barrier(terms: Terms, replicas: Sequence[Terms], tokens: Sequence[float]) -> dict[str, Any]:
    entries = []
    for count in tokens:
        spread = [_inf_if_none(barrier_parameters(one, count)) for one in replicas]
        entry = {"tokens": count, "parameters": barrier_parameters(terms, count)}
        if spread:
            entry["low"], entry["high"] = map(_known, interval(spread))
        entries.append(entry)
    cheapest = cheapest_barrier(terms)
    least = None if cheapest is None else {"parameters": cheapest[0], "tokens": cheapest[1]}
    return {"barrier": entries, "cheapest": least}


def _inf_if_none(parameters: float | None) -> float:
    return math.inf if parameters is None else parameters


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _above(entry: Mapping[str, Any]) -> str:
    ends = ["never" if entry[end] is None else _amount(entry[end]) for end in ("low", "high") if end in entry]
    spread = f" ({' to '.join(ends)})" if ends else ""
    if entry["parameters"] is None:
        return f"at no size{spread}"
    return f"from {_amount(entry['parameters'])} parameters on{spread}"


def _with_interval(entry: Mapping[str, float]) -> str:
    spread = f" ({entry['low']:.3g} to {entry['high']:.3g})" if "low" in entry else ""
    return f"{entry['value']:.4g}{spread}"


def _amount(value: float) -> str:
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}" if value < 1e15 else f"{value:.1e}"
    return f"{value:.3g}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _draw_fit(axes: Axes, fit: Fit, seen: Mapping[tuple[str, ...], Observations]) -> None:
    for number, (names, points) in enumerate(seen.items()):
        predicted = fit.law.loss(points.parameters, points.tokens)
        axes.plot(
            predicted,
            points.loss,
            linestyle="none",
            marker="o",
            markersize=4.5,
            color=COLOURS[number % len(COLOURS)],
            label=" + ".join(names),
        )
    ends = np.array([*axes.get_xlim(), *axes.get_ylim()])
    axes.plot([ends.min(), ends.max()], [ends.min(), ends.max()], color=GREY, linewidth=0.9, linestyle="--", zorder=0)
    axes.set_title("loss of each run [nats per token]", loc="left", fontsize=10)
    axes.set_xlabel("fitted")
    axes.set_ylabel("measured")
    axes.legend(frameon=False, fontsize=9)
    dress(axes)


def _draw_barrier(axes: Axes, fit: Fit, names: tuple[str, str], seen: Observations) -> None:
    grid = np.geomspace(seen.all_tokens.min(), seen.all_tokens.max() * 100, 60)
    line = [_inf_if_none(barrier_parameters(fit.law.pairs[names], count)) for count in grid]
    spread = [[_inf_if_none(barrier_parameters(one.pairs[names], count)) for count in grid] for one in fit.replicas]
    apart = np.mean([fit.law.alone[name](seen.parameters, seen.tokens[name]) for name in names], axis=0)
    better = seen.loss < apart
    for chosen, colour, label in ((better, "#009E73", "run: synergy"), (~better, "#D55E00", "run: competition")):
        axes.plot(
            seen.all_tokens[chosen],
            seen.parameters[chosen],
            linestyle="none",
            marker="o",
            markersize=4.5,
            color=colour,
            label=label,
        )
    # Far outside of the trained range an extrapolated barrier has no meaning.
    low, high = seen.parameters.min() / 10, seen.parameters.max() * 1e4
    if spread:
        bands = np.array([interval([one[place] for one in spread]) for place in range(len(grid))])
        axes.fill_between(grid, *np.clip(bands.T, low, high), color="#0072B2", alpha=0.15, linewidth=0, label="90 %")
    axes.plot(grid, np.where(np.array(line) < high, line, np.nan), color="#0072B2", linewidth=1.7, label="barrier")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_title(f"{' + '.join(names)}: synergy above the barrier", loc="left", fontsize=10)
    axes.set_xlabel("tokens of both")
    axes.set_ylabel("parameters")
    axes.legend(frameon=False, fontsize=9)
    dress(axes)
