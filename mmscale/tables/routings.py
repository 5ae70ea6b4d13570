"""Routing modes: how experts and depth layers are assigned tokens. The gate is the main router's in every mode.

Commands, metric names, the report and the model read this table. The decision functions are in the model
(mmscale/model/decisions.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Protocol

from mmscale.tables.table import Choice, Table


class Routing(StrEnum):
    """The mode by which experts are assigned to tokens (MoMa, section 2.4; Expert Threshold, arXiv 2603.11535)."""

    BATCH = "batch"
    CAUSAL = "causal"
    TOP1 = "top1"
    THRESHOLD = "threshold"

    @property
    def mode(self) -> RoutingMode:
        """Its entry in the table."""
        return ROUTINGS[self.value]

    @property
    def leaks(self) -> bool:
        """Whether a token's output depends on later tokens."""
        return self.mode.needs is Needs.NOTHING


class Trained(Protocol):
    """The properties of a model that routing modes need (mmscale.config.ModelConfig)."""

    @property
    def auxiliary_width(self) -> int | None:
        """Inner width of its auxiliary routers; None: it has none."""

    @property
    def keeps_thresholds(self) -> bool:
        """Whether it keeps averaged cut-offs."""


class Needs(Enum):
    """What a model must have been trained with for a routing mode."""

    NOTHING = "nothing"
    AUXILIARY = "auxiliary routers"
    THRESHOLDS = "averaged cut-offs"

    def held_by(self, model: Trained) -> bool:
        """Whether a model has it."""
        return {
            Needs.NOTHING: True,
            Needs.AUXILIARY: model.auxiliary_width is not None,
            Needs.THRESHOLDS: model.keeps_thresholds,
        }[self]


@dataclass(frozen=True, kw_only=True)
class RoutingMode(Choice):
    """A routing mode.

    Attributes:
        needs: what the model must have. Every mode that needs something is causal.
        measured: whether a run measures held-out losses under it whenever the model has what it needs.
    """

    needs: Needs
    measured: bool = True


ROUTINGS: Table[RoutingMode] = Table(
    "Routing modes",
    ("--routing",),
    {
        Routing.BATCH: RoutingMode(
            meaning="experts choose among all tokens of the sequence or micro-batch, including later ones, as in "
            "training",
            needs=Needs.NOTHING,
        ),
        Routing.CAUSAL: RoutingMode(
            meaning="auxiliary routers decide from the token alone, and a token gets any number of experts",
            needs=Needs.AUXILIARY,
        ),
        Routing.TOP1: RoutingMode(
            meaning="the one expert of the token's group with the highest auxiliary score",
            needs=Needs.AUXILIARY,
            measured=False,
        ),
        Routing.THRESHOLD: RoutingMode(
            meaning="the main router's score against the moving average of each expert's cut-off",
            needs=Needs.THRESHOLDS,
        ),
    },
)
CAUSAL_ROUTINGS: tuple[Routing, ...] = tuple(routing for routing in Routing if not routing.leaks)


def meanings(routings: Iterable[Routing]) -> str:
    """Some modes with their meanings, for the help of a command."""
    return "; ".join(f"{routing}: {routing.mode.meaning}" for routing in routings) + "."


def measured_routings(model: Trained) -> list[Routing]:
    """Routings under which a run measures held-out losses: batch, and those that the model learns."""
    return [routing for routing in Routing if routing.mode.measured and routing.mode.needs.held_by(model)]
