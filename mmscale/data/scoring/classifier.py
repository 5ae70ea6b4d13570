"""A linear classifier of texts: trained on two sets of documents, stored in a file, applied to documents.

The form is fastText's, as used by PreSelect (Shum et al. 2025, 2503.00808) and DCLM: the score of a text is a linear
function of the mean over its words and word pairs, which are hashed into buckets. For two classes, fastText's
embeddings and output layer are one weight per bucket, so logistic regression fits the same functions directly.

n words and word pairs of a text, B buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.dedup.compared import ContentReader, slices
from mmscale.data.dedup.words import hashes_of, shingles, words_of
from mmscale.data.prepared.folder_lock import write_error
from mmscale.data.prepared.manifest import TRAIN
from mmscale.data.progress import Reporter
from mmscale.data.scoring import choose
from mmscale.data.scoring.stored import columns, read_scores
from mmscale.errors import DataError, UsageError
from mmscale.runtime.atomic_files import write_atomic

GRAMS = 2  # words and pairs of words, as PreSelect
BUCKETS = 1 << 20
LEAST = 10  # documents of a class
_HELD_OUT = 0.1  # share of the documents that choose the strength of the penalty and measure the accuracy
_STRENGTHS = (1e1, 1e2, 1e3, 1e4, 1e5)  # inverse penalties that are tried; the means of n-grams are small numbers
_ITERATIONS = 300
_FORMAT = "mmscale text classifier 1"


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """The probability that a text is of the good class.

    Attributes:
        weights: float32 [B].
        bias: log odds of a text without words.
        grams: words of the longest n-gram.
    """

    weights: NDArray[np.float32]
    bias: float
    grams: int

    def __call__(self, text: str) -> float:
        """The probability, from 0 to 1."""
        buckets = buckets_of(text, grams=self.grams, buckets=len(self.weights))
        odds = self.bias + (float(self.weights[buckets].mean(dtype=np.float64)) if len(buckets) else 0.0)
        return 1.0 / (1.0 + math.exp(-odds)) if odds > -700.0 else 0.0


def buckets_of(text: str, *, grams: int, buckets: int) -> NDArray[np.int64]:
    """Buckets of the n-grams of a text, int64 [n]; case and spaces do not matter."""
    words = hashes_of(words_of(text))
    found = [shingles(words, size) for size in range(1, grams + 1) if len(words) >= size]
    return (np.concatenate(found) % np.uint64(buckets)).astype(np.int64) if found else np.empty(0, np.int64)


def read_classifier(file: Path) -> TextClassifier:
    """The classifier in a file of `write_classifier`.

    Raises:
        DataError: the file is missing, damaged, or another kind of file.
    """
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy") as stored:
            settings = stored.metadata() or {}
            if settings.get("format") != _FORMAT:
                raise ValueError("it is no text classifier of this version")
            weights, bias, grams = stored.get_tensor("weights"), float(settings["bias"]), int(settings["grams"])
        if weights.ndim != 1 or not len(weights) or weights.dtype != np.float32 or not np.isfinite(weights).all():
            raise ValueError(f"its weights are {weights.dtype} of shape {weights.shape}, or no numbers")
        if not (math.isfinite(bias) and 1 <= grams <= 8):
            raise ValueError(f"its bias is {bias}, its n-grams have {grams} words")
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise DataError(
            f"data: the classifier {file} cannot be read: {error}",
            remedy="name a file that `mmscale data fit-classifier` wrote",
        ) from error
    return TextClassifier(weights, bias, grams)


def write_classifier(file: Path, classifier: TextClassifier) -> None:
    """Write a classifier to a safetensors file, atomically.

    Raises:
        DataError: the file could not be written.
    """
    from safetensors.numpy import save

    settings = {"format": _FORMAT, "bias": repr(classifier.bias), "grams": str(classifier.grams)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, save({"weights": classifier.weights}, metadata=settings))
    except OSError as error:
        raise write_error(error, file) from error


@dataclass(frozen=True)
class ClassExamples:
    """The documents of one class.

    Attributes:
        folder: a prepared data set, of which the training split is used.
        condition: expression of scores and tokens, as of `data select --expr`; None: all documents.
    """

    folder: Path
    condition: str | None = None


def fit_classifier(
    good: Sequence[ClassExamples],
    bad: Sequence[ClassExamples],
    *,
    most: int,
    seed: int,
    reporter: Reporter,
    grams: int = GRAMS,
    buckets: int = BUCKETS,
) -> tuple[TextClassifier, dict[str, Any]]:
    """Train a classifier that separates two classes of documents by their texts.

    Both classes have the same total weight, whatever their sizes. A tenth of the documents is held out: it chooses the
    strength of the penalty and measures the result.

    Args:
        good: documents that get high scores.
        bad: documents that get low scores.
        most: documents of a class; a random sample if there are more.
        seed: of the samples.
        reporter: shows the progress.
        grams: words of the longest n-gram.
        buckets: B.

    Returns:
        The classifier; and the numbers of documents, accuracy, area under the ROC curve and inverse penalty.

    Raises:
        DataError: a data set is damaged, or a class has too few documents with text.
        UsageError: a condition is invalid, or both classes have the same documents.
    """
    _refuse_same(good, bad)
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

    random = np.random.Generator(np.random.Philox(key=[seed % 2**64, 3]))
    rows: list[NDArray[np.int64]] = []
    classes: list[int] = []
    for label, name, examples in ((1, "good", good), (0, "bad", bad)):
        texts = _texts(examples, most=most, random=random, name=name, reporter=reporter)
        own = [row for row in (buckets_of(text, grams=grams, buckets=buckets) for text in texts) if len(row)]
        if len(own) < LEAST:
            raise DataError(
                f"data: there are {len(own)} {name} documents with text, at least {LEAST} are needed",
                remedy=f"give more data sets, or another condition, for the {name} documents",
            )
        rows += own
        classes += [label] * len(own)
    lengths = np.array([len(row) for row in rows])
    values = np.repeat(1.0 / lengths, lengths)
    x = csr_matrix((values, np.concatenate(rows), np.append(0, lengths.cumsum())), shape=(len(rows), buckets))
    x.sum_duplicates()
    y, held = np.array(classes), _held_out(np.array(classes), random)
    best: tuple[float, Any, float] | None = None
    with reporter.part("fitting the classifier"):
        for strength in _STRENGTHS:
            model = LogisticRegression(C=strength, class_weight="balanced", max_iter=_ITERATIONS)
            model.fit(x[~held], y[~held])
            loss = float(log_loss(y[held], model.predict_proba(x[held])[:, 1], labels=[0, 1]))
            if best is None or loss < best[0]:
                best = (loss, model, strength)
    assert best is not None
    _, model, strength = best
    chance = model.predict_proba(x[held])[:, 1]
    made = TextClassifier(model.coef_[0].astype(np.float32), float(model.intercept_[0]), grams)
    return made, {
        "good": int(y.sum()),
        "bad": int((1 - y).sum()),
        "held_out": int(held.sum()),
        "accuracy": float(accuracy_score(y[held], chance > 0.5)),
        "area_under_roc": float(roc_auc_score(y[held], chance)),
        "inverse_penalty": strength,
    }


def _held_out(y: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.bool_]:
    """A tenth of each class, bool [documents]."""
    held = np.zeros(len(y), np.bool_)
    for label in (0, 1):
        own = random.permutation(np.flatnonzero(y == label))
        held[own[: max(1, round(_HELD_OUT * len(own)))]] = True
    return held


def _texts(
    examples: Sequence[ClassExamples], *, most: int, random: np.random.Generator, name: str, reporter: Reporter
) -> list[str]:
    """Texts of a class, at most `most` of them."""
    chosen: list[tuple[ContentReader, NDArray[np.int64]]] = []
    for one in examples:
        reader = ContentReader(one.folder, split=TRAIN, draw=False)
        if one.condition is None:
            found = np.arange(sum(part.documents for part in reader.parts))
        else:
            values = columns(one.folder, reader.manifest, reader.parts)
            values |= read_scores(one.folder, reader.manifest, reader.parts)
            found = np.flatnonzero(choose.evaluate(one.condition, values))
        chosen.append((reader, found))
    total = sum(len(found) for _, found in chosen)
    kept = np.zeros(total, np.bool_)
    kept[random.permutation(total)[:most]] = True
    texts: list[str] = []
    with reporter.bar(f"{name} documents", int(kept.sum())) as advance:
        start = 0
        for reader, found in chosen:
            pieces = slices(reader.parts)
            firsts = np.array([piece.first for piece in pieces])
            for document in found[kept[start : start + len(found)]].tolist():
                piece = pieces[int(np.searchsorted(firsts, document, side="right")) - 1]
                texts.append(reader.text(piece, document - piece.first))
                advance(len(texts))
            start += len(found)
    return texts


def _refuse_same(good: Sequence[ClassExamples], bad: Sequence[ClassExamples]) -> None:
    """Refuse classes with the same documents.

    Raises:
        UsageError: the same data set under the same condition is in both.
    """
    both = {(one.folder.resolve(), one.condition) for one in good}
    for one in bad:
        if (one.folder.resolve(), one.condition) in both:
            raise UsageError(
                f"data fit-classifier: {one.folder} is in both classes",
                remedy="give another data set, or conditions with --good-if and --bad-if",
            )
