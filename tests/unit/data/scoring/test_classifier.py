"""The classifier of texts: against slow references, from documents to weights, and bad files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mmscale.data.arrays import scattered
from mmscale.data.prepared.prepare import prepare
from mmscale.data.progress import Reporter
from mmscale.data.scoring import classifier, score, weigh
from mmscale.data.scoring.classifier import ClassExamples, TextClassifier
from mmscale.errors import DataError, UsageError
from tests.unit.data.samples import config, text, write_jsonl

SILENT = Reporter(enabled=False)
GOOD = ["the proof follows from the lemma", "we derive the bound", "consider a prime number", "the theorem holds"]
BAD = ["click here now", "buy cheap shoes", "subscribe to win", "hot deals click now"]


def slow_buckets(words: list[str], grams: int, buckets: int) -> list[int]:
    """Every run of one to `grams` words, hashed word by word."""
    found = []
    for size in range(1, grams + 1):
        for start in range(len(words) - size + 1):
            state = np.uint64(0)
            for word in words[start : start + size]:
                state = scattered(np.array([state ^ np.uint64(xxhash.xxh3_64_intdigest(word.encode()))]))[0]
            found.append(int(state) % buckets)
    return found


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["a", "cat", "sat", "on", "mats"]), max_size=9), st.integers(1, 3))
def test_a_score_is_the_mean_weight_of_the_n_grams(words: list[str], grams: int) -> None:
    weights = np.random.default_rng(0).normal(size=61).astype(np.float32) * 5
    found = slow_buckets(words, grams, 61)
    odds = 0.25 + (sum(float(weights[one]) for one in found) / len(found) if found else 0.0)
    made = TextClassifier(weights, 0.25, grams)
    assert made("  ".join(words).upper()) == pytest.approx(1 / (1 + math.exp(-odds)), rel=1e-6)


def test_extreme_odds_are_probabilities() -> None:
    for bias, wanted in ((2000.0, 1.0), (-2000.0, 0.0)):
        assert TextClassifier(np.zeros(3, np.float32), bias, 2)("word") == wanted


def data_set(folder: Path, texts: list[str]) -> Path:
    documents = [{"id": f"d{n}", "content": [text(one)]} for n, one in enumerate(texts)]
    settings = {"held_out": 0.0, "source": "documents", "documents": [str(write_jsonl(folder / "d.jsonl", documents))]}
    prepare(config(**settings), folder / "set", progress=False)
    return folder / "set"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twenty good and twenty bad documents, and a mixed set."""
    random = np.random.default_rng(1)
    mixed = {name: [" ".join(random.choice(own, 2)) for _ in range(20)] for name, own in (("good", GOOD), ("bad", BAD))}
    texts = mixed | {"both": mixed["good"] + mixed["bad"]}
    return {name: data_set(tmp_path_factory.mktemp(name), own) for name, own in texts.items()}


def fit(good: list[ClassExamples], bad: list[ClassExamples], **settings: Any) -> tuple[TextClassifier, dict[str, Any]]:
    chosen = {"most": 100, "seed": 0, "buckets": 1 << 12} | settings
    return classifier.fit_classifier(good, bad, reporter=SILENT, **chosen)


def test_it_tells_the_classes_apart_and_selects(sets: dict[str, Path], tmp_path: Path) -> None:
    made, report = fit([ClassExamples(sets["good"])], [ClassExamples(sets["bad"])])
    assert report["good"] == report["bad"] == 20 and report["held_out"] == 4 and report["accuracy"] == 1.0
    assert made("a lemma holds, we derive a bound") > 0.5 > made("click to buy shoes")
    file = tmp_path / "new/good.safetensors"
    classifier.write_classifier(file, made)
    again = classifier.read_classifier(file)
    assert (again.weights == made.weights).all() and (again.bias, again.grams) == (made.bias, made.grams)
    result = score.score(sets["both"], f"classifier:{file}", workers=2, reporter=SILENT)
    found = np.load(sets["both"] / "scores/classifier.npy")
    assert result["name"] == "classifier" and (found[:20] > 0.5).all() and (found[20:] < 0.5).all()
    assert json.loads((sets["both"] / "scores/classifier.json").read_text()) == {"by": f"classifier:{file}"}
    assert weigh.select(sets["both"], by="classifier", top=0.5)["kept"] == 20
    assert weigh.undo(sets["both"])


def test_the_same_documents_give_the_same_classifier(sets: dict[str, Path]) -> None:
    one, other, sampled = (
        fit([ClassExamples(sets["good"])], [ClassExamples(sets["bad"])], most=most) for most in (100, 100, 12)
    )
    assert (one[0].weights == other[0].weights).all() and one[1] == other[1]
    assert sampled[1]["good"] == 12


def test_classes_from_scores_of_one_set(sets: dict[str, Path], tmp_path: Path) -> None:
    """PreSelect's form: the documents with the highest scores against those with the lowest."""
    np.save(tmp_path / "preselect.npy", np.linspace(1.0, 0.0, 40))
    score.score(sets["both"], str(tmp_path / "preselect.npy"), reporter=SILENT)
    made, report = fit(
        [ClassExamples(sets["both"], "preselect > 0.7")], [ClassExamples(sets["both"], "preselect < 0.3")]
    )
    assert report["good"] == report["bad"] == 12
    assert made("the theorem holds") > 0.5 > made("hot deals")


def test_bad_classes_are_refused(sets: dict[str, Path], tmp_path: Path) -> None:
    good, bad, both = (ClassExamples(sets[name]) for name in ("good", "bad", "both"))
    with pytest.raises(DataError, match="there are 5 bad documents with text, at least 10 are needed"):
        fit([good], [ClassExamples(data_set(tmp_path, [*BAD, "now"]))])
    with pytest.raises(UsageError, match="is in both classes"):
        fit([both], [bad, both])
    with pytest.raises(UsageError, match="there is no 'magic'"):
        fit([good], [ClassExamples(sets["bad"], "magic > 0")])


def test_bad_files_are_refused(sets: dict[str, Path], tmp_path: Path) -> None:
    good = {"format": "mmscale text classifier 1", "bias": "0.0", "grams": "2"}
    cases: list[tuple[np.ndarray, dict[str, str] | None, str]] = [
        (np.zeros(4, np.float32), None, "it is no text classifier"),
        (np.zeros(4, np.float32), good | {"format": "2"}, "it is no text classifier"),
        (np.zeros((2, 2), np.float32), good, "its weights are float32 of shape"),
        (np.zeros(0, np.float32), good, "its weights are float32 of shape"),
        (np.full(4, np.nan, np.float32), good, "or no numbers"),
        (np.zeros(4, np.float32), good | {"bias": "inf"}, "its bias is inf"),
        (np.zeros(4, np.float32), good | {"grams": "900"}, "its n-grams have 900 words"),
    ]
    for weights, stored, message in cases:
        save_file({"weights": weights}, tmp_path / "bad.safetensors", metadata=stored)
        with pytest.raises(DataError, match=message):
            score.score(sets["good"], f"classifier:{tmp_path / 'bad.safetensors'}", reporter=SILENT)
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 40)
    for name in ("torn", "missing"):
        with pytest.raises(DataError, match="cannot be read"):
            score.score(sets["good"], f"classifier:{tmp_path / name}.safetensors", reporter=SILENT)
    assert not (sets["good"] / "scores").exists()
