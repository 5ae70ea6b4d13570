# Scores by a run against slow references: every document alone in a sequence, plain softmax, and projections whose
# columns are zeroed instead of heads that are masked.
"""`mmscale data score --by perplexity:RUN`, `memorised:RUN` and `influence:RUN`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmscale.data.prepared.manifest import parts_of, read_manifest
from mmscale.data.prepared.parts import read_document
from mmscale.data.progress import Reporter
from mmscale.data.stream.packed import pack_rows
from mmscale.errors import DataError, UsageError
from mmscale.inference import score_documents
from mmscale.inference.model import RunModel, open_run
from mmscale.inference.retrieval_heads import masked_heads
from mmscale.tables.routings import Routing
from mmscale.tables.run_scores import RUN_SCORES
from tests.end_to_end.running import assert_says, mmscale
from tests.unit.data.samples import image, save_picture, text, write_jsonl

SILENT = Reporter(enabled=False)
COMPARED = 12  # documents whose scores are recomputed
DOCUMENTS = 120

MAIN = ("train.steps=4", "optim.warmup=1", "checkpoint.every=0", "checkpoint.asynchronous=false", "train.eval_every=0")
STAGE = ("--stage", "auxiliary", "auxiliary.steps=2", "auxiliary.calibration_batches=1")
DENSE = ("model.kind=dense", "model.experts.counts={}", "parallel.ep=1")
RUNS: dict[str, tuple[tuple[str, ...], int]] = {  # settings and ranks of the training
    "moma_depth": ((), 2),
    "dense_tp": ((*DENSE, "model.depth=null", "parallel.tp=2"), 2),
    "mot_pp": ((*DENSE, "model.depth=null", "model.untie=[attention,ffn,norms]", "parallel.pp=2"), 2),
    "dense_depth": (DENSE, 1),
}
CAUSAL = ("moma_depth", "dense_depth")  # runs that need auxiliary routers
EVERYTHING = "moma_depth"


class Runs(dict[str, Path]):
    """Runs of RUNS, each trained when it is first needed."""

    def __init__(self, config: Path, folder: Path) -> None:
        super().__init__()
        self._config, self._folder = config, folder

    def __missing__(self, name: str) -> Path:
        settings, ranks = RUNS[name]
        command = ("train", self._config, f"run.dir={self._folder}", f"run.name={name}", *MAIN, *settings)
        for stage in ((), STAGE) if name in CAUSAL else ((),):
            ended = mmscale(*command, *settings, *stage, nproc=ranks)
            assert ended.status == 0, ended
        self[name] = self._folder / name
        return self[name]


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(config, tmp_path_factory.mktemp("scoring"))


@pytest.fixture(scope="module")
def scored(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set with the tokenizers of the runs: captions before and after pictures, and texts alone."""
    folder = tmp_path_factory.mktemp("scored")
    records = []
    for number in range(DOCUMENTS):
        save_picture(folder / f"img/{number % 9}.png", number % 9, size=8)
        words, drawn = text(f"a drawing of the digit {number % 10}"), image(f"img/{number % 9}.png")
        content = ([words, drawn], [drawn, words], [words], [drawn, words, drawn])[number % 4]
        records.append({"id": f"d{number}", "content": content, "split": "train"})
    file = write_jsonl(folder / "d.jsonl", records)
    ended = mmscale("data", "prepare", "--documents", file, "--like", digits, "--out", folder / "set")
    assert ended.status == 0, ended
    return folder / "set"


@pytest.fixture
def few(scored: Path, tmp_path: Path) -> Path:
    """A copy of the small data set."""
    shutil.copytree(scored, tmp_path / "set")
    return tmp_path / "set"


def slow_sums(model: RunModel, documents: Sequence[NDArray[np.int64]], routing: Routing) -> NDArray[np.float64]:
    """[documents, modalities, 3]: loss, hits, labels; one document at a time, token by token."""
    found = np.zeros((len(documents), len(model.vocabulary.names), 3))
    length = model.config.model.seq_length
    for number, ids in enumerate(documents):
        start = 0
        while start < len(ids) - 1:
            piece = ids[start : start + length]
            batch, _ = pack_rows([[piece]], vocabulary=model.vocabulary, seq_length=length)
            logits = model.logits(batch, routing)[0].double()
            for place in range(len(piece) - 1):
                label = int(piece[place + 1])
                modality = int(model.vocabulary.modality_of(piece[place + 1 : place + 2])[0])
                chance = torch.softmax(logits[place], dim=-1)
                found[number, modality] += (-np.log(float(chance[label])), float(chance.argmax() == label), 1.0)
            start += length - 1
    return found


def zero_projections(model: RunModel, heads: Sequence[tuple[int, int]]) -> None:
    """What masking of heads amounts to: the projection of their output is zero."""
    width = model.config.model.hidden_size // model.config.model.num_attention_heads
    for name, parameter in model.module.named_parameters():
        for layer, head in heads:
            if f"layers.{layer}.self_attention.linear_proj." in name and parameter.dim() > 1:
                parameter.data[..., head * width : (head + 1) * width] = 0.0


def first_documents(folder: Path) -> list[NDArray[np.int64]]:
    part = parts_of(folder, read_manifest(folder), "train")[0]
    return [read_document(folder, part, number) for number in range(COMPARED)]


def stored(folder: Path, name: str) -> NDArray[np.float64]:
    return np.load(folder / "scores" / f"{name}.npy").astype(np.float64)[:COMPARED]


def ratio(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):
        return one / other


@pytest.mark.parametrize(
    "name", [EVERYTHING, *(pytest.param(one, marks=pytest.mark.long) for one in RUNS if one != EVERYTHING)]
)
def test_scores_are_those_of_a_slow_reference(name: str, runs: dict[str, Path], few: Path) -> None:
    results = {kind: score_documents.score_by_run(few, kind, runs[name], reporter=SILENT) for kind in RUN_SCORES}
    heads = results["influence"]["heads"]
    assert len(heads) == 1 and results["perplexity"]["routing"] == "causal"
    documents = first_documents(few)
    with open_run(runs[name]) as model:
        plain = slow_sums(model, documents, Routing.CAUSAL)
        zero_projections(model, heads)
        masked = slow_sums(model, documents, Routing.CAUSAL)
    assert np.abs(masked[..., 0] - plain[..., 0]).max() > 1e-3, "the masked head does something"
    for suffix, own, without in [
        ("", plain.sum(axis=1), masked.sum(axis=1)),
        *((f"_{kind}", plain[:, n], masked[:, n]) for n, kind in enumerate(("text", "image"))),
    ]:
        loss, hits, labels = own.T
        np.testing.assert_allclose(stored(few, f"perplexity{suffix}"), np.exp(ratio(loss, labels)), rtol=2e-5)
        np.testing.assert_allclose(stored(few, f"memorised{suffix}"), ratio(hits, labels), rtol=1e-6)
        wanted = ratio(without[:, 0] - loss, loss)
        np.testing.assert_allclose(stored(few, f"influence{suffix}"), wanted, atol=2e-5)
    assert not (few / ".cache/scores/perplexity").exists()


@pytest.mark.long
def test_long_documents_are_read_in_pieces(runs: dict[str, Path]) -> None:
    """Each token but the first is predicted once, also at the ends of pieces."""
    random = np.random.default_rng(0)
    with open_run(runs["dense_tp"]) as model:
        length = model.config.model.seq_length
        documents = [random.integers(5, 300, size) for size in (1, 2, length, length + 1, 3 * length - 2, 3 * length)]
        trained = np.ones((len(documents), 2), np.bool_)
        found = score_documents.document_sums(model, documents, trained, routing=Routing.CAUSAL)
        assert found[..., 2].sum(axis=1).tolist() == [len(ids) - 1 for ids in documents]
        np.testing.assert_allclose(found, slow_sums(model, documents, Routing.CAUSAL), rtol=2e-5, atol=1e-5)
        trained[:, 0] = False
        only = score_documents.document_sums(model, documents, trained, routing=Routing.CAUSAL)
        assert not only[:, 0].any()
        np.testing.assert_array_equal(only[:, 1], found[:, 1])


@pytest.mark.long
@pytest.mark.parametrize("name", list(RUNS))
def test_a_masked_head_is_one_without_output(name: str, runs: dict[str, Path], few: Path) -> None:
    """Masking ends with the context, and masks no other head."""
    documents = first_documents(few)[:3]
    with open_run(runs[name]) as model:
        before = slow_sums(model, documents, Routing.CAUSAL)
        with masked_heads(model, [(1, 0)]):
            masked = slow_sums(model, documents, Routing.CAUSAL)
        np.testing.assert_array_equal(slow_sums(model, documents, Routing.CAUSAL), before)
        zero_projections(model, [(1, 0)])
        np.testing.assert_allclose(masked, slow_sums(model, documents, Routing.CAUSAL), rtol=1e-6)


def test_an_interrupted_command_continues(runs: dict[str, Path], few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_documents, "SLICE", 50)
    calls: list[int] = []
    real = score_documents.document_sums

    def interrupted(*arguments: Any, **keywords: Any) -> NDArray[np.float64]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **keywords)

    monkeypatch.setattr(score_documents, "document_sums", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_documents.score_by_run(few, "perplexity", runs["dense_tp"], reporter=SILENT)
    assert not (few / "scores").exists()
    slices = sorted((few / ".cache/scores/perplexity").glob("*/all-*.npy"))
    assert [file.name for file in slices] == ["all-0.npy", "all-50.npy"]
    slices[1].write_bytes(b"torn")
    done: list[int] = []

    def counted(*arguments: Any, **keywords: Any) -> NDArray[np.float64]:
        done.append(1)
        return real(*arguments, **keywords)

    monkeypatch.setattr(score_documents, "document_sums", counted)
    result = score_documents.score_by_run(few, "perplexity", runs["dense_tp"], reporter=SILENT)
    assert len(done) == -(-result["documents"] // 50) - 1, "all slices but the first"
    continued = (few / "scores/perplexity.npy").read_bytes()
    score_documents.score_by_run(few, "perplexity", runs["dense_tp"], reporter=SILENT)
    assert (few / "scores/perplexity.npy").read_bytes() == continued


@pytest.mark.parametrize("kind", ["perplexity", "influence"])
def test_several_processes_write_the_same_scores(
    runs: dict[str, Path], few: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_documents, "SLICE", 50)
    monkeypatch.setattr(score_documents.os, "cpu_count", lambda: 1)  # sums of several threads are rounded otherwise
    score_documents.score_by_run(few, kind, runs["moma_depth"], heads=0.5, reporter=SILENT)
    alone = {file.name: file.read_bytes() for file in (few / "scores").iterdir()}
    shutil.rmtree(few / "scores")

    def here(*_: Any, **__: Any) -> NDArray[np.float64]:
        raise AssertionError("this process computes a slice")

    monkeypatch.setattr(score_documents, "document_sums", here)
    score_documents.score_by_run(few, kind, runs["moma_depth"], heads=0.5, workers=2, reporter=SILENT)
    assert {file.name: file.read_bytes() for file in (few / "scores").iterdir()} == alone


def test_slices_of_another_checkpoint_are_not_used(runs: dict[str, Path], few: Path) -> None:
    """The key contains the weights, so a run that was trained further starts anew."""
    keys = []
    for name in ("dense_tp", "mot_pp"):
        with open_run(runs[name]) as model:
            keys.append(score_documents._digest(model))
            again = score_documents._digest(model)
        assert again == keys[-1]
    assert keys[0] != keys[1]


def test_the_command(runs: dict[str, Path], few: Path, tmp_path: Path) -> None:
    ended = mmscale(
        "data", "score", few, "--by", f"influence:{runs['moma_depth']}@4", "--heads", "0.5", "--name", "pull"
    )
    assert ended.status == 0, ended
    assert "pull, pull_text, pull_image" in ended.out and "causal routing" in ended.out and "masked heads" in ended.out
    made = json.loads((few / "scores/pull.json").read_text())
    assert made["step"] == 4 and len(made["heads"]) == 2
    ended = mmscale("data", "select", few, "--by", "pull", "--top", "0.5", "--json")
    assert ended.status == 0, ended
    ended = mmscale("data", "score", few, "--by", f"memorised:{runs['moma_depth']}", "--routing", "batch", "--json")
    found = json.loads(ended.out)
    assert found["routing"] == "batch" and not found["trained_on"]


@pytest.mark.long
def test_it_says_when_the_run_trains_on_the_documents(config: Path, few: Path, tmp_path: Path) -> None:
    ended = mmscale("train", config, f"run.dir={tmp_path}", f"data.path={few}", *MAIN, *DENSE, "model.depth=null")
    assert ended.status == 0, ended
    ended = mmscale("data", "score", few, "--by", f"memorised:{tmp_path / 'tiny'}")
    assert "the run trains on this data set" in ended.out


def test_what_cannot_be_scored_is_refused(runs: dict[str, Path], few: Path, tmp_path: Path) -> None:
    run = runs["moma_depth"]
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("auxiliary"))
    cases: list[tuple[int, str, tuple[str | Path, ...], str, str]] = [
        (2, f"perplexity:{bare}", (), "there are no auxiliary routers for step 4", "--stage auxiliary"),
        (4, f"perplexity:{tmp_path / 'none'}", (), "there is no folder", "name a run"),
        (4, f"perplexity:{run}@77", (), "77", ""),
        (2, f"perplexity:{run}", ("--routing", "magic"), "'magic' is not a routing", "causal"),
        (2, f"perplexity:{run}", ("--heads", "0.1"), "--by perplexity masks no heads", "leave --heads out"),
        (2, f"perplexity:{run}", ("--name", "tokens"), "'tokens' cannot be the name of a score", "another --name"),
        (2, "rules", ("--routing", "causal"), "--by rules has no --routing", "leave it out"),
        (2, "perplexity:", (), "there is no scorer 'perplexity:'", "influence:RUN"),
    ]
    for status, by, options, cause, remedy in cases:
        assert_says(mmscale("data", "score", few, "--by", by, *options), status=status, cause=cause, remedy=remedy)
        assert not (few / "scores").exists(), by


def test_data_of_other_tokenizers_is_refused(runs: dict[str, Path], few: Path) -> None:
    manifest = json.loads((few / "manifest.json").read_text())
    manifest["tokenizers"] = dict.fromkeys(manifest["tokenizers"], "other")
    (few / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="is another than that of step 4"):
        score_documents.score_by_run(few, "perplexity", runs["dense_tp"], reporter=SILENT)


def test_short_sequences_have_no_room_for_the_probe(runs: dict[str, Path]) -> None:
    with open_run(runs["dense_tp"]) as model:
        short = model.config.model_copy(update={"model": model.config.model.model_copy(update={"seq_length": 32})})
        with pytest.raises(UsageError, match="needs sequences of 33 tokens, the model has 32"):
            score_documents.retrieval_scores(replace(model, config=short), routing=Routing.CAUSAL)
