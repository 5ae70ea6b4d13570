# What a command imports before it works, and what it says meanwhile; in new processes, since this one has imported all.
"""Tests of start-up."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints_tools.huggingface import export_settings
from mmscale.checkpoint.layout import INFO, info_text
from mmscale.checkpoint.shape import shape_of
from mmscale.config.load import dump, load

# What nothing needs before the first step on a CPU; each costs 0.2 to 2 seconds of CPU in every rank.
UNUSED = ("torch._dynamo", "torch._inductor", "torch.utils.tensorboard", "tensorboard", "matplotlib", "pandas", "scipy")
ROOT = Path(__file__).parents[2]
LIGHT = ("torch", "megatron", "transformers", "matplotlib", "scipy", "sklearn", "pandas", "numpy")

IMPORTS = """
import importlib, json, sys
found = {}
for name in sys.argv[1].split(","):
    importlib.import_module(name)
    found[name] = [one for one in sys.argv[2].split(",") if one in sys.modules]
exec(sys.argv[3])
found["then"] = [one for one in sys.argv[2].split(",") if one in sys.modules]
print(json.dumps(found))
"""

# What a host's rank does with megatron-core and its optimizer until it has taken a step and saved.
STEP = """
import torch
from mmscale.runtime import megatron_cpu
from mmscale.train.optim.adam import HostFusedAdam
megatron_cpu.install()
weight = torch.nn.Parameter(torch.ones(4))
weight.grad = torch.ones(4)
optimizer = HostFusedAdam([weight])
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert weight.grad is None and weight[0] < 1
"""

# A line would come after a second; here it comes at once. The commands end with an error.
COMMANDS = """
import sys
from mmscale.runtime import activity
activity.FIRST_LINE = 0.01
from mmscale.cli import main
for line in sys.argv[1].split(";"):
    print("$", line, file=sys.stderr, flush=True)
    main(line.split())
"""


def imported(names: str, watched: tuple[str, ...], *, then: str = "") -> dict[str, list[str]]:
    """Watched modules that are there after the import of each name, and after the code that is run then."""
    command = [sys.executable, "-c", IMPORTS, names, ",".join(watched), then]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, list[str]] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA megatron-core's functions are compiled")
def test_a_rank_imports_what_it_needs() -> None:
    """Data first: the module that imports megatron-core first must not matter."""
    names = "mmscale.data.stream.source,mmscale.train.run,mmscale.inference.evaluate"
    assert imported(names, UNUSED, then=STEP) == {name: [] for name in [*names.split(","), "then"]}


def test_commands_and_checks_before_a_start_need_no_torch() -> None:
    names = "mmscale.cli,mmscale.config.load"
    assert imported(names, LIGHT) == {name: [] for name in [*names.split(","), "then"]}
    names = "launch.status,mmscale.plan,mmscale.train.stages.table,mmscale.report.page"
    assert imported(names, ("torch", "megatron", "transformers", "sklearn", "pandas")) == {
        name: [] for name in [*names.split(","), "then"]
    }


def commands(*lines: str, then: str = "", folder: Path = ROOT) -> list[str]:
    """What each command prints to stderr, all of them in one new process, and what the code after them prints."""
    command = [sys.executable, "-c", COMMANDS + then, ";".join(lines)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    parts = ended.stderr.split("$ ")[1:]
    assert len(parts) == len(lines), ended.stderr
    return parts


def test_a_command_says_what_it_is_doing(tmp_path: Path) -> None:
    """Of a run whose only checkpoint is empty, and of an export without a tensor."""
    run, export = tmp_path / "run", tmp_path / "export"
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    export.mkdir()
    own = export_settings.settings(load(ROOT / "configs/quickstart.yaml", ["parallel.ep=1"]), {})
    (export / "config.json").write_text(json.dumps(own))
    (export / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    lines = {
        f"sample {export} --prompt x": "loading torch and transformers ...",
        f"report {run} --out {run}/report.html --no-png": "loading what ",
        f"convert from-hf {export} {tmp_path}/out": "loading torch ...",
        f"eval {export}": "loading torch and transformers ...",
    }
    for part, (line, words) in zip(commands(*lines), lines.items(), strict=True):
        assert words in part and ("error: " in part or line.startswith("report")), (line, part)


def test_a_wrong_path_is_named_before_torch_is_loaded(tmp_path: Path) -> None:
    """Loading takes seconds, minutes on a busy machine, and what the user typed needs none of it."""
    none = tmp_path / "none"
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    lines = {
        f"report {none}": f"there is no folder {none}",
        f"report {tmp_path}/run": "is no run folder",
        f"eval {none}": f"there is no folder {none}",
        f"eval {tmp_path}": "holds no committed checkpoint",
        f"eval {tmp_path}/run@7": "has no checkpoint of step 7",
        f"eval {tmp_path}/run --data {none}": "or correct --data",
        f"sample {none} --prompt x": f"there is no folder {none}",
        f"convert to-hf {tmp_path}/run {tmp_path}/out": "step_00000001",
        f"sample {tmp_path}/run --prompt x": "step_00000001",
        f"convert to-hf {none} {tmp_path}/out": f"there is no folder {none}",
        f"convert to-hf {tmp_path}/run {tmp_path}/out --data {none}": "or correct --data",
        f"convert from-hf {none} {tmp_path}/new": f"{none}/config.json is missing",
        f"convert to-lm-eval {none} {tmp_path}/new": f"{none}/config.json is missing",
        f"train configs/quickstart.yaml parallel.ep=1 data.path={none}": "or correct data.path",
    }
    loaded = "\nprint('torch' in sys.modules, file=sys.stderr)"
    parts = commands(*lines, then=loaded)
    for part, (line, words) in zip(parts, lines.items(), strict=True):
        assert words in part and "error: " in part and "loading" not in part, (line, part)
    assert parts[-1].split()[-1] == "False"


def test_a_routing_that_a_run_does_not_support_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    """Of a checkpoint with a configuration and without weights; nothing is written."""
    settings = ["run.name=bare", f"run.dir={tmp_path}", "parallel.ep=1"]
    config = load(ROOT / "configs/quickstart.yaml", settings)
    joint = load(ROOT / "configs/quickstart.yaml", [*settings, "model.auxiliary.mode=joint"])
    dense = load(
        ROOT / "configs/quickstart.yaml",
        [*settings, "model.kind=dense", "model.experts.counts={}", "model.experts.threshold_decay=0"],
    )
    for name, one in {"bare": config, "joint": joint, "dense": dense}.items():
        step = tmp_path / name / "checkpoints" / "step_00000001"
        step.mkdir(parents=True)
        info = {"step": 1, "config": one.model_dump(mode="json"), "shape": shape_of(one)}
        (step / INFO).write_text(info_text(info))
        (tmp_path / name / "config.yaml").write_text(dump(one))
    bare, out = tmp_path / "bare", tmp_path / "out"
    refused = {
        f"convert to-hf {bare} {out}": "has no auxiliary routers",
        f"convert to-hf {bare} {out} --routing top1": "has no auxiliary routers",
        f"eval {bare} --routing causal": "there are no auxiliary routers for step 1",
        f"sample {bare} --prompt x --routing causal": "has no auxiliary routers",
        f"sample {bare} --prompt x --image {ROOT}/configs/quickstart.yaml": "--image: not with batch routing",
        f"sample {bare} --prompt x --guidance 2 --nproc 2": "--guidance: not with batch routing",
        f"eval {bare}": "there is no folder data/digits",
        f"eval {bare} --neighbours 1000": "--neighbours 1000 is out of range",
        f"sample {tmp_path}/dense --prompt x --chat": "has no tokens for messages",
        f"sample {tmp_path}/dense --prompt x --begin audio": "this model was trained without audio",
        f"convert to-hf {tmp_path}/joint {out}": "there is no folder data/digits",
        f"convert to-hf {tmp_path}/dense {out}": "there is no folder data/digits",
        f"convert to-hf {tmp_path}/joint {tmp_path}": f"{tmp_path} exists already",
    }
    parts = commands(*refused, then="\nprint('torch' in sys.modules, file=sys.stderr)", folder=tmp_path)
    for part, (line, words) in zip(parts, refused.items(), strict=True):
        assert words in part and "error: " in part and "loading" not in part, (line, part)
    assert parts[-1].split()[-1] == "False" and not out.exists()
