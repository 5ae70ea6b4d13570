# Losses of one modality given another against a slow reference: each document alone in a sequence, token by token.
"""`mmscale eval`: `conditional_loss/text_given_image` and its kin, of a run, of its export, and along a run."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import checkpoints_tools.huggingface.evaluate_export  # noqa: F401  what forked commands would import one by one
from mmscale.data.prepared.manifest import HELD_OUT, parts_of, read_manifest
from mmscale.data.prepared.parts import read_document
from mmscale.data.stream.packed import pack_rows
from mmscale.inference.model import RunModel, open_run
from mmscale.runs.metrics import read_metrics
from mmscale.tables.routings import Routing
from tests.cards import card_rows
from tests.end_to_end.running import mmscale, ok

PAIRS = ("text_given_image", "image_given_text")
PART = "held-out split, first 2 of 30 batches"  # train.eval_batches of the fixture


def slow_losses(model: RunModel, data: Path, routing: Routing) -> dict[str, float]:
    """Mean losses of text after an image and of images after a text of the held-out documents."""
    specials, names = len(model.vocabulary.specials), model.vocabulary.names
    found: dict[str, list[float]] = defaultdict(list)
    for part in parts_of(data, read_manifest(data), HELD_OUT):
        for number in range(part.documents):
            ids = read_document(data, part, number)
            batch, _ = pack_rows([[ids]], vocabulary=model.vocabulary, seq_length=model.config.model.seq_length)
            log_p = model.logits(batch, routing)[0].double().log_softmax(dim=-1)
            seen: set[str] = set()
            for place, label in enumerate(ids[1:].tolist()):
                token = int(ids[place])
                if token >= specials:
                    seen.add(names[int(model.vocabulary.modality_of(ids[place : place + 1])[0])])
                if label < specials:
                    continue
                own = names[int(model.vocabulary.modality_of(ids[place + 1 : place + 2])[0])]
                for other in seen - {own}:
                    found[f"{own}_given_{other}"].append(-float(log_p[place, label]))
    return {pair: sum(values) / len(values) for pair, values in found.items()}


def conditional(numbers: dict[str, Any], prefix: str = "conditional_loss/") -> dict[str, float]:
    return {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    ("name", "routing"),
    [
        ("tiny", "causal"),
        *(pytest.param(*row, marks=pytest.mark.long) for row in (("tiny", "top1"), ("dense", "batch"))),
    ],
)
def test_they_equal_a_slow_reference(exported: Path, digits: Path, name: str, routing: str) -> None:
    run = exported / name
    found = json.loads(ok("eval", run, "--routing", routing, "--json"))
    with open_run(run) as model:
        wanted = slow_losses(model, digits, Routing(routing))
    assert set(wanted) == set(PAIRS)
    assert conditional(found) == pytest.approx(wanted, rel=2e-6)
    perplexities = {pair: math.exp(loss) for pair, loss in conditional(found).items()}
    assert conditional(found, "conditional_perplexity/") == pytest.approx(perplexities)
    assert found["loss/text"] != pytest.approx(wanted["text_given_image"], rel=1e-3)


@pytest.mark.long
def test_a_run_and_its_export_report_them(config: Path, tmp_path: Path) -> None:
    """In metrics.jsonl, on the report's page, in the table of `eval`, and on the card of the export."""
    train = (
        "train",
        config,
        f"run.dir={tmp_path}",
        "run.name=r",
        "train.steps=2",
        "optim.warmup=0",
        "train.eval_every=2",
    )
    model = ("model.kind=dense", "model.depth=null", "model.experts.counts={}", "parallel.ep=1")
    assert mmscale(*train, *model, "checkpoint.asynchronous=false", "checkpoint.every=0").status == 0
    run, export = tmp_path / "r", tmp_path / "hf"
    last = read_metrics(run)[-1]
    assert set(conditional(last, "eval/conditional_loss/")) == set(PAIRS)
    ok("report", run, "--out", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Loss per token: text given image" in page
    ok("convert", "to-hf", run, export)
    rows = card_rows((export / "README.md").read_text())
    for pair in PAIRS:
        value = f"{last[f'eval/conditional_loss/{pair}']:.4f}"
        assert [f"loss per token of {pair.replace('_', ' ')}", PART, value, "2"] in rows
    found = json.loads(ok("eval", export, "--json"))
    assert conditional(found) == pytest.approx(conditional(json.loads(ok("eval", run, "--json"))), rel=2e-6)
    assert "conditional_perplexity/image_given_text" in ok("eval", export)
