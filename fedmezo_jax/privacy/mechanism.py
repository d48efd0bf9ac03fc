"""The Gaussian mechanism on clients' numbers: bound each client's vector in norm, add noise.

The noise of a simulation comes from the run's seed, so that the run can be repeated. Whoever has the seed can take it
off again: a simulation shows what privacy costs, and protects nobody. A deployed run draws its noise from the operating
system.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias

import numpy as np

from fedmezo_jax.data.seeding import generator


class Draw(Protocol):
    """A source of noise, such as a :class:`numpy.random.Generator`."""

    def standard_normal(self, size: Any) -> np.ndarray:
        """Independent standard normal numbers, float64, of a shape."""
        ...


Noise: TypeAlias = Callable[[int, int, int], Draw]
"""``noise(round, attempt, client) -> Draw``: the source of a client, or of the :data:`SERVER`, in an attempt at a
round."""
SERVER = -1


def clip(vector: np.ndarray, norm: float) -> np.ndarray:
    """The vector, float64, shortened to this L2 norm if it is longer; zero if a number in it is not finite."""
    vector = np.asarray(vector, np.float64)
    if not np.all(np.isfinite(vector)):
        return np.zeros_like(vector)
    length = float(np.linalg.norm(vector))
    return vector * (norm / length) if length > norm else vector


def noisy_mean(
    vectors: Iterable[np.ndarray], count: int, norm: float, noise: float, draw: Draw, size: int
) -> np.ndarray:
    """(Σ_i clip(v_i, C) + N(0, σ²C²))/P, ``[size]`` float32.

    Args:
        vectors: of the clients that answered, ``[size]`` each.
        count: P, how many were asked: a constant, so that the mean does not tell how many answered.
        norm: C.
        noise: σ.
        draw: of the noise.
        size: entries of a vector.
    """
    total = np.zeros(size)
    for vector in vectors:
        total += clip(vector, norm)
    return ((total + noise * norm * draw.standard_normal(size)) / count).astype(np.float32)


def noisy(vector: np.ndarray, norm: float, noise: float, draw: Draw) -> np.ndarray:
    """clip(v, C) + N(0, σ²C²), float32: what a client sends where its numbers are released as they are."""
    vector = clip(vector, norm)
    return (vector + noise * norm * draw.standard_normal(vector.shape)).astype(np.float32)


class SystemDraw:
    """Noise from the operating system's cryptographic source, which nobody can draw again."""

    def standard_normal(self, size: Any) -> np.ndarray:
        """See :class:`Draw`: Φ⁻¹ of uniform numbers of 53 bits."""
        from scipy.special import ndtri

        words = np.frombuffer(os.urandom(8 * int(np.prod(size))), np.uint64).reshape(size)
        return ndtri(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def system_noise(round_index: int, attempt: int, client: int = SERVER) -> Draw:
    """The source of a deployed run's noise: a :data:`Noise`."""
    del round_index, attempt, client
    return SystemDraw()


def simulated_noise(seed: int, round_index: int, attempt: int, client: int = SERVER) -> np.random.Generator:
    """The source of a simulation's noise in an attempt at a round: the server's, or one client's.

    With its seed fixed it is a :data:`Noise`.
    """
    return generator(seed, "privacy", round_index, attempt, client + 1)
