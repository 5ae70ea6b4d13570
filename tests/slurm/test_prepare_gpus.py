"""`mmscale data prepare --cluster --gpus`: a task that is requeued, as after a preemption, asks for its GPU again.

Nodes of the local cluster have devices that SLURM counts as GPUs. A stand-in answers for torch's, on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import scheduler
from slurm.local.cluster import Cluster
from tests.slurm.jobs import DEADLINE_S, POLL_S, ROOT
from tests.unit.data.modalities.test_image_tokens import save_model
from tests.unit.data.samples import corpus, files_of

pytestmark = pytest.mark.exhaustive  # a minute, most of it waiting; test_prepare_array.py kills a task without a GPU

SPEC = """
vocab: {{modalities: [{{name: text, size: 300}}, {{name: image, size: 64}}]}}
model: {{kind: dense, num_layers: 1, hidden_size: 64, ffn_hidden_size: 64, num_attention_heads: 1}}
data:
  prepare:
    image: {{kind: vq, path: {model}, size: 16, channels: 3}}
    part_documents: 6
    workers: 1
    documents: [{documents}]
"""
# Loaded by every Python of a job. A line of `starts` for each task that takes a GPU. The first start of task 0 waits
# before it makes a second part, so that it can be cut off however fast tasks begin and compute.
STAND_IN = """
import os
if "SLURM_JOB_ID" in os.environ:
    import time
    from pathlib import Path
    import torch
    from mmscale.data.modalities.image_vq import VQTokenizer
    from mmscale.runtime import device

    def numbered(number):
        with open({starts!r}, "a") as file:
            known = dict(SLURM_ARRAY_TASK_ID="last", SLURM_RESTART_COUNT="0", SLURM_GPUS_ON_NODE="none")
            file.write(" ".join(os.environ.get(name, default) for name, default in known.items()) + chr(10))
        return torch.device("cpu")

    device.numbered, device.count = numbered, lambda: int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    encode = VQTokenizer.encode

    def waiting(self, images):
        start = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        while start == ("0", "0") and any(Path({out!r}).glob("**/done/*.json")):
            time.sleep(1.0)
        return encode(self, images)

    VQTokenizer.encode = waiting
"""


def until(condition: Callable[[], bool], report: Callable[[], str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, report()
        time.sleep(POLL_S)


def mmscale(*arguments: str, path: Path | None = None) -> str:
    environ = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    command = [sys.executable, "-m", "mmscale", *arguments, "--json"]
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_preempted_task_asks_for_its_gpu_again(cluster: Cluster, tmp_path: Path) -> None:
    if "gpu" not in cluster.run("sinfo", "-h", "-o", "%G"):
        pytest.skip("the nodes of this cluster have no devices that stand for GPUs")
    starts, spec, out, profile = (tmp_path / name for name in ("starts", "spec.yaml", "array", "profile.yaml"))
    (tmp_path / "path").mkdir()
    (tmp_path / "path/sitecustomize.py").write_text(STAND_IN.format(starts=str(starts), out=str(out)))
    model, documents = save_model("JanusVQVAE", tmp_path / "model"), corpus(tmp_path / "in", 48)
    spec.write_text(SPEC.format(model=model, documents=documents))
    profile.write_text("partition: main\ntasks_per_node: 1\ngpus_per_node: 2\ntime: 30m\n")
    ended = mmscale(
        *("data", "prepare", str(spec), "--out", str(out), "--tasks", "2", "--gpus", "1"),
        *("--cluster", str(profile)),
        path=tmp_path / "path",
    )
    submitted = json.loads(ended)
    array = submitted["jobs"].split(", ")[0].partition("_")[0]

    def report() -> str:
        logs = "\n".join(log.read_text() for log in (out / "jobs").glob("*.out"))
        return f"{cluster.run('squeue')}\n{cluster.run('scontrol', 'show', 'job')}\n{logs}"

    def taken() -> list[str]:
        return starts.read_text().splitlines() if starts.exists() else []

    def finished() -> list[Path]:
        return list(out.glob("**/done/*.json"))

    until(lambda: "0 0 1" in taken() and len(finished()) >= 1, report)
    cluster.run("scontrol", "requeue", f"{array}_0")  # as SLURM does after the grace time of a preemption

    def made() -> bool:
        if (state := scheduler.job_state(f"{array}_0")) is not None:
            scheduler.lift_wait(f"{array}_0", state)
        return (out / "manifest.json").is_file()

    until(made, report)
    # Task, start and GPUs of each process that took one; neither the job for what tasks leave nor the last one.
    assert sorted(taken()) == ["0 0 1", "0 1 1", "1 0 1"], report()
    assert len(submitted["jobs"].split(", ")) == 2 + 1 + 1
    (log,) = (out / "jobs").glob(f"{array}_0_*_log.out")
    assert log.read_text().count("Job completed successfully") == 1, "its first start was not cut off"
    mmscale("data", "prepare", str(spec), "--out", str(tmp_path / "one"))
    left_out = ("plan", "jobs", ".cache")
    array_files, one_files = (
        {name: data for name, data in files_of(folder).items() if not name.startswith(left_out)}
        for folder in (out, tmp_path / "one")
    )
    assert array_files == one_files
