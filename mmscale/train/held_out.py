"""Names of what is measured on held-out data: keys of metrics.jsonl, and words for people. It measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

EVAL = "eval/"  # prefix of keys measured on held-out data, e.g. eval/loss/text
VALIDATION = "validation/"  # behind it for a set of `data.validation`, e.g. eval/validation/web/causal/loss/text
CAUSAL_ROUTINGS = ("causal", "threshold", "top1")  # mmscale.model.mixed_modal.Routing without batch routing


@dataclass(frozen=True)
class HeldOut:
    """What a key of metrics.jsonl says about held-out data: `eval/[validation/NAME/][ROUTING/]FIGURE`.

    Attributes:
        figure: `loss`, `loss/text`, `z_loss`.
        routing: who decided which experts take a token; "batch" stands in no key.
        name: of the set in `data.validation`; "": the held-out documents of the data that is trained on.
    """

    figure: str
    routing: str = "batch"
    name: str = ""

    @property
    def key(self) -> str:
        """The key."""
        place = f"{VALIDATION}{self.name}/" if self.name else ""
        return f"{EVAL}{place}{self.routing + '/' if self.routing in CAUSAL_ROUTINGS else ''}{self.figure}"

    @property
    def where(self) -> str:
        """On what it was measured, and how, for people."""
        return f"{f'validation {self.name}' if self.name else 'held out'} ({self.routing} routing)"

    @classmethod
    def of(cls, key: str) -> HeldOut | None:
        """What a key says; None: it is not about held-out data."""
        if not key.startswith(EVAL):
            return None
        rest, name, routing = key.removeprefix(EVAL), "", "batch"
        if rest.startswith(VALIDATION):
            name, _, rest = rest.removeprefix(VALIDATION).partition("/")
        if rest.partition("/")[0] in CAUSAL_ROUTINGS:
            routing, _, rest = rest.partition("/")
        return cls(rest, routing, name)
