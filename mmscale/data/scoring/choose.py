"""From scores to weights: an expression, the best share with a temperature, or D4 on embeddings. Arrays only.

D documents, E width of an embedding.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.errors import UsageError

Numbers = NDArray[np.float64]
_ROUNDS = 15  # iterations of k-means
_ROWS = 4096  # rows of the similarity matrix that are in memory at once

_TWO: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_CALLS: dict[str, Callable[..., Any]] = {"min": np.minimum, "max": np.maximum, "log": np.log, "abs": np.abs}


def evaluate(expression: str, columns: Mapping[str, Numbers]) -> Numbers:
    """Value of an expression for each document, float64 [D]; true is 1.

    Args:
        expression: numbers, names of columns, + - * /, comparisons, and, or, not, min, max, log, abs.
        columns: float64 [D] each.

    Raises:
        UsageError: the expression is invalid, or its value is not a number for some document.
    """
    try:
        tree = ast.parse(expression, mode="eval")
        size = len(next(iter(columns.values())))
        with np.errstate(all="ignore"):
            found = np.broadcast_to(np.asarray(_value(tree.body, columns), np.float64), (size,))
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise UsageError(f"--expr: {expression!r} is no expression: {error}", remedy="correct it") from error
    if not np.isfinite(found).all():
        raise UsageError(
            f"--expr: {expression!r} is no number for document {int(np.flatnonzero(~np.isfinite(found))[0])}",
            remedy="divide by max(NAME, 1), compare, or use a score that every document has",
        )
    return np.array(found)


def _value(node: ast.AST, columns: Mapping[str, Numbers]) -> Any:
    """Value of a part of an expression; only the operations listed here are allowed."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            if name not in columns:
                raise UsageError(
                    f"--expr: there is no {name!r}, only {', '.join(sorted(columns))}",
                    remedy="correct it, or run `mmscale data score` first",
                )
            return columns[name]
        case ast.BinOp() | ast.Compare(ops=[_]):
            kind, one, other = _sides(node)
            if kind in _TWO:
                return _TWO[kind](_value(one, columns), _value(other, columns))
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, columns)
        case ast.UnaryOp(op=ast.Not()):
            return np.logical_not(_value(node.operand, columns))
        case ast.BoolOp():
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return functools.reduce(join, (_value(one, columns) for one in node.values))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _CALLS:
            return _CALLS[name](*(_value(one, columns) for one in node.args))
    raise UsageError(
        f"--expr: {ast.unparse(node)!r} is not understood",
        remedy="use numbers, names, + - * /, comparisons of two, and, or, not, min, max, log, abs",
    )


def _sides(node: ast.BinOp | ast.Compare) -> tuple[type[ast.AST], ast.expr, ast.expr]:
    if isinstance(node, ast.BinOp):
        return type(node.op), node.left, node.right
    return type(node.ops[0]), node.left, node.comparators[0]


def top(scores: Numbers, *, share: float, temperature: float, seed: int) -> NDArray[np.bool_]:
    """The documents with the best scores, or with a temperature above 0 a random sample that prefers them, bool [D].

    The sample has the distribution of drawing documents one by one without replacement with probabilities softmax(score
    / temperature): those with the largest score / temperature + Gumbel noise (Kool et al. 2019). MATES' code adds the
    noise to the loss and takes the smallest, which is another distribution.

    Args:
        scores: the higher the better; other units need another temperature [D].
        share: of the documents that are kept, at least one.
        temperature: 0: the best ones.
        seed: of the noise.
    """
    count = max(1, round(share * len(scores)))
    value = np.asarray(scores, np.float64)
    if temperature > 0.0:
        bits = np.random.Philox(key=[seed % 2**64, 1]).random_raw(len(scores))
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
        value = value / temperature - np.log(-np.log(uniform))
    keep = np.zeros(len(scores), bool)
    keep[np.argsort(-value, kind="stable")[:count]] = True
    return keep


def d4(
    embeddings: NDArray[np.floating], *, share: float, clusters: int, similar: float, seed: int
) -> NDArray[np.bool_]:
    """D4 (Tirumala et al. 2023): remove near-duplicates, cluster again, remove the most typical documents; bool [D].

    Args:
        embeddings: of the documents [D, E]; only their directions matter.
        share: of the documents that are kept; fewer if there are more duplicates.
        clusters: of spherical k-means.
        similar: cosine similarity above which two documents of a cluster are duplicates.
        seed: of the first centroids.
    """
    x = np.asarray(embeddings, np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    at, centroids = _clusters(x, clusters, seed)
    first = np.flatnonzero(_semantic(x, at, centroids, similar))
    at, centroids = _clusters(x[first], clusters, seed)  # without duplicates, which would form separate clusters
    typical = (x[first] * centroids[at]).sum(axis=1)
    keep = np.zeros(len(x), bool)
    keep[first[np.argsort(typical, kind="stable")[: max(1, round(share * len(x)))]]] = True
    return keep


def _clusters(x: NDArray[np.float32], count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Spherical k-means: cluster of each row [D], and the centroids [count, E]."""
    count = min(count, len(x))
    bits = np.random.Philox(key=[seed % 2**64, 2]).random_raw(len(x))
    centroids = x[np.argsort(bits, kind="stable")[:count]]
    for _ in range(_ROUNDS):
        at = _nearest(x, centroids)
        sums = np.zeros_like(centroids)
        np.add.at(sums, at, x)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centroids = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centroids)
    return _nearest(x, centroids), centroids


def _nearest(x: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.int64]:
    parts = [(x[start : start + _ROWS] @ centroids.T).argmax(axis=1) for start in range(0, len(x), _ROWS)]
    return np.concatenate(parts)


def _semantic(
    x: NDArray[np.float32], at: NDArray[np.int64], centroids: NDArray[np.float32], similar: float
) -> NDArray[np.bool_]:
    """SemDeDup (Abbas et al. 2023): of two similar documents in a cluster, keep the one farther from the centroid."""
    keep = np.ones(len(x), bool)
    for cluster in range(len(centroids)):
        own = np.flatnonzero(at == cluster)
        own = own[np.argsort(x[own] @ centroids[cluster], kind="stable")]
        for start in range(0, len(own), _ROWS):
            rows = own[start : start + _ROWS]
            near = (x[rows] @ x[own].T) > similar
            near &= np.arange(len(own))[None] < np.arange(start, start + len(rows))[:, None]  # an earlier one
            keep[rows[near.any(axis=1)]] = False
    return keep
