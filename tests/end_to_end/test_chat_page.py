# docs/chat.md: the commands of its first block run as they are printed, in their order, with a tiny configuration.
"""The page about conversations, walked."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

import checkpoints_tools.huggingface.evaluate_export  # noqa: F401  what forked commands would import one by one
from tests.end_to_end.running import ROOT, mmscale

PAGE = ROOT / "docs/chat.md"
SETTINGS: dict[str, Any] = {
    "run": {"name": "own"},
    "vocab": {"modalities": [{"name": "text", "size": 384}, {"name": "image", "size": 16}], "pad_multiple": 64},
    "data": {
        "path": "data/own",
        "prepare": {
            "source": "documents",
            "documents": ["documents.jsonl"],
            "held_out": 0.2,
            "image": {"kind": "kmeans", "size": 8, "channels": 1, "patch": 4},
        },
    },
    "model": {
        "kind": "moma",
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "seq_length": 64,
        "experts": {"counts": {"text": 2, "image": 2}},
    },
    "train": {"steps": 4, "micro_batch_size": 2, "global_batch_size": 4},
    "optim": {"warmup": 1},
    "precision": {"dtype": "fp32"},
    "auxiliary": {"steps": 4, "calibration_batches": 1, "optim": {"warmup": 1}},
    "sft": {"steps": 4, "optim": {"warmup": 1}},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents and conversations about pictures, and the picture of the page."""
    rng = np.random.default_rng(0)
    documents, chats = [], []
    (tmp_path / "img").mkdir()
    for number in range(240):
        name = f"img/{number}.png"
        PIL.Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(tmp_path / name)
        image, words = {"type": "image", "path": name}, f"number {number % 10}"
        documents.append({"id": name, "content": [image, {"type": "text", "text": words}]})
        asked = [image, {"type": "text", "text": "Which digit is this?"}]
        chats.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": words}]})
    for file, records in (("documents", documents), ("chat", chats)):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "7.png").write_bytes((tmp_path / "img/7.png").read_bytes())
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/own.yaml").write_text(yaml.safe_dump(SETTINGS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.long
def test_every_command_of_the_block(place: Path) -> None:
    block = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)[0]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(commands) == 7 and all(words[0] == "mmscale" for words in commands)
    for words in commands:
        ended = mmscale(*words[1:], timeout_s=600)
        assert ended.status == 0, (words, ended)
    assert "<assistant>" in (place / "out/chat_template.jinja").read_text()
