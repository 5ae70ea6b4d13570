"""`mmscale plan --gpu FILE.json`: the figures of a machine that was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mmscale.config.load import load, resolve
from mmscale.config.rules import check
from mmscale.errors import UsageError
from mmscale.plan.measured import as_dict, figures_of, read
from mmscale.plan.parameters import count_parameters
from mmscale.plan.summary import plan
from mmscale.plan.timing import step_time
from mmscale.tables.gpus import GPUS

WORLD = 16
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
        *(
            (_broken(lambda values, name=name, bad=bad: values["device"]["efficiency"].update({name: bad})), cause)
            for name in ("products", "attention", "attention_te", "memory", "link", "network")
            for bad, cause in ((0, "a speed is not positive"), (math.nan, "not finite"), (math.inf, "not finite"))
        ),
        *(
            (_broken(lambda values, name=name, bad=bad: values["device"].update({name: bad})), cause)
            for name in ("memory", "bf16", "fp8", "fp32", "link", "network", "per_node")
            for bad, cause in ((0, "a speed is not positive"), (math.nan, "not finite"), (math.inf, "not finite"))
        ),
        (_broken(lambda values: values["device"].update(per_node=2.5)), "no whole number"),
        (_broken(lambda values: values["device"]["efficiency"].update(latency=[1])), "two numbers"),
        (_broken(lambda values: values["device"]["efficiency"].update(latency=[0, -1])), "a cost is negative"),
        (_broken(lambda values: values["device"]["efficiency"].update(latency=[0, math.nan])), "not finite"),
        (_broken(lambda values: values["device"]["efficiency"].update(adam=math.nan)), "not finite"),
        (_broken(lambda values: values["device"]["efficiency"].update(half_width=math.inf)), "not finite"),
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


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "tp": {"tp": 2},
    "tp across machines": {"tp": 4},
    "cp": {"cp": 4},
    "cp ring": {"cp": 4, "cp_attention": "ring"},
    "ep": {"ep": 4},
    "ep, groups that do not divide": {"ep": 8},
    "pp": {"pp": 4},
    "vpp": {"pp": 2, "vpp": 2},
    "tp cp ep pp": {"tp": 2, "cp": 2, "ep": 2, "pp": 2},
    "tp cp pp, recomputed": {"tp": 2, "cp": 2, "pp": 2, "recompute": "full"},
}
SPEEDS = ("bf16", "fp32", "bandwidth", "link", "network")


def _measured(kind: str) -> dict[str, Any]:
    """What `bench calibrate` writes of a machine of two GPUs, or of one with a CPU: every number is its own."""
    found = as_dict(GPUS["a100"])
    device, reached = found["device"], found["device"]["efficiency"]
    device["per_node"] = 2
    if kind == "host":
        device.update(host=True, bf16=1e11, fp32=2e11, bandwidth=2e10, link=3e9, network=3e9)
        reached.update(launch=3e-5, fixed=0.02, half_width=20.0, attention=0.5, attention_te=0.5)
    return found


@pytest.mark.parametrize("kind", ["gpu", "host"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_a_time_that_no_faster_machine_exceeds(kind: str, name: str, tmp_path: Path) -> None:
    """One figure at a time: twice a speed or a share of it costs no more, twice a cost costs no less."""
    config = resolve(
        {
            "vocab": {"modalities": [{"name": "text", "size": 1000}, {"name": "image", "size": 1000}]},
            "model": {
                "kind": "moma",
                "num_layers": 4,
                "hidden_size": 512,
                "ffn_hidden_size": 1024,
                "num_attention_heads": 8,
                "num_query_groups": 4,
                "seq_length": 4096,
                "experts": {"counts": {"text": 7, "image": 2}, "share": {"text": 0.6, "image": 0.4}},
            },
            "data": {"document_multiple": 16},
            "train": {"global_batch_size": 16, "micro_batch_size": 1},
            "parallel": LAYOUTS[name],
            "precision": {"dtype": "bf16"},
        }
    )
    check(config, world_size=WORLD)
    parameters, file = count_parameters(config), tmp_path / "measured.json"

    def seconds(change: Callable[[dict[str, Any], dict[str, Any]], None] = lambda *_: None) -> float:
        found = _measured(kind)
        change(found["device"], found["device"]["efficiency"])
        file.write_text(json.dumps(found))
        times = step_time(config, WORLD, figures_of(str(file)), parameters=parameters).as_dict()
        assert all(math.isfinite(value) and value >= 0 for value in times.values()), times
        return times["total"]

    usual, room = seconds(), 2e-6  # times are rounded to microseconds
    for figure in SPEEDS:
        assert seconds(lambda device, _, f=figure: device.update({f: 2 * device[f]})) <= usual + room, figure
    for figure, value in asdict(GPUS["a100"].efficiency).items():
        if figure == "latency":
            found = seconds(lambda _, reached: reached.update(latency=[2 * one for one in reached["latency"]]))
        else:
            found = seconds(lambda _, reached, f=figure: reached.update({f: 2 * reached[f]}))
        faster = figure in ("products", "attention", "attention_te", "memory", "link", "network")
        assert (found <= usual + room) if faster else (found >= usual - room), (figure, value)
    assert usual > 0
    parts = step_time(config, WORLD, figures_of(str(file)), parameters=parameters)
    for part in ("tp", "cp", "ep"):
        asked = LAYOUTS[name].get(part, 1) > 1
        assert (getattr(parts, part) > 0) == asked or LAYOUTS[name].get("cp_attention") == "ring", part
    assert (parts.bubble > 0) == (LAYOUTS[name].get("pp", 1) > 1)


@pytest.mark.parametrize("kind", ["gpu", "host"])
def test_a_plan_with_a_file_gives_every_layout_a_time(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(_measured(kind)))
    found = plan(load(CONFIG), gpus=8, gpu=str(file))
    assert len({(one["tp"], one["pp"], one["cp"], one["ep"]) for one in found["layouts"]}) > 3
    for one in found["layouts"]:
        assert 0 < one["time_s"]["total"] < math.inf and one["tokens_per_second"] > 0 and one["mfu"] >= 0, one
    assert found["duration"] is None or 0 < found["duration"]["days"] < math.inf
