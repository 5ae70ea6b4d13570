"""`mmscale bench gpu` without a GPU: its arithmetic, what it refuses, how it records. tests/te_on_cpu runs its rows."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from mmscale.bench import gpu
from mmscale.bench.gpu_session import Session
from mmscale.bench.gpu_shapes import EXPECTED, FULL, TINY, Shape, predicted
from mmscale.errors import ConfigError, UsageError
from mmscale.runtime import device

no_gpu = pytest.mark.skipif(device.has_cuda(), reason="shows what a machine without CUDA says")


@pytest.mark.parametrize("shape", [FULL, TINY])
@pytest.mark.parametrize("kind", ["dense", "moma"])
def test_flops_and_parameters_by_hand(shape: Shape, kind: str) -> None:
    """Products of 2abc: four projections, causal attention, three products of the FFN, routers, the output layer."""
    h, f, layers = shape.hidden, shape.inner, 3
    experts = shape.experts if kind == "moma" else 0
    layer = 8 * h**2 + 6 * h * f + 2 * h * shape.seq
    forward = layers * (layer + 2 * h * experts) + 2 * h * shape.vocabulary
    assert shape.step_flops(kind, layers) == pytest.approx(3 * forward * shape.tokens)
    assert shape.layer_flops() == pytest.approx(layer * shape.tokens)
    assert shape.expert_flops() == pytest.approx(6 * h * f * shape.tokens)
    weights = layers * (4 * h**2 + 3 * h * f * (experts or 1) + h * experts) + 2 * h * shape.vocabulary
    norms = (2 * layers + 1) * h + layers * 2 * h // shape.heads
    assert shape.parameters(kind, layers) == weights + norms


def test_a_quarter_of_the_tokens_costs_less_than_a_quarter() -> None:
    h, router = FULL.hidden, 2 * FULL.hidden
    quarter = (8 * h**2 + 6 * h * FULL.inner + 2 * h * FULL.seq / 4) / 4
    assert FULL.layer_flops(depth=True) == pytest.approx((quarter + router) * FULL.tokens)
    assert FULL.layer_flops(depth=True) / FULL.layer_flops() == pytest.approx(0.224, abs=1e-3)


def test_predictions_are_those_that_were_written_down() -> None:
    """Milliseconds, for one H100."""
    found = {name: seconds * 1e3 for name, seconds in predicted(FULL).items()}
    assert FULL.expert_flops() == pytest.approx(1.134e12, rel=1e-3)
    assert found["product bf16"] == pytest.approx(1.38, rel=0.01)
    assert found["copy"] == pytest.approx(1.43, rel=0.01)
    assert found["experts bmm forward"] == pytest.approx(1.42 * 1.15 + 0.31, rel=0.01)
    assert found["experts te delayed cached"] < found["experts te delayed first"] < found["experts te bf16"]
    assert 120 < found["stack moma 6 bf16"] < 150 and 220 < found["stack dense 16 bf16"] < 260
    assert all(math.isfinite(value) and value > 0 for shape in (FULL, TINY) for value in predicted(shape).values())


@no_gpu
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, ConfigError, "there is no CUDA device"),
        ({"device": "tpu"}, UsageError, "tpu is no device"),
        ({"device": "cpu", "part": 3}, UsageError, "no part 3"),
        ({"device": "cpu", "repeats": 0}, UsageError, "--repeats 0 is too small"),
        ({"device": "cpu", "steps": 5}, UsageError, "--steps 5 is too small"),
    ],
)
def test_refuses_what_cannot_be(options: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        gpu.run(**options)  # type: ignore[arg-type]


def _session(out: Path | None = None, *, left_s: float = 60.0) -> Session:
    return Session(TINY, repeats=3, deadline=time.monotonic() + left_s, out=out)


def test_a_row_that_fails_leaves_a_reason_and_the_others(tmp_path: Path) -> None:
    session = _session(tmp_path / "deep" / "gpu.json")
    calls: list[int] = []
    session.time(2, "experts bmm, forward", lambda: calls.append, flops=1e6, key="experts bmm forward")
    session.time(2, "broken", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    session.check("wrong", 0.5, lambda: (0.7, "too far"))
    session.check("right", 0.5, lambda: (0.1, "near"))
    session.check("not a number", 0.5, lambda: (math.nan, "lost"))
    session.check("raises", 0.5, lambda: (1 / 0, ""))
    assert calls == [0, 1, 2, 0, 1, 2]  # warmed up, then timed
    good, bad = session.rows
    assert good.ms is not None and good.ms[0] <= good.ms[1] <= good.ms[2] and good.predicted_ms is not None
    assert good.floor_ms == pytest.approx(1e6 / EXPECTED.bf16 * 1e3)
    assert bad.ms is None and bad.note == "not measured: ZeroDivisionError: division by zero"
    assert [check.passed for check in session.checks] == [False, True, False, False]
    session.facts["loss of 10 steps"] = [1.0, math.nan]
    session.write()

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    written = json.loads((tmp_path / "deep" / "gpu.json").read_text(), parse_constant=refuse)
    assert [check["value"] for check in written["checks"]] == [0.7, 0.1, None, None]
    assert [check["passed"] for check in written["checks"]] == [False, True, False, False]
    assert [check["note"] for check in written["checks"][2:]] == ["nan: lost", "ZeroDivisionError: division by zero"]
    assert written["loss of 10 steps"] == [1.0, None]
    assert [row["name"] for row in written["rows"]] == ["experts bmm, forward", "broken"]
    session.facts["transformer_engine"] = None
    session.facts["depth_layer_over_dense"] = 0.25
    text = gpu.render(session.result())
    assert "a quarter of the tokens takes 0.250" in text
    assert "**failed**" in text and "not measured: ZeroDivisionError" in text and "Transformer-Engine none" in text


def test_nothing_begins_after_the_time_is_up() -> None:
    session = _session(left_s=-1.0)
    session.time(1, "copy", lambda: pytest.fail("began"))
    session.check("late", 0.1, lambda: pytest.fail("began"))
    assert session.rows[0].note == "not measured: no time was left"
    assert session.checks[0].passed is None
