"""Robust aggregation: what K vectors, some of which may be lies, say together.

A rule is a function ``rule(vectors, liars) -> [d]`` on the host. ``vectors`` is ``[K, d]`` float64, one row a client;
all clients count alike. ``liars`` is f, how many of the K may lie; rules that need no such number ignore it.

The rows must mean the same for all clients. Updates θ_i − θ do. Coefficients do where directions are shared: client i's
update is then −Σ_k c_ik·z_k, and the squared length of Σ_k a_k·z_k is D·‖a‖², up to a relative error of about √(m/D)
for m directions z_k of D entries. So the distances between coefficients are those between updates, divided by √D, and
the rules that go by distances choose the same clients. So does the rule that goes by angles and ratios of lengths,
which do not depend on √D. The median and the trimmed mean go by axes: along directions they are other rules than along
the entries of θ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

Rule: TypeAlias = Callable[[np.ndarray, int], np.ndarray]
"""``rule(vectors, liars) -> [d]``."""

_STEPS, _TOLERANCE = 200, 1e-10
"""Of Weiszfeld's iteration: most steps, and the step, in typical distances, at which it ends."""


def median(vectors: np.ndarray, liars: int) -> np.ndarray:
    """The median of each entry (arXiv 1803.01498): fewer than half of the clients cannot move it beyond the others."""
    del liars
    return np.median(vectors, axis=0)


def trimmed_mean(vectors: np.ndarray, liars: int) -> np.ndarray:
    """The mean of each entry without its f largest and f smallest values (arXiv 1803.01498)."""
    cut = min(liars, (len(vectors) - 1) // 2)
    return np.mean(np.sort(vectors, axis=0)[cut : len(vectors) - cut], axis=0)


def krum(vectors: np.ndarray, liars: int) -> np.ndarray:
    """The vector whose K − f − 2 nearest others are nearest (arXiv 1703.02757)."""
    return vectors[np.argmin(_krum_scores(vectors, liars))]


def multi_krum(vectors: np.ndarray, liars: int) -> np.ndarray:
    """The mean of the K − f vectors with the best scores of :func:`krum`."""
    return _mean_of_best(vectors, _krum_scores(vectors, liars), liars)


def polar_krum(vectors: np.ndarray, liars: int) -> np.ndarray:
    """:func:`multi_krum` by angles and ratios of lengths, so that honest clients with long vectors are not mistaken.

    Its squared distance is ‖a/‖a‖ − b/‖b‖‖² + log²(‖a‖/‖b‖). By plain distances long vectors lie far from all others,
    whatever way they point, and are left out before a vector of usual length that points the wrong way.
    """
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    polar = np.hstack([vectors / lengths, np.log(lengths)])
    return _mean_of_best(vectors, _krum_scores(polar, liars), liars)


def geometric_median(vectors: np.ndarray, liars: int) -> np.ndarray:
    """The point with the least sum of distances to all vectors, by Weiszfeld's iteration (arXiv 1912.13445)."""
    del liars
    point = np.median(vectors, axis=0)  # where the iteration begins may not be moved far either
    for _ in range(_STEPS):
        distances = np.linalg.norm(vectors - point, axis=1)
        typical = np.median(distances)
        if not typical:  # half of the vectors or more are one, which then is the median
            break
        pull = 1 / np.maximum(distances, 1e-12 * typical)  # one of the vectors may be the median
        before, point = point, np.sum(pull[:, None] * vectors, axis=0) / np.sum(pull)
        if np.linalg.norm(point - before) <= _TOLERANCE * typical:
            break
    return point


def _mean_of_best(vectors: np.ndarray, scores: np.ndarray, liars: int) -> np.ndarray:
    """The mean of the K − f vectors with the lowest scores."""
    best = np.argsort(scores, kind="stable")[: len(vectors) - liars]
    return np.mean(vectors[np.sort(best)], axis=0)


def _krum_scores(vectors: np.ndarray, liars: int) -> np.ndarray:
    """``[K]`` sums of the squared distances to the K − f − 2 nearest others, or to the nearest if that is none."""
    squared = np.array([np.sum((vectors - vector) ** 2, axis=1) for vector in vectors])
    nearest = max(1, len(vectors) - liars - 2)
    return np.sum(np.sort(squared, axis=1)[:, 1 : nearest + 1], axis=1)


RULES: Mapping[str, Rule] = {
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
    "polar-krum": polar_krum,
    "geometric-median": geometric_median,
}
"""By their name on the command line."""
BY_NEAREST = frozenset({"krum", "multi-krum", "polar-krum"})
"""Rules that take at least 2f + 3 clients: a client's K − f − 2 nearest others are then more than the liars."""
