"""Names of values measured on held-out data: keys of metrics.jsonl, and words for people."""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.config.derived import CONDITIONAL, SOURCE
from mmscale.tables.routings import CAUSAL_ROUTINGS

EVAL = "eval/"  # prefix of keys measured on held-out data, e.g. eval/loss/text
VALIDATION = "validation/"  # follows EVAL for a set of `data.validation`, e.g. eval/validation/web/causal/loss/text


# Figures in words, by their name and whether a modality or a task follows it.
_MEASURES = {
    ("loss", False): "loss per token",
    ("loss", True): "loss per {} token",
    ("bits_per_byte", True): "bits per byte of {}",
    ("accuracy", True): "accuracy of {}",
    ("conditional_loss", True): "loss per token of {}",
    ("z_loss", False): "z-loss",
}
ACCURACY = "accuracy/"  # prefix of the accuracies of tasks
AUXILIARY = "auxiliary"  # in keys of reports, the stage whose routers decide; never in the metrics.jsonl of a main run


@dataclass(frozen=True)
class HeldOut:
    """The parts of a key of held-out data: `eval/[validation/NAME/|source/NAME/][auxiliary/][ROUTING/]FIGURE`.

    Attributes:
        figure: `loss`, `loss/text`, `z_loss`, `accuracy/TASK`.
        routing: mode by which experts were assigned to tokens; "batch" is not written in keys.
        name: of the set in `data.validation`; `source/NAME`: the held-out documents of one source of a blend; "": those
            of all training data.
        stage: whose routers decide; "": those of the main run.
    """

    figure: str
    routing: str = "batch"
    name: str = ""
    stage: str = ""

    @property
    def key(self) -> str:
        """The key."""
        stage = f"{self.stage}/" if self.stage else ""
        routing = f"{self.routing}/" if self.routing in CAUSAL_ROUTINGS else ""
        return f"{EVAL}{prefix_of(self.name)}{stage}{routing}{self.figure}"

    def how(self, *, routed: bool) -> str:
        """The routing mode in words.

        Args:
            routed: whether the model routes (`model.routes`); if not, there is no mode to name: "".
        """
        if not routed and self.routing == "batch":
            return ""
        return f"{self.routing} routing{f', {self.stage} stage' if self.stage else ''}"

    def where(self, *, routed: bool) -> str:
        """The data and the routing mode, in words: `held out (causal routing)`, `held out`.

        Args:
            routed: as for `how`.
        """
        return with_how(words_of(self.name) or "held out", self.how(routed=routed))

    @property
    def measure(self) -> str:
        """The figure in words: `loss per text token`."""
        name, _, of = self.figure.partition("/")
        of = of.replace("_given_", " given ") if self.figure.startswith(CONDITIONAL) else of
        return _MEASURES.get((name, bool(of)), self.figure).format(of)

    @classmethod
    def of(cls, key: str) -> HeldOut | None:
        """The parts of a key; None: it is not a key of held-out data."""
        if not key.startswith(EVAL):
            return None
        rest, name, routing, stage = key.removeprefix(EVAL), "", "batch", ""
        if rest.startswith(VALIDATION):
            name, _, rest = rest.removeprefix(VALIDATION).partition("/")
        elif rest.startswith(SOURCE):
            name, _, rest = rest.removeprefix(SOURCE).partition("/")
            name = f"{SOURCE}{name}"
        if rest.startswith(f"{AUXILIARY}/"):
            stage, _, rest = rest.partition("/")
        if rest.partition("/")[0] in CAUSAL_ROUTINGS:
            routing, _, rest = rest.partition("/")
        return cls(rest, routing, name, stage)


def prefix_of(name: str) -> str:
    """Prefix of the keys of a set, after `eval/`.

    Args:
        name: of the set, as in `HeldOut`.
    """
    if not name:
        return ""
    return f"{name}/" if name.startswith(SOURCE) else f"{VALIDATION}{name}/"


def with_how(label: str, how: str) -> str:
    """A label and in brackets the routing mode, if there is one to name (`HeldOut.how`)."""
    return f"{label} ({how})" if how else label


def words_of(name: str) -> str:
    """A set in words: `validation web`, `source web`; empty for the training data as a whole."""
    return prefix_of(name).rstrip("/").replace("/", " ", 1)
