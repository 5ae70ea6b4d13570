# docs/data_sources.md: sources that need no JSONL are prepared by the command and trained on.
"""Training on a Megatron corpus beside a folder of Hugging Face datasets, and on a bucket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import mmscale, undocumented
from tests.unit.data.prepared.test_megatron import corpus
from tests.unit.data.samples import corpus as documents

SETTINGS: dict[str, Any] = {
    "run": {"name": "tiny"},
    "vocab": {"modalities": [{"name": "text", "size": 320}, {"name": "image", "size": 16}], "pad_multiple": 16},
    "model": {
        "kind": "moma",
        "num_layers": 1,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "seq_length": 128,
        "experts": {"counts": {"text": 2, "image": 2}},
    },
    "train": {"steps": 2, "micro_batch_size": 2, "global_batch_size": 4, "eval_every": 2, "eval_batches": 1},
    "optim": {"warmup": 1},
    "precision": {"dtype": "fp32"},
    "checkpoint": {"asynchronous": False},
    "log": {"every": 1},
}
PREPARE = {"image": {"kind": "levels", "size": 4, "channels": 1}, "held_out": 0.2, "workers": 1}


def prepared(folder: Path, name: str, **prepare: Any) -> Path:
    """A data set made by the command."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | {"data": {"prepare": PREPARE | {"max_document_tokens": 128} | prepare}}))
    ended = mmscale("data", "prepare", file, "--out", folder / name)
    assert ended.status == 0, ended
    return folder / name


def trained(folder: Path, *sets: Path) -> list[dict[str, Any]]:
    blend = [{"path": str(one), "weight": 1.0} for one in sets]
    (folder / "train.yaml").write_text(yaml.safe_dump(SETTINGS | {"data": {"blend": blend}}))
    ended = mmscale("train", folder / "train.yaml", f"run.dir={folder / 'runs'}")
    assert ended.status == 0, ended
    return read_metrics(folder / "runs/tiny")


def test_a_corpus_and_a_folder_of_hugging_face_train_together(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    idx = corpus(tmp_path / "corpus")
    load = {"text": {"load": str(idx.parent / "tokenizer.json")}}
    text_only = prepared(tmp_path, "corpus_set", source="megatron", documents=[str(idx)], **load)
    documents(tmp_path / "in", 40)
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [str(tmp_path / f"in/img/{n % 7}.png") for n in range(40)], "caption": ["a seven"] * 40}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "hf")
    pictures = prepared(tmp_path, "hf_set", documents=[str(tmp_path / "hf")], columns=["image", "caption"], **load)
    steps = trained(tmp_path, text_only, pictures)
    assert [row["step"] for row in steps] == [1, 2] and not undocumented(steps)
    assert steps[-1]["loss/image"] > 0 and steps[-1]["loss/text"] > 0
    assert "eval/source/hf_set/bits_per_byte/text" in steps[-1]
    assert "eval/source/corpus_set/loss/text" in steps[-1]
    assert "eval/source/corpus_set/bits_per_byte/text" not in steps[-1]  # nobody counted a corpus's bytes
    ended = mmscale("data", "verify", text_only, "--json")
    assert ended.status == 0 and json.loads(ended.out)["damaged"] == {}


@pytest.mark.long
def test_a_bucket_trains(tmp_path: Path) -> None:
    """fsspec's local store stands for one; test_s3_documents.py has a server that speaks S3."""
    documents(tmp_path / "in", 40)
    url = f"local://{tmp_path}/in/*.jsonl"
    steps = trained(tmp_path, prepared(tmp_path, "bucket", documents=[url], text={"kind": "bytes"}))
    assert steps[-1]["eval/bits_per_byte/text"] > 0 and not undocumented(steps)
