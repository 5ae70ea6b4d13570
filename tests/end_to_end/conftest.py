"""Fixtures of the end-to-end tests: one tiny data set, prepared once, models exported once, runs to be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.digits import named
from tests.end_to_end import isolated
from tests.end_to_end.going_on import CELLS, SUBJECTS, Course
from tests.end_to_end.running import mmscale

STEPS = 60
SETTINGS: dict[str, dict[str, Any]] = {
    "run": {"name": "tiny"},
    "vocab": {"modalities": [{"name": "text", "size": 384}, {"name": "image", "size": 128}], "pad_multiple": 64},
    "data": {"prepare": {"image": {"size": 8, "channels": 1, "patch": 4, "fit_patches": 2000}}},
    "model": {
        "kind": "moma",
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "seq_length": 64,
        "experts": {"counts": {"text": 2, "image": 2}},
        "depth": {"every": 2, "capacity": 0.5, "multiple": 8},
    },
    "train": {"steps": STEPS, "micro_batch_size": 2, "global_batch_size": 4, "eval_every": 30, "eval_batches": 2},
    "optim": {"lr": 3e-3, "warmup": 5, "schedule": "cosine"},
    "parallel": {"ep": 2},
    "precision": {"dtype": "fp32"},
    "checkpoint": {"every": 10, "keep": 9},
    "log": {"every": 1},
}


@pytest.fixture(scope="session", autouse=True)
def _isolated() -> Iterator[None]:
    yield
    isolated.stop()


@pytest.fixture(scope="session")
def tiny(digits_documents: Path) -> dict[str, dict[str, Any]]:
    """SETTINGS with the documents to prepare."""
    return {**SETTINGS, "data": {"prepare": {**SETTINGS["data"]["prepare"], **named(digits_documents)}}}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any]) -> Path:
    """A tiny data set of handwritten digits, made by `mmscale data prepare`."""
    folder = tmp_path_factory.mktemp("digits")
    spec = folder / "spec.yaml"
    spec.write_text(yaml.safe_dump(tiny))
    ended = mmscale("data", "prepare", spec, "--out", folder / "set", "--json")
    assert ended.status == 0, ended
    return folder / "set"


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, digits: Path, tiny: dict[str, Any]) -> Path:
    """A configuration that trains on it in milliseconds a step; tests give `run.dir` themselves."""
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump({**tiny, "data": {**tiny["data"], "path": str(digits)}}))
    return file


@pytest.fixture(scope="session")
def exported(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 30 steps, to be read only: `dense`; `tiny` with routers; `bare` without; `tiny-hf`, `dense-hf`."""
    folder = tmp_path_factory.mktemp("exported")
    train = ("train", config, f"run.dir={folder}", "train.steps=30", "checkpoint.every=0", "parallel.ep=1")
    train = (*train, "checkpoint.asynchronous=false", "train.eval_every=0")
    dense = ("run.name=dense", "model.kind=dense", "model.depth=null", "model.experts.counts={}")
    stage = ("--stage", "auxiliary", "auxiliary.steps=12", "auxiliary.optim.lr=1e-2", "auxiliary.calibration_batches=2")
    for arguments in ((*train, *dense), train):
        ended = mmscale(*arguments)
        assert ended.status == 0, ended
    shutil.copytree(folder / "tiny", folder / "bare")
    to_hf = [("convert", "to-hf", folder / name, folder / f"{name}-hf") for name in ("tiny", "dense")]
    for arguments in ((*train, *stage), *to_hf):
        ended = mmscale(*arguments, timeout_s=400)  # the gate generates in every routing
        assert ended.status == 0, ended
    return folder


@pytest.fixture(scope="module")
def places(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    for name in ("moved", "other"):
        shutil.copytree(digits, folder / name)
    manifest = folder / "other" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"source": "other documents"}))
    return {"DIGITS": str(digits), "DATA": str(folder / "moved"), "OTHER": str(folder / "other")}


@pytest.fixture
def course(config: Path, exported: Path, places: dict[str, str]) -> Callable[[str, str], Course]:
    def of(subject: str, name: str) -> Course:
        return Course(config, exported, places, SUBJECTS[subject], CELLS[name], subject == "stage")

    return of
