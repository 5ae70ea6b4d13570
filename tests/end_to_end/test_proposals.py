"""`mmscale plan --data` for documents of one, two and three modalities: what it proposes prepares and trains."""

from __future__ import annotations

import itertools
import json
import shlex
import wave
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

from tests.end_to_end.running import mmscale

NUMBER = 80
SETS = {"text": (), "text and image": ("image",), "text, image and audio": ("image", "audio")}
SHORT = ("train.steps=2", "optim.warmup=1", "train.eval_every=2", "train.eval_batches=1")
MACHINES = {"cpu": (), "gpu": ("--gpu", "a100", "--gpus", "1")}


def item(kind: str, number: int, folder: Path) -> dict[str, Any]:
    """A picture, or a tone of a quarter of a second."""
    if kind == "image":
        file = f"{number}.png"
        PIL.Image.new("L", (16, 20), (number * 37) % 256).save(folder / file)
    else:
        file = f"{number}.wav"
        tone = np.sin(np.arange(2000) * (0.1 + number % 7 / 20)) * 20_000
        with wave.open(str(folder / file), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            sound.writeframes(tone.astype("<i2").tobytes())
    return {"type": kind, "path": file}


def documents(name: str, folder: Path) -> Path:
    """A file of documents in a folder whose name a shell would split."""
    folder.mkdir()
    lines = []
    for number in range(NUMBER):
        words = {"type": "text", "text": f"this is the text of document number {number}, which says {number % 7}"}
        content = [words, *(item(kind, number, folder) for kind in SETS[name])]
        lines.append(json.dumps({"id": str(number), "content": content}) + "\n")
    (folder / "documents.jsonl").write_text("".join(lines))
    return folder / "documents.jsonl"


ALWAYS = {("text", "gpu"): [], ("text, image and audio", "cpu"): [pytest.mark.long]}
ROWS = [
    pytest.param(name, machine, marks=ALWAYS.get((name, machine), [pytest.mark.exhaustive]), id=f"{name}-{machine}")
    for name, machine in itertools.product(SETS, MACHINES)
]


@pytest.mark.parametrize(("name", "machine"), ROWS)
def test_a_proposal_trains(name: str, machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From documents, and from the data set that they were prepared to; the file says how to make it again."""
    monkeypatch.chdir(tmp_path)
    command = [
        "plan",
        "--data",
        str(documents(name, tmp_path / "some documents")),
        "--budget",
        "2m",
        *MACHINES[machine],
        "--out",
        "mine.yaml",
    ]
    planned = mmscale(*command, "--json")
    assert planned.status == 0, planned
    spec = tmp_path / "mine.yaml"
    assert spec.read_text().splitlines()[0] == f"# Proposed by: {shlex.join(['mmscale', *command])}"
    prepared = mmscale("data", "prepare", spec, "--out", "data/mine", "--json")
    assert prepared.status == 0, prepared
    again = mmscale(*command[:2], "data/mine", *command[3:-1], "again.yaml", "--json")
    assert again.status == 0, again
    first, second = (yaml.safe_load(file.read_text()) for file in (spec, tmp_path / "again.yaml"))
    assert first["vocab"]["modalities"] == second["vocab"]["modalities"]
    kinds = [one["name"] for one in first["vocab"]["modalities"]]
    assert first["model"]["kind"] == second["model"]["kind"] == ("moma" if len(kinds) > 1 else "dense")
    assert set(first["model"].get("experts", {}).get("counts", kinds)) == set(kinds)
    ranks = json.loads(planned.out)["ranks"]
    ended = mmscale("train", "again.yaml" if machine == "gpu" else spec, *SHORT, nproc=ranks)
    assert ended.status == 0, ended
    lines = (tmp_path / "runs" / ("again" if machine == "gpu" else "mine") / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 2
    assert {f"eval/loss/{kind}" for kind in kinds} <= set().union(*map(json.loads, lines))
