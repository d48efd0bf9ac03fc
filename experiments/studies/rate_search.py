"""A search for the best fixed learning rate that does not end at an end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def search(losses_at: Callable[[float], list[float]], start: float) -> list[tuple[float, list[float]]]:
    """Losses at rates a factor of two apart, from ``start`` on until the best rate has a worse one on both sides.

    Args:
        losses_at: ``losses_at(rate) -> losses``, one for each seed; not finite where a run diverged.
        start: the first rate, η.

    Returns:
        (rate, the losses at it), by rate.
    """
    found: dict[float, list[float]] = {}
    rate = start
    while True:
        for near in (rate / 2, rate, rate * 2):
            if near not in found:
                found[near] = losses_at(near)
        lowest = min(found, key=lambda each: (_mean(found[each]), each))  # of several that diverge the lowest
        if lowest == rate:
            return sorted(found.items())
        rate = lowest


def best(found: Sequence[tuple[float, list[float]]]) -> tuple[float, list[float]]:
    """The rate with the lowest mean loss, and its losses."""
    return min(found, key=lambda pair: _mean(pair[1]))


def _mean(losses: Sequence[float]) -> float:
    return float(np.nan_to_num(np.mean(losses), nan=np.inf, posinf=np.inf))
