"""A run that learns nothing says so, once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from mmscale.train.hooks import STILL_AFTER, StillHook


def test_a_gradient_of_zero_for_many_steps_is_said_once() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    warnings: list[str] = []
    hook = StillHook(on_event=lambda event, **fields: events.append((event, fields)), warn=warnings.append)

    def step(number: int, norm: float) -> None:
        report = SimpleNamespace(step=number, result=SimpleNamespace(grad_norm=norm))
        hook.on_step(cast("Any", None), cast("Any", report))

    for number in range(1, STILL_AFTER):
        step(number, 0.0)
    step(STILL_AFTER, 1e-9)  # tiny is not nothing
    assert events == []
    for number in range(STILL_AFTER + 1, 3 * STILL_AFTER):
        step(number, 0.0)
    assert events == [("no_gradient", {"step": 2 * STILL_AFTER, "steps": STILL_AFTER})]
    assert len(warnings) == 1 and "nothing is learned" in warnings[0]
