"""The auxiliary stage says which questions of its run it does not ask."""

from __future__ import annotations

from typing import Any

import pytest

from mmscale.train.stages.auxiliary_stage import unasked


@pytest.mark.parametrize(
    ("main", "tasks", "missing"),
    [
        ({}, (), ""),
        ({"config": {"train": {}}}, (), ""),
        ({"config": {"train": {"tasks": ["a=a.jsonl"]}}}, ("a=a.jsonl",), ""),
        ({"config": {"train": {"tasks": ["a=a.jsonl", "b"]}}}, ("b",), "a=a.jsonl"),
        ({"config": {"train": {"tasks": ["a=a.jsonl", "b"]}}}, (), "a=a.jsonl, b"),
    ],
)
def test_what_is_not_asked_is_named(main: dict[str, Any], tasks: tuple[str, ...], missing: str) -> None:
    lines = unasked(main, tasks)
    assert lines == (
        [f"the run asked {missing}, and this stage does not: give it the same train.tasks"] if missing else []
    )
