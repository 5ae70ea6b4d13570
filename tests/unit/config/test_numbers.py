"""Every number of the schemas has bounds: what is accepted can be computed with, all else is refused in words."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import pytest

from launch.profile import Profile, profile_of
from mmscale.config import keys
from mmscale.config.load import flatten, resolve
from mmscale.config.section import LARGEST
from mmscale.errors import ConfigError, UsageError
from mmscale.plan.summary import plan

BASE: dict[str, Any] = {
    "vocab": {"modalities": [{"name": "text", "size": 100}, {"name": "image", "size": 64}]},
    "model": {
        "num_layers": 8,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "seq_length": 512,
        "experts": {"counts": {"text": 4, "image": 4}},
        "depth": {"every": 2},
    },
    "data": {"blend": [{"path": "a"}], "prepare": {"documents": ["a.jsonl"]}},
    "optim": {"phases": [{"start": 2}]},
    "auxiliary": {"optim": {"phases": [{"start": 2}]}},
    "sft": {"blend": [{"path": "a"}], "optim": {"phases": [{"start": 2}]}},
}
NEVER = (math.nan, math.inf, -math.inf, 1e308, -1e308, 2**64, 10**400, -(10**16), "nan", "1e309", "-inf", True)
PROBES = (-1, 0, 1, LARGEST, 1e-300, 0.5, 2)
PROFILE: dict[str, Any] = {"tasks_per_node": 1, "time": 600, "signal_delay": 30}


def is_number(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return any(map(is_number, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return is_number(get_args(annotation)[0])
    return annotation in (int, float)


def is_mapping_of_numbers(annotation: Any) -> bool:
    if get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        return is_number(value) and not keys.accepts(value, str)
    return any(map(is_mapping_of_numbers, get_args(annotation)))


def settings_of_numbers() -> Iterator[str]:
    """Dotted keys of the whole configuration; `*` and mappings filled in with what BASE has."""
    for name, key in keys.all_keys().items():
        if key.section is None and is_number(key.annotation):
            yield name.replace(keys.ANY, "0")
        elif is_mapping_of_numbers(key.annotation):
            yield f"{name}.text"


NUMBERS = list(settings_of_numbers())


def test_the_walk_finds_the_numbers() -> None:
    assert len(NUMBERS) > 80
    assert {"optim.lr", "model.depth.capacity", "data.blend.0.weight", "vocab.modalities.0.size"} <= set(NUMBERS)
    assert {"train.modality_weights.text", "model.experts.counts.text", "log.prometheus_port"} <= set(NUMBERS)


@pytest.mark.parametrize("key", NUMBERS)
def test_absurd_numbers_are_refused(key: str) -> None:
    for value in NEVER:
        with pytest.raises(ConfigError, match=rf"{key} is .*, wants "):
            resolve(BASE, [f"{key}={str(value).replace('inf', '.inf').replace('nan', '.nan')}"])


@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_accepted_can_be_planned(key: str) -> None:
    for value in PROBES:
        with contextlib.suppress(ConfigError, UsageError):
            config = resolve(BASE, [f"{key}={value}"])
            assert flatten(config)[key] == value
            plan(config)


def numbers_of_profile(section: Any = Profile, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        inner = next(
            (kind for kind in (field.annotation, *get_args(field.annotation)) if hasattr(kind, "model_fields")), None
        )
        if inner is not None and get_origin(field.annotation) is not dict:
            yield from numbers_of_profile(inner, (*prefix, name))
        elif is_number(field.annotation):
            yield (*prefix, name)


@pytest.mark.parametrize("path", list(numbers_of_profile()), ids=".".join)
def test_absurd_numbers_of_a_profile_are_refused(path: tuple[str, ...]) -> None:
    for value in (*NEVER, -1):
        content = value
        for name in reversed(path):
            content = {name: content}
        with pytest.raises(ConfigError, match=rf"^here: {'.'.join(path)}"):
            profile_of(PROFILE | content, where="here")
