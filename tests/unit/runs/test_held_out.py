"""Names of held-out figures: a key says what it is about, and gives the same key back."""

from __future__ import annotations

import itertools

import pytest

from mmscale.runs.held_out import HeldOut
from mmscale.tables.routings import CAUSAL_ROUTINGS, Routing
from mmscale.train.log.sinks import prometheus_name

NAMES = ("", "web", "causal", "loss", "validation", "v1.0-b_c")


def test_the_routings_are_those_of_the_model() -> None:
    assert set(CAUSAL_ROUTINGS) == {routing.value for routing in Routing if not routing.leaks}


@pytest.mark.parametrize("name", NAMES)
def test_a_key_says_what_it_is_about(name: str) -> None:
    """Whatever a set is called."""
    for routing, figure in itertools.product(("batch", *CAUSAL_ROUTINGS), ("loss", "loss/text", "z_loss")):
        measured = HeldOut(figure, routing, name)
        assert HeldOut.of(measured.key) == measured


def test_keys_as_they_are_documented() -> None:
    keys = {
        "eval/loss": HeldOut("loss"),
        "eval/causal/loss/text": HeldOut("loss/text", "causal"),
        "eval/validation/web/loss": HeldOut("loss", name="web"),
        "eval/validation/web/causal/loss/text": HeldOut("loss/text", "causal", "web"),
    }
    assert {key: HeldOut.of(key) for key in keys} == keys
    assert HeldOut.of("loss/text") is None
    assert keys["eval/validation/web/causal/loss/text"].where(routed=True) == "validation web (causal routing)"
    assert keys["eval/loss"].where(routed=True) == "held out (batch routing)"
    assert keys["eval/loss"].where(routed=False) == "held out"
    assert prometheus_name("eval/validation/web/causal/loss/text") == (
        "mmscale_loss",
        "text",
        "eval/validation/web/causal",
    )
    assert prometheus_name("eval/loss/image") == ("mmscale_loss", "image", "eval")
