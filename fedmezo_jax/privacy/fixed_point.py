"""Numbers as integers modulo 2⁶⁴, so that a secure sum of them is exact and does not depend on their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SCALE = 24
"""Fractional bits: a number is rounded to a multiple of 2⁻²⁴ ≈ 6e-8."""


def bound(count: int) -> float:
    """Largest absolute value of a number of which ``count`` are summed: the sum is then within ±2^(63 − SCALE)."""
    return 2.0 ** (62 - SCALE) / count


def encode(vector: Any, count: int) -> np.ndarray:
    """round(v·2^SCALE) as uint64, each number first bounded to ±:func:`bound`; NaN becomes 0."""
    bounded = np.clip(np.nan_to_num(np.asarray(vector, np.float64), nan=0.0), -bound(count), bound(count))
    return np.rint(bounded * 2.0**SCALE).astype(np.int64).view(np.uint64)


def decode(total: np.ndarray) -> np.ndarray:
    """The sum of such numbers, float64."""
    return total.view(np.int64) / 2.0**SCALE


def total(vectors: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The sum as a secure sum gives it, float64.

    Args:
        vectors: of the clients that stayed, ``[m]`` each.
        count: how many clients were asked.
    """
    return decode(np.asarray(np.sum([encode(vector, count) for vector in vectors], axis=0, dtype=np.uint64)))
