"""Fail points: the handler that is set last is called, and none afterwards."""

from __future__ import annotations

import os

import pytest

from mmscale.runtime import fail_points


def test_the_innermost_handler_is_called() -> None:
    outer: list[str] = []
    inner: list[str] = []
    fail_points.reached("before")
    with fail_points.handled(outer.append):
        fail_points.reached("one")
        with fail_points.handled(inner.append):
            fail_points.reached("two")
        fail_points.reached("three")
    fail_points.reached("after")
    assert outer == ["one", "three"] and inner == ["two"]


def test_an_error_of_the_handler_passes_through_and_unsets_it() -> None:
    def fail(place: str) -> None:
        raise OSError(place)

    with pytest.raises(OSError, match="write"), fail_points.handled(fail):
        fail_points.reached("write")
    fail_points.reached("write")


def test_a_forked_process_inherits_the_handler() -> None:
    def end(place: str) -> None:
        os._exit(7)

    with fail_points.handled(end):
        child = os.fork()
        if child == 0:
            fail_points.reached("write")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
