# `mmscale data prepare --cluster`: a job array makes the same data set as one process.
"""Tests of preparing data on SLURM."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.local.cluster import Cluster
from tests.slurm.jobs import DEADLINE_S, POLL_S, ROOT
from tests.unit.data.samples import corpus, files_of

pytestmark = pytest.mark.long

SPEC = """
vocab: {modalities: [{name: text, size: 300}, {name: image, size: 16}]}
model: {kind: dense, num_layers: 1, hidden_size: 64, ffn_hidden_size: 64, num_attention_heads: 1}
data:
  prepare: {image: {kind: levels, size: 4, channels: 1}, part_documents: 6, workers: 1, documents: [%s]}
"""


def mmscale(*arguments: str) -> str:
    command = [sys.executable, "-m", "mmscale", *arguments, "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("killed", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_an_array_makes_what_one_process_makes(cluster: Cluster, profile: Path, tmp_path: Path, killed: bool) -> None:
    spec, out = tmp_path / "spec.yaml", tmp_path / "array"
    spec.write_text(SPEC % corpus(tmp_path / "in", 60))
    ended = mmscale("data", "prepare", str(spec), "--out", str(out), "--cluster", str(profile), "--tasks", "4")
    submitted = json.loads(ended)
    assert (submitted["state"], submitted["parts"], submitted["tasks"]) == ("submitted", 10, 4)
    jobs = submitted["jobs"].split(", ")
    if killed:
        cluster.run("scancel", jobs[1])
    deadline = time.monotonic() + DEADLINE_S
    while not (out / "manifest.json").is_file():
        assert time.monotonic() < deadline, "\n".join(log.read_text() for log in (out / "jobs").glob("*.out"))
        time.sleep(POLL_S)
    (told,) = json.loads(mmscale("status", str(out)))
    assert (told["state"], told["done"], told["parts"]) == ("prepared", 10, 10) and told["jobs"] == jobs
    mmscale("data", "prepare", str(spec), "--out", str(tmp_path / "one"))
    array, one = (
        {name: data for name, data in files_of(folder).items() if not name.startswith(("plan", "jobs", ".cache"))}
        for folder in (out, tmp_path / "one")
    )
    assert array == one


@pytest.mark.parametrize("minhash", ["numpy", pytest.param("rensa", marks=pytest.mark.exhaustive)])
def test_an_array_finds_the_duplicates_of_one_process(
    cluster: Cluster, profile: Path, tmp_path: Path, minhash: str
) -> None:
    if minhash == "rensa":
        pytest.importorskip("rensa")
    spec, folder = tmp_path / "spec.yaml", tmp_path / "set"
    spec.write_text(SPEC % corpus(tmp_path / "in", 60))
    mmscale("data", "prepare", str(spec), "--out", str(folder), "--tasks", "2")
    shutil.copytree(folder, tmp_path / "one")
    mmscale("data", "dedup", str(tmp_path / "one"), "--minhash", minhash)
    ended = mmscale("data", "dedup", str(folder), "--minhash", minhash, "--cluster", str(profile), "--tasks", "2")
    submitted = json.loads(ended)
    assert submitted["state"] == "submitted" and len(submitted["jobs"].split(", ")) == 2 + 2 + 1
    deadline = time.monotonic() + DEADLINE_S
    while not (folder / "selection/selection.json").is_file():
        assert time.monotonic() < deadline, "\n".join(log.read_text() for log in Path(submitted["logs"]).glob("*.out"))
        time.sleep(POLL_S)
    array, one = (
        {file.name: file.read_bytes().replace(str(place).encode(), b"") for file in (place / "selection").iterdir()}
        for place in (folder, tmp_path / "one")
    )
    assert array == one
