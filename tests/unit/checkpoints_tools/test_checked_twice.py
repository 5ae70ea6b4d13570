"""`ckpt average`, `fuse` and `upcycle` check their input before torch is loaded, and again when they open it.

A checkpoint may be removed or damaged in between. Both checks must say the same; this calls the second one alone.
Models that differ are compared by one function (alike.check_models) in both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import average, fuse, refusals, upcycle
from mmscale.errors import MmscaleError
from tests.unit.data.samples import config
from tests.unit.test_refusals import write_run

EXPERTS = {"text": 2, "image": 2}
# What is asked, by the function that does it and the one that checks it first.
ASKED: dict[str, tuple[Callable[..., Any], str, tuple[Any, ...], dict[str, Any]]] = {
    f"{command} {case}": (made, check, arguments, options)
    for case in ("none", "cut", "changed")
    for command, made, check, arguments, options in (
        ("average", average.average, "check_average", ([(case, None), ("run", None)], Path("out")), {"ema": None}),
        ("fuse", fuse.fuse, "check_fuse", ((case, None), ("run", None), Path("out")), {"average": False}),
        ("upcycle", upcycle.upcycle, "check_upcycle", (case, None, Path("out")), {"experts": EXPERTS}),
    )
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose tensors are never read: whole, without a file, and with a damaged manifest."""
    folder = tmp_path_factory.mktemp("twice")
    plain = config()
    for name in ("run", "cut", "changed"):
        write_run(folder / name, plain)
    checkpoint = "checkpoints/step_00000001"
    (folder / "cut" / checkpoint / "weights").unlink()
    (folder / "changed" / checkpoint / "MANIFEST.json").write_text("{")
    return folder


def named(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with paths for the names of runs."""

    def of(one: Any) -> Any:
        if isinstance(one, str):
            return Path(one)
        return type(one)(map(of, one)) if isinstance(one, list | tuple) else one

    return tuple(map(of, arguments))


def refusal(call: Callable[[], object]) -> tuple[str, str, int]:
    with pytest.raises(MmscaleError) as raised:
        call()
    return raised.value.cause, raised.value.remedy, raised.value.exit_status


@pytest.mark.parametrize("asked", ASKED)
def test_both_say_the_same(asked: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    made, check, arguments, options = ASKED[asked]
    given = named(arguments)
    wanted = {"steps": None} if check != "check_average" else {}
    first = refusal(lambda: getattr(refusals, check)(*given, **options, **wanted))
    module = {"check_average": average, "check_fuse": fuse, "check_upcycle": upcycle}[check]
    passed = {"check_average": [0.5, 0.5], "check_upcycle": config()}.get(check)
    monkeypatch.setattr(module, check, lambda *_, **__: passed)
    assert refusal(lambda: made(*given, **options)) == first
    assert not (place / "out").exists()
