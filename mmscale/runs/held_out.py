"""Names of what is measured on held-out data: keys of metrics.jsonl, and words for people. It measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.config.derived import SOURCE
from mmscale.tables.routings import CAUSAL_ROUTINGS

EVAL = "eval/"  # prefix of keys measured on held-out data, e.g. eval/loss/text
VALIDATION = "validation/"  # behind it for a set of `data.validation`, e.g. eval/validation/web/causal/loss/text


ACCURACY = "accuracy/"  # figures of tasks begin with it: the share of right answers
AUXILIARY = "auxiliary"  # the stage whose routers decide, in keys of reports: metrics.jsonl of a main run has none


@dataclass(frozen=True)
class HeldOut:
    """What a key says about held-out data: `eval/[validation/NAME/|source/NAME/][auxiliary/][ROUTING/]FIGURE`.

    Attributes:
        figure: `loss`, `loss/text`, `z_loss`, `accuracy/TASK`.
        routing: who decided which experts take a token; "batch" stands in no key.
        name: of the set in `data.validation`; `source/NAME`: the held-out documents of one source of a blend; "": of
            all data that is trained on.
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

    @property
    def how(self) -> str:
        """Who decided which experts take a token, for people."""
        return f"{self.routing} routing{f', {self.stage} stage' if self.stage else ''}"

    @property
    def where(self) -> str:
        """On what it was measured, and how, for people."""
        return f"{words_of(self.name) or 'held out'} ({self.how})"

    @classmethod
    def of(cls, key: str) -> HeldOut | None:
        """What a key says; None: it is not about held-out data."""
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
    """What keys of a set begin with, behind `eval/`.

    Args:
        name: of the set, as in `HeldOut`.
    """
    if not name:
        return ""
    return f"{name}/" if name.startswith(SOURCE) else f"{VALIDATION}{name}/"


def words_of(name: str) -> str:
    """A set for people: `validation web`, `source web`; empty for the data that is trained on as a whole."""
    return prefix_of(name).rstrip("/").replace("/", " ", 1)
