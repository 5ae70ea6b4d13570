# What commands refuse by names, options and small files: cause, remedy, exit status, and no torch. In one new process.
"""Tests that refusals come before torch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import INFO, Store, info_text
from mmscale.checkpoint.shape import shape_of
from mmscale.config import Config
from mmscale.config.load import dump
from mmscale.data.prepared.prepare import prepare
from tests.unit.data.samples import config, image, save_picture, text, write_jsonl

LOADING = """
import contextlib, io, json, shlex, sys
from mmscale.cli import main
found = []
for line in json.loads(sys.argv[1]):
    before, said = "torch" in sys.modules, io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(shlex.split(line))
    found.append([line, said.getvalue(), status, not before and "torch" in sys.modules])
print("\\n" + json.dumps(found))
"""


class Row(NamedTuple):
    """A command in the folder of `place`, with parts of the cause and of the remedy that it must print."""

    command: str
    cause: str
    remedy: str
    status: int


FOLDER = "name a run folder"
# Commands that read a checkpoint; {} is its name.
READERS = {
    "eval {}": ("there is no folder", "name a folder run.dir/run.name"),
    "sample {} --prompt x": ("there is no folder", "name a folder run.dir/run.name"),
    "convert to-hf {} out": ("there is no folder", "name a folder run.dir/run.name"),
    "ckpt show {}": ("does not exist", FOLDER),
    "ckpt show {} --tensor embedding": ("does not exist", FOLDER),
    "ckpt diff {} run": ("does not exist", FOLDER),
    "ckpt diff run {}": ("does not exist", FOLDER),
    "ckpt archive {} out": ("does not exist", FOLDER),
    "ckpt reshard {} out": ("does not exist", FOLDER),
    "ckpt average run {} out": ("does not exist", FOLDER),
    "ckpt fuse run {} out": ("does not exist", FOLDER),
    "ckpt upcycle {} out --experts text=2,image=2": ("does not exist", FOLDER),
    "data score set --by perplexity:{} --routing batch": ("there is no folder", "name a run folder: run.dir/run.name"),
}
# Files and names of tasks that are refused, of runs and exports.
QUESTIONS = [
    ("eval run --task none.jsonl", "none.jsonl cannot be read", "name another file", 3),
    ("eval run --task broken.jsonl", "broken.jsonl:2: not JSON", "a question is a document", 3),
    ("eval run --task array.jsonl", "array.jsonl:1: the line is no object", "a question is a document", 3),
    ("eval run --task typo.jsonl", "did you mean 'choices'?", "a question is a document", 3),
    ("eval run --task beyond.jsonl", "answer is 2, no number from 0 to 1", "a question is a document", 3),
    ("eval run --task unanswered.jsonl", "answer is no text", "a question is a document", 3),
    ("eval run --task picture.jsonl", "image gone.png is missing", "a question is a document", 3),
    ("eval run --task mixed.jsonl", "mixes questions with choices", "make two files", 3),
    ("eval run --task empty.jsonl", "holds no questions", "a question is a document", 3),
    ("eval run --task a=good.jsonl --task a=mixed.jsonl", "two tasks are named a", "--task NAME=FILE", 2),
    ("eval run --task which", "there is no task 'which'", "asked without --task", 2),
]
ROWS = [
    *(Row(command.format("none"), cause, remedy, 4) for command, (cause, remedy) in READERS.items()),
    *(Row(command.format("run@7"), "has no checkpoint of step 7", "choose one of 1", 4) for command in READERS),
    *(Row(command.format("run@x"), "'x' after the @ is not a step", "write a number", 2) for command in READERS),
    # questions
    *(
        Row(command.replace("run", name, 1), cause, remedy, status)
        for name in ("run", "export")
        for command, cause, remedy, status in QUESTIONS
    ),
    # neighbours
    Row("eval run --neighbours 2", "set has no neighbours", "mmscale data retrieve set", 3),
    Row("eval run --neighbours 1000", "--neighbours 1000 is out of range", "a number from 0", 2),
    Row("eval run --neighbours two", "'two' is no number", "or random", 2),
    Row("eval run --data set --neighbours 2", "set has no neighbours", "mmscale data retrieve set", 3),
    Row("data retrieve none", "there is no folder none", "mmscale data prepare", 3),
    Row("data retrieve set --embeddings none.npy", "none.npy cannot be read", ".npy file of numbers", 3),
    Row("data retrieve set --embeddings few.npy", "has the shape (2, 3)", "one row for each document", 3),
    Row("data retrieve set --held-out-embeddings few.npy", "needs --embeddings", "of the training documents too", 2),
    # checkpoints of other models, and folders that are taken
    Row("ckpt average run out", "needs two checkpoints", "RUN@100 RUN@200", 2),
    Row("ckpt average run again out --ema 2", "--ema 2 is no decay", "between 0 and 1", 2),
    Row("ckpt average run wide out", "hold different models: model.hidden_size", "of one model", 4),
    Row("ckpt average run again wide", "wide has checkpoints already", "name a new run folder", 4),
    Row("ckpt average run cut out", "is damaged: weights is missing", "choose another checkpoint", 4),
    Row("ckpt show cut --tensor x", "is damaged: weights is missing", "choose another checkpoint", 4),
    Row("ckpt reshard run wide", "wide has checkpoints already", "name a new run folder", 4),
    Row("ckpt archive run wide", "wide exists", "", 4),
    Row("ckpt restore none out", "none does not exist", "mmscale ckpt archive", 4),
    Row("ckpt restore run out", "run is no archive", "mmscale ckpt archive", 4),
    Row("ckpt fuse run again out", "only plain dense models can be fused", "then makes experts", 4),
    Row("ckpt fuse run run out", "both models are run", "a text model and an image model", 2),
    Row("ckpt fuse run wide out", "hold different models", "fuse models of one configuration", 4),
    Row("ckpt upcycle run out", "there is nothing to do", "--experts text=4,image=4", 2),
    Row("ckpt upcycle run out --experts text=2", "--experts names text", "name text=N, image=N", 2),
    Row("ckpt upcycle run wide --experts text=2,image=2", "wide has checkpoints already", "a new run folder", 4),
    Row("ckpt upcycle run out --untie mlp", "'mlp' is no part", "attention", 2),
    Row("ckpt show run --slice 0", "--slice needs a tensor", "--tensor NAME", 2),
    # routings
    Row("convert to-hf run out", "has no auxiliary routers", "mmscale train run/config.yaml --stage auxiliary", 4),
    *(
        Row(f"{command} --routing threshold", "no averaged cut-offs", "model.experts.threshold_decay=0.99", 4)
        for command in ("convert to-hf run out", "sample run --prompt x")
    ),
    Row("eval run --routing threshold", "kept no averages", "model.experts.threshold_decay=0.99", 2),
    # scores
    Row("data score none --by perplexity:run", "there is no folder none", "mmscale data prepare", 3),
    Row("data score set --by perplexity:run --name tokens", "'tokens' cannot be the name", "another --name", 2),
    Row("data score set --by perplexity:run --heads 0.1", "masks no heads", "leave --heads out", 2),
    Row("data score set --by perplexity:run --routing up", "'up' is not a routing", "choose one of", 2),
    Row("data score other --by perplexity:run", "other", "vocab", 3),
    Row("data score set --by perplexity:run", "there are no auxiliary routers", "--stage auxiliary", 2),
    Row("data score set --by guess", "there is no scorer 'guess'", "--by rules", 2),
]


def write_run(run: Path, settings: Config) -> None:
    """A run with a committed checkpoint of step 1, whose only tensor file is empty."""
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": ".", "name": run.name})})
    run.mkdir()
    store = Store.of_run(run)
    info: dict[str, Any] = {"step": 1, "config": settings.model_dump(mode="json"), "shape": shape_of(settings)}
    folder = store.begin(1, 1)
    (folder / INFO).write_text(info_text(info))
    (folder / "weights").write_bytes(b"0")
    files = integrity.digests(folder, integrity.sizes(folder))
    store.commit(integrity.CheckpointManifest(1, 1, "", "", {}, files))
    (run / "config.yaml").write_text(dump(settings))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets, runs, and files of questions."""
    folder = tmp_path_factory.mktemp("refusals")
    save_picture(folder / "1.png", 1)
    records = [{"content": [text(f"number {one}"), image("1.png")]} for one in range(8)]
    documents = [str(write_jsonl(folder / "documents.jsonl", records))]
    for name, vocab in (("set", {"text": 300, "image": 16}), ("other", {"text": 310, "image": 16})):
        prepare(config(vocab=vocab, documents=documents), folder / name, progress=False)
    plain = config()
    data = plain.data.model_copy(update={"path": "set"})
    plain = plain.model_copy(update={"data": data, "train": plain.train.model_copy(update={"eval_batches": 1})})
    for name in ("run", "again"):
        write_run(folder / name, plain)
    write_run(folder / "cut", plain)
    (folder / "cut/checkpoints/step_00000001/weights").unlink()
    (folder / "export").mkdir()
    (folder / "export/config.json").write_text("{}")
    wide = plain.model.model_copy(update={"hidden_size": 128})
    write_run(folder / "wide", plain.model_copy(update={"model": wide}))
    np.save(folder / "few.npy", np.zeros((2, 3), np.float32))
    question = {"content": [image("1.png"), text("this is")], "choices": [" a", " b"], "answer": 1}
    alone = {"content": [text("this is")], "answer": " a"}
    for name, lines in {
        "good": [question],
        "broken": [question, "{"],
        "array": ["[]"],
        "typo": [{"content": [text("this is")], "choises": [" a"], "answer": " a"}],
        "beyond": [question | {"answer": 2}],
        "unanswered": [{"content": [text("this is")]}],
        "picture": [question | {"content": [image("gone.png"), text("this is")]}],
        "mixed": [question, alone],
        "empty": [""],
    }.items():
        write_jsonl(folder / f"{name}.jsonl", lines)
    return folder


@pytest.fixture(scope="module")
def said(place: Path) -> dict[str, tuple[str, int, bool]]:
    """What each command printed to stderr, its exit status, and whether it loaded torch."""
    before = sorted(place.rglob("*"))
    command = [sys.executable, "-c", LOADING, json.dumps([row.command for row in ROWS])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=place)
    assert ended.returncode == 0, ended.stderr
    assert sorted(place.rglob("*")) == before  # nothing half-written
    rows = json.loads(ended.stdout.splitlines()[-1])
    return {line: (err, status, loaded) for line, err, status, loaded in rows}


@pytest.mark.parametrize("row", ROWS, ids=[row.command for row in ROWS])
def test_refused_before_torch_is_loaded(said: dict[str, tuple[str, int, bool]], row: Row) -> None:
    err, status, loaded = said[row.command]
    lines = err.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["error", "fix"], err
    assert row.cause in lines[0] and row.remedy in lines[1], err
    assert status == row.status, err
    assert not loaded
