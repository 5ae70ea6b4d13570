"""`mmscale plan --gpu FILE.json`: the figures of a machine that was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmscale.config.load import load
from mmscale.errors import UsageError
from mmscale.plan.measured import as_dict, figures_of, read
from mmscale.plan.summary import plan
from mmscale.tables.gpus import GPUS

CONFIG = Path(__file__).parents[3] / "configs" / "moma_90m_4t4i.yaml"


@pytest.mark.parametrize("name", list(GPUS))
def test_a_file_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(as_dict(GPUS[name])))
    assert figures_of(str(file)) == GPUS[name] == figures_of(name)


def test_a_plan_with_a_file_is_that_with_the_device(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(as_dict(GPUS["a100"])))
    config = load(CONFIG)
    by_file, by_name = plan(config, gpus=8, gpu=str(file)), plan(config, gpus=8, gpu="a100")
    assert by_file == by_name
    slower = as_dict(GPUS["a100"])
    slower["device"]["efficiency"]["launch"] = 1.0
    file.write_text(json.dumps(slower))
    assert plan(config, gpus=8, gpu=str(file))["layouts"][0] != by_name["layouts"][0]


def _broken(change: Any) -> str:
    values = as_dict(GPUS["h100"])
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (None, "no such file"),
        ("{", "Expecting"),
        ("[]", "no JSON object"),
        ("{}", "has format None"),
        (_broken(lambda values: values.update(format=2)), "has format 2"),
        (_broken(lambda values: values.pop("device")), "'device'"),
        (_broken(lambda values: values["device"].pop("efficiency")), "'efficiency'"),
        (_broken(lambda values: values["device"].pop("fp32")), "fp32"),
        (_broken(lambda values: values["device"].update(color="red")), "color"),
        (_broken(lambda values: values["device"].update(bandwidth=0)), "a speed is not positive"),
        (_broken(lambda values: values["device"]["efficiency"].update(latency=[1])), "two numbers"),
        (_broken(lambda values: values["device"]["efficiency"].update(moves=-1)), "a cost is negative"),
        (_broken(lambda values: values["device"]["efficiency"].update(launch="fast")), "could not convert"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str | None, cause: str) -> None:
    file = tmp_path / "measured.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError) as raised:
        read(file)
    assert cause in str(raised.value) and f"mmscale bench calibrate --out {file}" in raised.value.remedy
