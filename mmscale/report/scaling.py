"""The additive law of mixed-modal scaling (arXiv 2301.03728, equations 2 and 3): fitting, intervals, the barrier.

    L(N, D)        = E + A / N^alpha + B / D^beta                                   one modality alone
    L(N, D_i, D_j) = (L_i(N, D_i) + L_j(N, D_j)) / 2 - C + A / N^alpha + B / (D_i + D_j)^beta     two together

C is the largest gain that modalities can give each other; the other two terms are their competition for a finite model
and finite data. It works on numbers, independent of runs. N parameters, D tokens, losses in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

Array = NDArray[np.float64]
FEWEST_RUNS = 6  # for five constants and a residual
FEWEST_VALUES = 3  # different values of N and of D, needed for an exponent and an asymptote
_EXPONENTS = (0.01, 3.0)
_GRID = 24  # starts per exponent
_STARTS = 3  # number of the best grid points that are refined
_HUBER = 1e-3  # threshold for log(loss), as in Chinchilla (arXiv 2203.15556, appendix D.2)
_TINY, _MOST = 1e-12, 1e3


@dataclass(frozen=True)
class Terms:
    """constant + A / N^alpha + B / D^beta.

    Attributes:
        constant: E of one modality; -C of a pair.
        A, alpha: term of a finite model.
        B, beta: term of finite data.
    """

    constant: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, parameters: Array | float, tokens: Array | float) -> Array:
        """The value for given numbers of parameters and tokens."""
        n, d = np.asarray(parameters, float), np.asarray(tokens, float)
        return self.constant + self.A * n**-self.alpha + self.B * d**-self.beta


@dataclass(frozen=True)
class Observations:
    """Runs on the same modalities, in arrays of equal length.

    Attributes:
        parameters: N.
        tokens: D of each modality (one, or two).
        loss: mean of the modalities' losses at the end.
    """

    parameters: Array
    tokens: Mapping[str, Array]
    loss: Array

    @property
    def all_tokens(self) -> Array:
        """Tokens of all modalities together."""
        return np.sum(list(self.tokens.values()), axis=0)

    def problem(self) -> str | None:
        """Why five constants cannot be determined; None: they can."""
        sizes, counts = len(np.unique(self.parameters)), len(np.unique(self.all_tokens))
        if len(self.loss) >= FEWEST_RUNS and min(sizes, counts) >= FEWEST_VALUES:
            return None
        return f"{len(self.loss)} runs of {sizes} sizes and {counts} numbers of tokens"


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        alone: terms of each modality.
        pairs: terms of each pair, by the names of both; the constant is -C.
    """

    alone: dict[str, Terms]
    pairs: dict[tuple[str, str], Terms]

    def loss(self, parameters: Array | float, tokens: Mapping[str, Array | float]) -> Array:
        """Loss of a run on one or two modalities."""
        names = tuple(tokens)
        mean = np.mean([self.alone[name](parameters, tokens[name]) for name in names], axis=0)
        if len(names) == 1:
            return np.asarray(mean)
        total = np.sum([np.asarray(count, float) for count in tokens.values()], axis=0)
        return np.asarray(mean + self.pairs[names[0], names[1]](parameters, total))


@dataclass(frozen=True)
class Fit:
    """A fitted law, with its residuals and uncertainty.

    Attributes:
        law: the best one.
        replicas: laws of resampled residuals.
        residuals: log(measured / predicted) by the names of the modalities.
    """

    law: Law
    replicas: tuple[Law, ...]
    residuals: dict[tuple[str, ...], Array]


def fit(observations: Mapping[tuple[str, ...], Observations], *, replicas: int = 200) -> Fit:
    """Fit single modalities first, then the remaining terms of each pair.

    Minimises Huber's loss of log(measured / predicted), starting from the best points of a grid of exponents; for each
    point the other constants are the solution of a linear problem. Replicas are fitted to predictions times resampled
    residuals, so that a pair's intervals include the uncertainty of both its modalities.

    Args:
        observations: by the names of the modalities, in the order of the vocabulary; `problem()` is None for each, and
            both modalities of a pair are included separately.
        replicas: number of laws for the intervals.
    """
    law = _fit(observations, None)
    predicted = {names: law.loss(seen.parameters, seen.tokens) for names, seen in observations.items()}
    residuals = {names: np.log(seen.loss / predicted[names]) for names, seen in observations.items()}
    random = np.random.default_rng(0)
    again = []
    for _ in range(replicas):
        drawn = {
            names: Observations(
                seen.parameters, seen.tokens, predicted[names] * np.exp(_resample(residuals[names], random))
            )
            for names, seen in observations.items()
        }
        again.append(_fit(drawn, law))
    return Fit(law, tuple(again), residuals)


def barrier_parameters(pair: Terms, tokens: float) -> float | None:
    """N above which two modalities help more than they compete, for a number of tokens; None: for no N."""
    gain = -pair.constant - pair.B * tokens**-pair.beta
    if gain <= 0.0:
        return None
    return float((pair.A / gain) ** (1 / pair.alpha)) if pair.A > 0.0 else 0.0


def cheapest_barrier(pair: Terms) -> tuple[float, float] | None:
    """N and D of the crossing with the smallest product, i.e. the least compute; None: there is no synergy.

    On the barrier A/N^alpha + B/D^beta = C. The product N D is smallest where alpha times the first term equals beta
    times the second (Lagrange).
    """
    synergy = -pair.constant
    if synergy <= 0.0 or pair.A <= 0.0 or pair.B <= 0.0:
        return None
    capacity = synergy * pair.beta / (pair.alpha + pair.beta)
    data = synergy - capacity
    return float((pair.A / capacity) ** (1 / pair.alpha)), float((pair.B / data) ** (1 / pair.beta))


def interval(values: Sequence[float], *, level: float = 0.9) -> tuple[float, float]:
    """Percentiles that include the middle `level` of the values."""
    low, high = np.quantile(np.asarray(values, float), [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def _fit(observations: Mapping[tuple[str, ...], Observations], start: Law | None) -> Law:
    alone = {
        names[0]: _terms(seen, np.zeros_like(seen.loss), signed=False, start=start.alone[names[0]] if start else None)
        for names, seen in observations.items()
        if len(names) == 1
    }
    pairs = {}
    for names, seen in observations.items():
        if len(names) == 2:
            mean = np.mean([alone[name](seen.parameters, seen.tokens[name]) for name in names], axis=0)
            key = (names[0], names[1])
            pairs[key] = _terms(seen, mean, signed=True, start=start.pairs[key] if start else None)
    return Law(alone, pairs)


def _terms(seen: Observations, offset: Array, *, signed: bool, start: Terms | None) -> Terms:
    """Terms that, added to the offset, give the losses; the constant may be negative if `signed`."""
    loss, n0, d0 = seen.loss, _centre(seen.parameters), _centre(seen.all_tokens)
    # Divided by their geometric means N and D are about 1, so that constants and exponents are nearly independent.
    n, d = seen.parameters / n0, seen.all_tokens / d0

    def misfit(theta: Array) -> Array:
        constant, a, alpha, b, beta = theta
        value = offset + constant + np.exp(a) * n ** -np.exp(alpha) + np.exp(b) * d ** -np.exp(beta)
        return np.log(np.maximum(value, _TINY) / loss)

    low = [-np.inf if signed else 0.0, np.log(_TINY), np.log(_EXPONENTS[0]), np.log(_TINY), np.log(_EXPONENTS[0])]
    # An upper bound of a thousand nats for a term near the runs excludes no realistic loss and prevents overflow in
    # exp().
    high = [np.inf, np.log(_MOST), np.log(_EXPONENTS[1]), np.log(_MOST), np.log(_EXPONENTS[1])]
    starts = _grid(n, d, loss, offset, signed=signed) if start is None else [_centred(start, n0, d0)]
    fits = [
        least_squares(
            misfit,
            np.clip(theta, np.array(low) + 1e-9, np.array(high) - 1e-9),
            bounds=(low, high),
            loss="huber",
            f_scale=_HUBER,
            x_scale="jac",
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
            max_nfev=2000,
        )
        for theta in starts
    ]
    constant, a, alpha, b, beta = min(fits, key=lambda found: found.cost).x
    alpha, beta = float(np.exp(alpha)), float(np.exp(beta))
    return Terms(float(constant), float(np.exp(a) * n0**alpha), alpha, float(np.exp(b) * d0**beta), beta)


def _grid(n: Array, d: Array, loss: Array, offset: Array, *, signed: bool) -> list[Array]:
    """The best starts over a grid of exponents: constant, A and B solve a non-negative linear problem for each."""
    exponents = np.geomspace(*_EXPONENTS, _GRID)
    one = np.ones_like(n)
    found = []
    for alpha in exponents:
        for beta in exponents:
            columns = [one, n**-alpha, d**-beta, *([-one] if signed else [])]
            weights, error = nnls(np.stack(columns, axis=1) / loss[:, None], (loss - offset) / loss)
            constant = weights[0] - (weights[3] if signed else 0.0)
            logs = np.log(np.maximum([weights[1], alpha, weights[2], beta], 1e-6))
            found.append((error, np.array([constant, *logs])))
    return [theta for _, theta in sorted(found, key=lambda item: item[0])[:_STARTS]]


def _centred(terms: Terms, n0: float, d0: float) -> Array:
    a, b = terms.A * n0**-terms.alpha, terms.B * d0**-terms.beta
    return np.array([terms.constant, *np.log(np.maximum([a, terms.alpha, b, terms.beta], _TINY))])


def _centre(values: Array) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _resample(residuals: Array, random: np.random.Generator) -> Array:
    """Residuals drawn again, scaled up because fitted constants make residuals too small."""
    spent = 5
    grow = np.sqrt(len(residuals) / max(1, len(residuals) - spent))
    return random.choice(residuals - residuals.mean(), len(residuals)) * grow
