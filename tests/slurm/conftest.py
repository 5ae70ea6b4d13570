"""Fixtures of the SLURM tests: one cluster of three nodes and one tiny data set for all of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurm.local.cluster import Cluster, missing_programs
from tests.digits import named
from tests.slurm.jobs import DEADLINE_S, PROFILE, ROOT, Jobs

STEPS = 60
SETTINGS: dict[str, Any] = {
    "run": {"name": "tiny"},
    "vocab": {"modalities": [{"name": "text", "size": 384}, {"name": "image", "size": 128}], "pad_multiple": 64},
    "data": {"prepare": {"image": {"size": 8, "channels": 1, "patch": 4, "fit_patches": 2000}}},
    "model": {
        "kind": "moma",
        "num_layers": 1,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "seq_length": 64,
        "experts": {"counts": {"text": 2, "image": 2}},
    },
    "train": {"steps": STEPS, "micro_batch_size": 2, "global_batch_size": 4, "dry_run": False},
    "optim": {"lr": 3e-3},
    "precision": {"dtype": "fp32"},
    "checkpoint": {"every": 10, "keep": 9, "asynchronous": False},
    "log": {"every": 1},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; skips if SLURM is not installed."""
    lacking = missing_programs()
    if lacking:
        pytest.skip(f"no {', '.join(lacking)}: apt-get install slurmctld slurmd slurm-client munge")
    cluster = Cluster.up(tmp_path_factory.mktemp("slurm") / "cluster", nodes=3)
    before = dict(os.environ)
    os.environ.update(cluster.environment())
    try:
        yield cluster
    finally:
        os.environ.clear()
        os.environ.update(before)
        cluster.down()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, digits_documents: Path) -> Path:
    """A configuration that trains in milliseconds a step on a separate data set."""
    folder = tmp_path_factory.mktemp("data")
    file = folder / "tiny.yaml"
    data = {"prepare": {**SETTINGS["data"]["prepare"], **named(digits_documents)}}
    file.write_text(yaml.safe_dump({**SETTINGS, "data": data}))
    command = [sys.executable, "-m", "mmscale", "data", "prepare", str(file), "--out", str(folder / "set"), "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    file.write_text(yaml.safe_dump({**SETTINGS, "data": {**data, "path": str(folder / "set")}}))
    return file


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The profile of the local cluster, with a cordon file of this session's."""
    folder = tmp_path_factory.mktemp("profile")
    content = yaml.safe_load(PROFILE.read_text()) | {"cordon_file": str(folder / "cordoned.txt")}
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def jobs(cluster: Cluster, config: Path, profile: Path, tmp_path: Path) -> Iterator[Jobs]:
    """Launches runs below the test's folder, and ends those that are still alive."""
    jobs = Jobs(cluster, config, profile, tmp_path)
    yield jobs
    jobs.end_all()
    # Wait for the nodes too, which a job holds while it is being killed; the next test may need them.
    deadline = time.monotonic() + DEADLINE_S
    while cluster.run("squeue", "-h").strip():
        assert time.monotonic() < deadline, cluster.run("squeue")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of two uninterrupted ranks, without SLURM."""
    from mmscale.runs.metrics import read_metrics

    runs = tmp_path_factory.mktemp("reference")
    command = [sys.executable, "-m", "mmscale", "train", str(config), f"run.dir={runs}", "--nproc", "2"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return read_metrics(runs / "tiny")
