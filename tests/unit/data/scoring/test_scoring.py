"""Scores and selections against slow oracles, and the two commands on a small data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import parts_of, read_manifest
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.selection import DocumentWeights, read_selection, write_layer
from mmscale.data.progress import Reporter
from mmscale.data.scoring import choose, score, weigh
from mmscale.data.scoring.line_rules import RULES, quality
from mmscale.errors import DataError, UsageError
from tests.unit.data.samples import config, text, write_jsonl

SILENT = Reporter(enabled=False)


def slow_quality(lines: list[str], weights: dict[str, float]) -> float:
    """The notebook's reference of 2405.01582."""
    w = np.array(list(weights.values()))
    n = np.array([len(line.split()) for line in lines])
    rules = [RULES[name] for name in weights]
    score = np.array([sum(wi * rule(line) for wi, rule in zip(w, rules, strict=True)) for line in lines]) / w.sum()
    return float((score * n).sum() / n.sum())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from(["The cat sat on the mat.", "MENU | HOME", "{a: b}", "x x x x x", "and so on"]), min_size=1
    ),
    st.lists(st.floats(0.1, 3.0), min_size=len(RULES), max_size=len(RULES)),
)
def test_quality_is_that_of_the_reference(lines: list[str], weights: list[float]) -> None:
    given_weights = dict(zip(RULES, weights, strict=True))
    assert quality("\n\n".join(lines), given_weights) == pytest.approx(slow_quality(lines, given_weights))


def test_prose_is_better_than_menus_and_code() -> None:
    assert quality("The cat sat on the mat, and it slept.") == 1.0
    assert quality("HOME | MENU\n{ border: 0 }\nclick click click click") < 0.6
    assert quality("") == 1.0


def test_the_best_and_samples_of_them() -> None:
    scores = np.array([3.0, 1.5, 0.5, 0.0])
    assert choose.top(scores, share=0.5, temperature=0.0, seed=0).tolist() == [True, True, False, False]
    soft = np.exp(scores / 0.5) / np.exp(scores / 0.5).sum()
    drawn = np.mean([choose.top(scores, share=0.25, temperature=0.5, seed=seed) for seed in range(4000)], axis=0)
    assert np.abs(drawn - soft).max() < 4 * 0.5 / np.sqrt(4000)  # MATES' sign of the noise: the third gets 0.001
    assert choose.top(scores, share=0.0, temperature=1.0, seed=3).sum() == 1
    again = [choose.top(np.zeros(50), share=0.3, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert (again[0] == again[1]).all()
    assert (again[0] != again[2]).any()


def slow_semdedup(x: np.ndarray, at: np.ndarray, c: np.ndarray, similar: float) -> np.ndarray:
    """The notebook's reference of SemDeDup."""
    keep = np.ones(len(x), bool)
    for i in range(len(c)):
        own = np.where(at == i)[0]
        own = own[np.argsort(x[own] @ c[i], kind="stable")]
        alike = np.triu(x[own] @ x[own].T, 1)
        keep[own[alike.max(0, initial=-1) > similar]] = False
    return keep


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_d4_keeps_the_share_and_hardly_any_planted_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = unit(rng.normal(size=(400, 24)))
    x = np.concatenate([x, unit(x[:60] + 0.02 * rng.normal(size=(60, 24)))])
    at, centroids = choose._clusters(x, 6, 1)
    wanted = slow_semdedup(x, at, centroids, 0.95)
    np.testing.assert_array_equal(choose._semantic(x, at, centroids, 0.95), wanted)
    monkeypatch.setattr(choose, "_ROWS", 7)
    np.testing.assert_array_equal(choose._semantic(x, at, centroids, 0.95), wanted)
    keep = choose.d4(x, share=0.5, clusters=6, similar=0.95, seed=1)
    assert keep.sum() == 230
    chosen = x[keep]
    pairs = (np.triu(chosen @ chosen.T, 1) > 0.95).sum()
    assert pairs <= 2 < (np.triu(x @ x.T, 1) > 0.95).sum()
    typical = np.concatenate(
        [unit(rng.normal(size=(50, 24))), unit(np.ones((50, 24)) + 0.3 * rng.normal(size=(50, 24)))]
    )
    kept = choose.d4(typical, share=0.5, clusters=2, similar=0.999, seed=0)
    assert kept[:50].mean() > kept[50:].mean()


COLUMNS = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([0.0, 5.0, 1.0])}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("a > 1 and not b > 2", [0, 0, 1]),
        ("1 + (a >= 2) * 0.5", [1, 1.5, 1.5]),
        ("min(max(-a + b, 0), 2) / 2", [0, 1, 0]),
        ("a == 2 or b == 0", [1, 1, 0]),
        ("2", [2, 2, 2]),
    ],
)
def test_expressions(expression: str, value: list[float]) -> None:
    assert choose.evaluate(expression, COLUMNS).tolist() == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("c > 1", "there is no 'c', only a, b"),
        ("a >", "is no expression"),
        (f"a * {10**400}", "is no expression"),
        ("a / b", "is no number for document 0"),
        ("__import__('os')", "is not understood"),
        ("a.__class__", "is not understood"),
        ("(lambda: 1)()", "is not understood"),
        ("[a for a in b]", "is not understood"),
        ("a ** 9 ** 9", "is not understood"),
        ("1 < a < 3", "is not understood"),
        ("'text'", "is not understood"),
        ("min(a)", "is no expression"),
        ("(" * 400 + "a" + ")" * 400, "is no expression"),
    ],
)
def test_other_expressions_are_refused(expression: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose.evaluate(expression, COLUMNS)


def made(folder: Path) -> Path:
    texts = ["The cat sat on the mat, and it slept.", "HOME | MENU", "It was a good day for all of us."] * 4
    documents = [{"id": f"d{n}", "content": [text(own)]} for n, own in enumerate(texts)]
    settings = {"held_out": 0.0, "source": "documents", "documents": [str(write_jsonl(folder / "d.jsonl", documents))]}
    prepare(config(**settings), folder / "set", progress=False)
    return folder / "set"


def weights(folder: Path) -> list[float]:
    found = read_selection(folder)
    assert found is not None
    return DocumentWeights(folder, found.identity, documents=found.documents).weights(slice(None)).tolist()


def test_scores_become_weights(tmp_path: Path) -> None:
    folder = made(tmp_path)
    result = score.score(folder, "rules", reporter=SILENT)
    assert (result["name"], result["quantiles"][-1]) == ("rules", 1.0)
    weigh.select(folder, expression="rules > 0.9")
    assert weights(folder) == [1, 0, 1] * 4
    weigh.select(folder, expression="2 * (rules > 0.9) + 0.25 * (rules < 0.9) + 0 * tokens")
    assert weights(folder) == [2, 0.25, 2] * 4
    pq.write_table(pa.table({"score": [float(n) for n in range(12)]}), tmp_path / "mine.parquet")
    score.score(folder, str(tmp_path / "mine.parquet"), reporter=SILENT)
    weigh.select(folder, by="mine + 100 * rules", top=0.5)
    assert [n for n, weight in enumerate(weights(folder)) if weight] == [2, 3, 5, 6, 8, 9, 11][1:]
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(12, 3)))
    result = weigh.select(folder, embeddings=tmp_path / "x.npy", top=0.5, clusters=2)
    assert result["kept"] <= 6
    assert weigh.undo(folder)
    assert read_selection(folder) is None


@pytest.mark.parametrize("by", ["score", "embeddings"])
def test_a_share_is_one_of_the_documents_that_others_keep(tmp_path: Path, by: str) -> None:
    """The best half of the third that `data dedup` keeps, and not the half of it that is among the best half of all."""
    folder = made(tmp_path)
    manifest = read_manifest(folder)
    parts, of = parts_of(folder, manifest, "train"), identity_of(folder, manifest)
    write_layer(folder, manifest, parts, np.arange(12) < 4, name="dedup", of=of, made={})
    pq.write_table(pa.table({"score": [float(n) for n in range(12)]}), tmp_path / "mine.parquet")
    score.score(folder, str(tmp_path / "mine.parquet"), reporter=SILENT)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(12, 3)))
    for _ in range(2):  # the layer of an earlier selection is replaced, and leaves nothing out
        if by == "score":
            weigh.select(folder, by="mine", top=0.5)
            assert np.flatnonzero(weights(folder)).tolist() == [2, 3]
        else:
            weigh.select(folder, embeddings=tmp_path / "x.npy", top=0.5, clusters=1, similar=1.0)
            assert len(np.flatnonzero(weights(folder))) == 2 and not any(weights(folder)[4:])


def test_what_cannot_be_a_score_or_a_selection_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path)
    np.save(tmp_path / "short.npy", np.zeros(3))
    np.save(tmp_path / "bad.npy", np.full(12, np.nan))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: score.score(folder, "magic", reporter=SILENT), UsageError, "there is no scorer 'magic'"),
        (lambda: score.score(folder, str(tmp_path / "short.npy"), reporter=SILENT), DataError, "has 3 scores"),
        (lambda: score.score(folder, str(tmp_path / "bad.npy"), reporter=SILENT), DataError, "are no numbers"),
        (lambda: score.score(folder, str(tmp_path / "torn.parquet"), reporter=SILENT), DataError, "cannot be read"),
        (lambda: score.score(folder, "rules", name="tokens", reporter=SILENT), UsageError, "cannot be the name"),
        (lambda: weigh.select(folder), UsageError, "nothing says which documents"),
        (lambda: weigh.select(folder, by="tokens"), UsageError, "nothing says which documents"),
        (lambda: weigh.select(folder, expression="100 * tokens"), UsageError, "weights are from 0 to 64"),
        (lambda: weigh.select(folder, expression="tokens < 0"), DataError, "would be left"),
        (lambda: weigh.select(folder, embeddings=tmp_path / "short.npy", top=0.5), DataError, "has shape"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
    score.score(folder, "rules", reporter=SILENT)
    (folder / "scores/rules.of").write_text("other")
    with pytest.raises(DataError, match="was made for other documents"):
        weigh.select(folder, expression="rules > 0")
