# mmscale/data/stream/bits.py and what `data prepare` counts for it: nats of a text per byte, whatever the tokenizer.
"""Tests of bits per byte."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mmscale.config import Config
from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.prepare import prepare
from mmscale.data.stream.bits import bits_per_byte
from mmscale.data.stream.passes import open_passes
from mmscale.data.vocab import Vocabulary
from mmscale.report.charts import _Builder
from tests.unit.data.samples import config, text, write_jsonl

TEXTS = [f"draw the picture of number {n}, für Ä {n}" for n in range(12)]
SIZE = sum(len(one.encode()) for one in TEXTS)
NATS = 100.0  # that a model pays for all of these texts


def passed(folder: Path, records: list[Any], **settings: Any) -> tuple[Any, int]:
    """One pass over documents that are all held out, and their labels."""
    file = write_jsonl(folder / "d.jsonl", records)
    made: Config = config(vocab={"text": 300, "image": 16}, documents=[str(file)], held_out=1.0, **settings)
    manifest = prepare(made, folder / "out", progress=False)
    data = made.data.model_copy(update={"path": str(folder / "out"), "cache": str(folder / "cache")})
    made = made.model_copy(update={"data": data})
    found = open_passes(made, vocabulary=Vocabulary.from_config(made.vocab))[""]
    held_out = manifest.splits["validation"]
    return found, held_out.tokens("text") - held_out.documents


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_it_is_the_same_for_every_tokenizer(tmp_path: Path, kind: str) -> None:
    data, labels = passed(tmp_path, [{"content": [text(one)]} for one in TEXTS], text={"kind": kind})
    if kind == "bytes":
        assert labels == SIZE + len(TEXTS)  # and `</s>` of each
        assert open_text_tokenizer(tmp_path / "out").decode([5 + 2, 5 + 255]) != ""
    found = bits_per_byte({"loss": 9.0, "loss/text": NATS / labels}, data, text="text")
    assert found == {"bits_per_byte/text": pytest.approx(NATS / math.log(2) / SIZE)}


def test_what_is_not_trained_on_does_not_count(tmp_path: Path) -> None:
    silent = [{"content": [text("much more text than that " * 9)], "loss": "image"}]
    data, _ = passed(tmp_path, [{"content": [text(one)]} for one in TEXTS] + silent, text={"kind": "bytes"})
    labels = SIZE + len(TEXTS)
    (found,) = bits_per_byte({"loss/text": NATS / labels}, data, text="text").values()
    assert found == pytest.approx(NATS / math.log(2) / SIZE)


def test_nothing_is_said_where_bytes_are_not_known(tmp_path: Path) -> None:
    tokens = {"content": [{"type": "tokens", "modality": "text", "ids": [7, 8]}]}
    data, _ = passed(tmp_path, [{"content": [text("x")]}, tokens])
    assert bits_per_byte({"loss/text": 1.0}, data, text="text") == {}
    assert bits_per_byte({"loss/image": 1.0}, data, text="text") == {}


def test_every_byte_is_a_token_of_its_own(tmp_path: Path) -> None:
    passed(tmp_path, [{"content": [text("a\0é\U0001f600")]}], text={"kind": "bytes"})
    tokenizer = open_text_tokenizer(tmp_path / "out")
    ids = tokenizer.encode("a\0é\U0001f600")
    assert len(ids) == 1 + 1 + 2 + 4 and tokenizer.vocab_size == 5 + 256
    assert tokenizer.decode(ids) == "a\0é\U0001f600"


def test_a_chart_of_the_report(tmp_path: Path) -> None:
    class Columns:
        routes = True
        columns = ("loss/text", "eval/bits_per_byte/text", "eval/validation/web/causal/bits_per_byte/text")

    (chart,) = _Builder(["run"], [Columns()])._bits()  # type: ignore[list-item]
    assert [line.key for line in chart.lines] == list(Columns.columns[1:])
    assert not _Builder(["run"], [type("None_", (), {"columns": ("loss",)})()])._bits()
