"""The list of all charts of a report, shared by the page and the PNGs.

Defines columns and titles; other modules read, downsample and draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mmscale.config.derived import BITS, CONDITIONAL, SOURCE
from mmscale.report.accuracy_charts import Guessing, accuracy_charts
from mmscale.report.chart import SHAPES, Chart, Line, mark_of
from mmscale.report.figure_titles import title_of
from mmscale.report.history import History
from mmscale.runs.held_out import AUXILIARY, EVAL, HeldOut, with_how, words_of
from mmscale.tables.routings import CAUSAL_ROUTINGS

_ELSEWHERE = (
    "attempt",
    "rollback",
    "time",
    "tokens",
    "flops",
    "loss",
)  # axes, and the sum of losses that are shown separately
_OTHERS = 24


def charts_of(runs: Mapping[str, History], *, guessing: Sequence[Mapping[str, Sequence[Guessing]]] = ()) -> list[Chart]:
    """All charts in order; charts without any measurement have no lines.

    With one run a colour is a modality; with several, a colour is a run and each modality has separate charts.

    Args:
        runs: histories by name.
        guessing: accuracies of guessing of each run, in the same order; empty: unknown.
    """
    names, histories = list(runs), list(runs.values())
    builder = _Builder(names, histories, guessing)
    known = [*builder.losses(), *builder.optimization(), *builder.throughput(), *builder.routing()]
    return known + builder.others({line.key for chart in known for line in chart.lines})


def modalities_of(histories: Iterable[History]) -> list[str]:
    """Names of modalities, in the order in which they first appear among the losses."""
    found: dict[str, None] = {}
    for history in histories:
        for key in history.columns:
            name = key.removeprefix(EVAL)
            if name.startswith("loss/") and name.count("/") == 1:
                found.setdefault(name.removeprefix("loss/"))
    return list(found)


class _Builder:
    def __init__(
        self,
        names: Sequence[str],
        histories: Sequence[History],
        guessing: Sequence[Mapping[str, Sequence[Guessing]]] = (),
    ) -> None:
        self.names = names
        self.histories = histories
        self.guessing = guessing
        self.modalities = modalities_of(histories)

    def losses(self) -> list[Chart]:
        """Charts of training and held-out data, and one for each source of a blend and each validation set."""
        accuracies = accuracy_charts(self.names, self.histories, self.guessing)
        return [*self._main_losses(), *self._validation(), *self._bits(), *self._conditional(), *accuracies]

    def _bits(self) -> list[Chart]:
        """Bits per byte of held-out text, for comparing runs with different tokenizers."""
        lines = [line for figure in self._figures(BITS) for line in self._held_out(figure)]
        note = "Held-out text, special tokens included. It compares runs whose text tokenizers differ."
        return self._apart(Chart("bits_per_byte", "Loss", "Bits per byte of text", "bits", note), lines)

    def _conditional(self) -> list[Chart]:
        """Losses of one modality given another, a chart for each pair."""
        note = "Held-out tokens of the first modality that follow one of the second in their document."
        charts = []
        for figure in self._figures(CONDITIONAL):
            title = f"Loss per token: {figure.removeprefix(CONDITIONAL).replace('_', ' ')}"
            charts += self._apart(Chart(figure.replace("/", "_"), "Loss", title, "nats", note), self._held_out(figure))
        return charts

    def _apart(self, chart: Chart, lines: Sequence[Line]) -> list[Chart]:
        """The chart with these lines; one for each held-out set if lines of several runs would look alike."""
        if not lines or len(set(looks := [(line.run, line.mark % SHAPES) for line in lines])) == len(looks):
            return [replace(chart, lines=tuple(lines))] if lines else []
        if len(self.names) == 1:  # colours are sets
            return [replace(chart, lines=tuple(lines))]
        by_set: dict[str, list[Line]] = {}
        for line in lines:
            one = HeldOut.of(line.key)
            assert one is not None  # a figure of held-out data
            by_set.setdefault(one.name, []).append(replace(line, mark=mark_of(one)))
        return [
            replace(chart, name=f"{chart.name}_{name or 'held_out'}".replace("/", "_"), title=title, lines=tuple(own))
            for name, own in by_set.items()
            for title in [f"{chart.title}, {words_of(name) or 'held out'}"]
        ]

    def _figures(self, prefix: str) -> list[str]:
        """Held-out figures whose name begins with a prefix, in the order of the columns."""
        found = [one.figure for history in self.histories for key in history.columns if (one := HeldOut.of(key))]
        return [figure for figure in dict.fromkeys(found) if figure.startswith(prefix)]

    def _held_out(self, figure: str) -> list[Line]:
        """A line for each set and routing mode of each run; with one run, a colour is a set."""
        measured = [
            (run, one)
            for run, history in enumerate(self.histories)
            for key in history.columns
            if (one := HeldOut.of(key)) and one.figure == figure
        ]
        sets = list(dict.fromkeys(one.name for _, one in measured))
        kinds = list(dict.fromkeys(one for _, one in measured))
        alone = len(self.names) == 1
        return [
            Line(
                run,
                one.key,
                self._where(run, one) if alone else f"{self.names[run]}, {self._where(run, one)}",
                sets.index(one.name) if alone else run,
                points=True,
                mark=mark_of(one) if alone or len(sets) == 1 else kinds.index(one),
                best=True,
            )
            for run, one in measured
        ]

    def _where(self, run: int, measured: HeldOut) -> str:
        """The data and the routing mode of a run's held-out value. Labels say if it uses later tokens."""
        return measured.where(routed=self.histories[run].routes)

    @property
    def _by_routing(self) -> str:
        """For notes: what distinguishes held-out lines of one set."""
        return ", by how experts were chosen" if any(history.routes for history in self.histories) else ""

    def _validation(self) -> list[Chart]:
        measured = {key: HeldOut.of(key) for history in self.histories for key in history.columns}
        sets = dict.fromkeys(one.name for one in measured.values() if one is not None and one.name)
        charts = []
        for name in sets:
            lines: dict[str, list[Line]] = {}  # by modality
            for run, history in enumerate(self.histories):
                own = [one for key, one in measured.items() if key in history.columns and one and one.name == name]
                for one in own:
                    head, _, modality = one.figure.partition("/")
                    if head != "loss" or bool(modality) != bool(self.modalities):
                        continue
                    colour = self._colour(modality, 0) if len(self.histories) == 1 else run
                    prefix = "" if len(self.histories) == 1 else f"{self.names[run]}: "
                    how = one.how(routed=self.histories[run].routes)
                    label = with_how(f"{prefix}{modality or 'loss'}", how)
                    line = Line(run, one.key, label, colour, points=True, mark=mark_of(one), best=True)
                    lines.setdefault(modality, []).append(line)
            what = "Held-out documents of one source" if name.startswith(SOURCE) else "A data set of its own"
            setting = "data.blend" if name.startswith(SOURCE) else "data.validation"
            note = f"{what} ({setting}){self._by_routing}."
            words = words_of(name)
            title = f"{words[0].upper()}{words[1:]}: loss per "
            chart = Chart(words.replace(" ", "_", 1), "Loss", f"{title}token", "nats", note)
            if len(self.histories) == 1 or len(lines) == 1:
                charts.append(replace(chart, lines=tuple(line for own in lines.values() for line in own)))
                continue
            charts += [  # a colour is a run
                replace(chart, name=f"{chart.name}_{modality}", title=f"{title}{modality} token", lines=tuple(own))
                for modality, own in lines.items()
            ]
        return charts

    def _main_losses(self) -> list[Chart]:
        note = f"Training batches, and the held-out split{self._by_routing}."
        if not self.modalities:
            lines = self._losses_of("loss", "loss", 0)
            return [Chart("loss", "Loss", "Loss per token", "nats", note, wide=True, lines=lines)]
        if len(self.names) == 1:
            lines = tuple(
                line for i, name in enumerate(self.modalities) for line in self._losses_of(f"loss/{name}", name, i)
            )
            return [Chart("loss", "Loss", "Loss per token of each modality", "nats", note, wide=True, lines=lines)]
        whole = self._losses_of("loss", "", 0)
        charts = [Chart("loss", "Loss", "Loss per token, all modalities", "nats", note, wide=True, lines=whole)]
        for name in self.modalities:
            title = f"Loss per {name} token"
            lines = self._losses_of(f"loss/{name}", "", 0)
            charts.append(Chart(f"loss_{name}", "Loss", title, "nats", lines=lines))
        return charts

    def _losses_of(self, key: str, label: str, colour: int) -> tuple[Line, ...]:
        lines = []
        for run, history in enumerate(self.histories):
            own = colour if len(self.histories) == 1 else run
            prefix = label or self.names[run]
            held_out = [HeldOut(key)]
            held_out += [HeldOut(key, routing, stage=stage) for stage in ("", AUXILIARY) for routing in CAUSAL_ROUTINGS]
            if key in history.columns:
                lines.append(Line(run, key, prefix, own))
            lines += [
                Line(run, one.key, f"{prefix}, {self._where(run, one)}", own, points=True, mark=mark_of(one), best=True)
                for one in held_out
                if one.key in history.columns
            ]
        return tuple(lines)

    def optimization(self) -> list[Chart]:
        section = "Optimization"
        return [
            self._each("grad_norm", section, "Gradient norm", log=True, note="Of the whole model, before clipping."),
            self._each("lr", section, "Learning rate", raw=True),
            self._each(
                "output_norm",
                section,
                "Output norm of the last layer",
                note="Growth without end comes before divergence (Chameleon, arXiv 2405.09818, section 2.3).",
            ),
            self._each(
                "z_loss",
                section,
                "z-loss",
                unit="(log Z)²",
                note="Mean square of the log of the softmax's denominator.",
            ),
        ]

    def throughput(self) -> list[Chart]:
        section = "Throughput"
        charts = [self._each("tokens_per_second", section, "Tokens per second", zero=True, note="Pauses are left out.")]
        if any("mfu" in history.columns for history in self.histories):
            charts.append(self._each("mfu", section, "Model FLOPs utilization", zero=True))
        else:
            charts.append(
                self._each(
                    "model_tflops_per_rank",
                    section,
                    "Model FLOP/s per rank",
                    unit="TFLOP/s",
                    zero=True,
                    note="The device's peak is not known, so there is no MFU.",
                )
            )
        charts.append(
            self._several(
                "waits",
                section,
                "Time of a step",
                (
                    ("step_time_s", "step", False),
                    ("data_wait_s", "of it: waiting for data", False),
                    ("step_time_saving_s", "step while a save runs", True),
                ),
                unit="s",
                log=True,
            )
        )
        charts.append(
            self._several(
                "stalls",
                section,
                "Pauses since the last logged step",
                (
                    ("save_stall_s", "save stalls", True),
                    ("eval_s", "evaluation", True),
                    ("rollback_s", "roll-back", True),
                ),
                unit="s",
                log=True,
            )
        )
        ranks = self._several(
            "ranks",
            section,
            "Ranks' own time of a step",
            (("rank_time_max_s", "slowest rank", False), ("rank_time_median_s", "median", False)),
            unit="s",
            zero=True,
            note="From asking for the batch to the end of backward, before gradients meet.",
        )
        slowest = self._several(
            "slowest",
            section,
            "Which rank was slowest",
            (("slowest_rank", "rank", True),),
            note="The most frequent one of each stretch. Always the same one: look at its node.",
        )
        slowest = replace(slowest, lines=tuple(replace(line, names=True) for line in slowest.lines))
        return charts + [chart for chart in (ranks, slowest) if chart.lines]  # a run with one rank has neither

    def routing(self) -> list[Chart]:
        section = "Routing"
        return [
            *self._by_modality(
                "unrouted",
                section,
                "Tokens that no expert took",
                "experts/{}/unrouted_fraction",
                note="Fraction of each group's tokens, mean over layers; they pass by the experts unchanged.",
            ),
            *self._by_modality(
                "balance",
                section,
                "Unevenness of experts",
                "experts/{}/tokens_per_expert_cv",
                note="Standard deviation over mean of the tokens per expert; 0 is even.",
            ),
            *self._by_modality(
                "gates",
                section,
                "Unevenness of gates",
                "experts/{}/gate_mass_cv",
                note="Standard deviation over mean of the sums of gates of the experts; 0 is even.",
            ),
            *self._by_modality(
                "overflow",
                section,
                "Tokens over nominal capacity",
                "experts/{}/overflow_fraction",
                note="Of all tokens, those of a modality that came in excess of its nominal share.",
            ),
            *self._by_modality("unused", section, "Expert slots left empty", "experts/{}/unused_fraction"),
            *self._by_modality(
                "depth",
                section,
                "Tokens that depth layers process",
                "depth/selected_fraction/{}",
                note="Fraction of each modality's tokens, mean over Mixture-of-Depths layers.",
            ),
        ]

    def others(self, shown: set[str]) -> list[Chart]:
        """A chart for every other value that was measured and changed: counts of anomalies, times of other pauses."""
        found: list[Chart] = []
        for key in dict.fromkeys(key for history in self.histories for key in history.columns):
            if key in shown or key in _ELSEWHERE or key.startswith(("tokens/", EVAL)) or len(found) == _OTHERS:
                continue
            values = np.concatenate([history.measured(key)[1] for history in self.histories])
            if len(np.unique(values[np.isfinite(values)])) > 1:
                title, unit = title_of(key)
                chart = self._each(key, "Other figures", title, unit=unit, note="" if title == key else key)
                found.append(replace(chart, name=f"other_{key.replace('/', '_')}"))
        return found

    def _each(self, key: str, section: str, title: str, **extra: object) -> Chart:
        lines = tuple(
            Line(run, key, self.names[run], run) for run, history in enumerate(self.histories) if key in history.columns
        )
        return Chart(key, section, title, lines=lines, **extra)  # type: ignore[arg-type]

    def _several(
        self, name: str, section: str, title: str, keys: Sequence[tuple[str, str, bool]], **extra: object
    ) -> Chart:
        lines = []
        for run, history in enumerate(self.histories):
            prefix = "" if len(self.names) == 1 else f"{self.names[run]}: "
            lines += [
                Line(
                    run,
                    key,
                    f"{prefix}{label}",
                    place if len(self.names) == 1 else run,
                    points,
                    joined=False,
                    mark=place,
                )
                for place, (key, label, points) in enumerate(keys)
                if key in history.columns
            ]
        return Chart(name, section, title, lines=tuple(lines), **extra)  # type: ignore[arg-type]

    def _by_modality(self, name: str, section: str, title: str, pattern: str, *, note: str = "") -> list[Chart]:
        before, after = pattern.split("{}")
        groups: dict[str, None] = {}
        for history in self.histories:
            for key in history.columns:
                if key.startswith(before) and key.endswith(after):
                    groups.setdefault(key[len(before) : len(key) - len(after)])
        ordered = [g for g in self.modalities if g in groups] + [g for g in groups if g not in self.modalities]
        if len(self.names) == 1:
            lines = tuple(
                Line(0, pattern.format(group), group, self._colour(group, place)) for place, group in enumerate(ordered)
            )
            return [Chart(name, section, title, note=note, zero=True, lines=lines)] if lines else []
        return [
            self._each(pattern.format(group), section, f"{title}: {group}", note=note, zero=True) for group in ordered
        ]

    def _colour(self, group: str, place: int) -> int:
        return self.modalities.index(group) if group in self.modalities else place
