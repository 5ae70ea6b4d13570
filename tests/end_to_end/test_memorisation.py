# Memorisation by number of copies: documents that repeat, canaries planted by `data prepare`, a slow reference.
"""`mmscale eval --task memorisation`, of a run and of its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import checkpoints_tools.huggingface.evaluate_export  # noqa: F401  what forked commands would import one by one
from mmscale.config.data.schema import CanariesConfig
from mmscale.data.digests import DIGESTS
from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.canaries import FILE, CanarySlice, canaries, read_canaries
from mmscale.data.prepared.manifest import TRAIN, read_manifest
from mmscale.data.stream.packed import pack_rows
from mmscale.data.stream.source import Source
from mmscale.data.vocab import BOS, EOS
from mmscale.inference.model import RunModel, open_run
from mmscale.tables.routings import Routing
from tests.end_to_end.running import assert_says, mmscale, ok
from tests.unit.data.samples import text, write_jsonl

PLANTED = ("data.prepare.canaries.copies=[1,8]", "data.prepare.canaries.count=2", "data.prepare.canaries.characters=24")
STEPS = 40  # 7 passes
WORDS = ("red", "green", "blue", "old", "new", "small", "large", "round")


def records() -> list[dict[str, Any]]:
    """20 texts, of which one has 4 copies and one 3; 4 are held out, and one of these is in training too."""
    texts = [f"the {WORDS[n % 8]} box of number {n} is {WORDS[n * 3 % 8]}" for n in range(20)]
    texts += 3 * texts[:1] + 2 * texts[1:2]
    found = [{"id": f"d{n}", "content": [text(one)], "split": "train"} for n, one in enumerate(texts)]
    held = [*(f"the {WORDS[n]} box of number {90 + n} is {WORDS[n]}" for n in range(3)), texts[2]]
    return found + [{"id": f"h{n}", "content": [text(one)], "split": "validation"} for n, one in enumerate(held)]


@pytest.fixture(scope="module")
def planted(digits: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A data set with canaries, and a run of tensor-parallel ranks that has read it often."""
    folder = tmp_path_factory.mktemp("planted")
    file = write_jsonl(folder / "d.jsonl", records())
    ok("data", "prepare", "--documents", file, "--like", digits, "--out", folder / "set", *PLANTED)
    train = ("train", config, f"run.dir={folder}", f"data.path={folder / 'set'}", f"train.steps={STEPS}")
    model = ("model.kind=dense", "model.depth=null", "model.experts.counts={}", "parallel.ep=1", "parallel.tp=2")
    rest = ("checkpoint.asynchronous=false", "checkpoint.every=0", "train.eval_every=0", "optim.lr=1e-2")
    ended = mmscale(*train, *model, *rest, nproc=2)
    assert ended.status == 0, ended
    return {"set": folder / "set", "run": folder / "tiny"}


def share_by_hand(model: RunModel, ids: list[int]) -> tuple[int, int]:
    """Places whose next token is the most likely one, and all: one prefix after another."""
    hits = 0
    for end in range(1, len(ids)):
        batch, _ = pack_rows(
            [[np.array(ids[:end])]], vocabulary=model.vocabulary, seq_length=model.config.model.seq_length
        )
        hits += int(torch.argmax(model.logits(batch, Routing.BATCH)[0, end - 1])) == ids[end]
    return hits, len(ids) - 1


def test_canaries_are_found_again_by_number_of_copies(planted: dict[str, Path]) -> None:
    found = json.loads(ok("eval", planted["run"], "--task", "memorisation", "--batches", "1", "--json"))
    rows = {row["name"]: row for row in found["memorisation"]}
    assert list(rows) == ["training/1", "training/3-4", "canaries/1", "canaries/8", "held_out"]
    assert [row["documents"] for row in rows.values()] == [18, 2, 2, 2, 3], "one held-out text is in training"
    assert (
        rows["canaries/8"]["reads"] == pytest.approx(8 * rows["canaries/1"]["reads"]) and rows["held_out"]["reads"] == 0
    )
    assert rows["canaries/8"]["memorised"] > 0.6 > rows["canaries/1"]["memorised"] > 0
    assert rows["training/3-4"]["memorised"] > rows["held_out"]["memorised"]
    assert all(0 <= row["low"] <= row["memorised"] <= row["high"] <= 1 for row in rows.values())
    assert found["memorised/canaries/8"] == rows["canaries/8"]["memorised"] == rows["canaries/8"]["by_modality"]["text"]
    tokenizer = open_text_tokenizer(planted["set"])
    with open_run(planted["run"]) as model:
        for copies in (1, 8):
            chosen = [one for one in read_canaries(planted["set"]) if one.copies == copies]
            ids = [[BOS, *tokenizer.encode(one.text).tolist(), EOS] for one in chosen]
            hits, places = np.sum([share_by_hand(model, one) for one in ids], axis=0)
            assert rows[f"canaries/{copies}"]["contexts"] == places
            assert rows[f"canaries/{copies}"]["memorised"] == pytest.approx(hits / places)


@pytest.mark.long
def test_an_export_and_ranks_measure_the_same(planted: dict[str, Path], tmp_path: Path) -> None:
    ok("convert", "to-hf", planted["run"], tmp_path / "hf")
    asked = ("--task", "memorisation", "--batches", "1")
    run, export, shared = (
        json.loads(ok("eval", model, *asked, *more, "--json"))
        for model, more in ((planted["run"], ()), (tmp_path / "hf", ()), (planted["run"], ("--nproc", "2")))
    )
    assert shared["memorisation"] == run["memorisation"]
    without = [{**row, "reads": None} for row in run["memorisation"]]
    assert export["memorisation"] == without
    lines = ok("eval", planted["run"], *asked).splitlines()
    assert any(line.startswith("canaries/8: ") and "contexts memorised (2 documents, read" in line for line in lines)


@pytest.mark.long
def test_scores_of_documents_are_those_of_the_task(planted: dict[str, Path]) -> None:
    """`data score --by memorised:RUN` of the copies of one document."""
    ok("data", "score", planted["set"], "--by", f"memorised:{planted['run']}", "--routing", "batch")
    scores = np.load(planted["set"] / "scores" / "memorised.npy")
    with open_run(planted["run"]) as model:
        source = Source(planted["set"], split=TRAIN, vocabulary=model.vocabulary)
        ids = source.read(np.arange(1))
        hits, places = share_by_hand(model, ids.tolist())
    assert scores[0] == pytest.approx(hits / places) == scores[20]


def test_planting_changes_no_other_document(planted: dict[str, Path], digits: Path, tmp_path: Path) -> None:
    """Canaries are the last training documents; the list of them is among the files that `data verify` reads."""
    bare, planted_set = tmp_path / "bare", planted["set"]
    ok("data", "prepare", "--documents", write_jsonl(tmp_path / "d.jsonl", records()), "--like", digits, "--out", bare)
    before, after = read_manifest(bare).splits, read_manifest(planted_set).splits
    assert after[TRAIN].parts[:-1] == before[TRAIN].parts and after["validation"] == before["validation"]
    assert after[TRAIN].parts[-1].documents == 18
    assert f'"{FILE}"' in (planted_set / DIGESTS).read_text()
    assert not (bare / FILE).exists() and not read_canaries(bare)
    settings = CanariesConfig(copies=(1, 8), count=2, characters=24)
    assert list(read_canaries(planted_set)) == canaries(settings)
    documents = list(CanarySlice(settings).read())
    assert len({one.id for one in documents}) == 18 and len({one.content for one in documents}) == 4
    other = canaries(settings.model_copy(update={"seed": 1}))
    assert not {one.text for one in other} & {one.text for one in canaries(settings)}


def test_bad_settings_are_refused(planted: dict[str, Path], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", records())
    ended = mmscale(
        "data", "prepare", "--documents", file, "--out", tmp_path / "x", "data.prepare.canaries.copies=[2,2]"
    )
    assert_says(ended, status=2, cause="one of them twice", remedy="name each number once")
    ended = mmscale("eval", planted["run"], "--task", "memorization")
    assert ended.status == 2 and "memorization" in ended.err
