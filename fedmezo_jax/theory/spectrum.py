"""Trace, norm and effective rank of a Hessian, from products with vectors; the matrix is never formed.

One Lanczos run of k steps from a random sign vector v gives vᵀHv, an unbiased sample of the trace (Hutchinson); the
ends of the spectrum, from the Ritz values; and the trace of any function of H (stochastic Lanczos quadrature: Ubaru,
Chen and Saad, SIAM J. Matrix Anal. Appl. 38(4), 2017). d is the number of parameters throughout. matfree 0.6 has the
same methods, but its Lanczos run is NaN if the Krylov space ends early (H = 0, H = I).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.linalg import eigh_tridiagonal

from fedmezo_jax.core.mezo import LossFn, Params

Product: TypeAlias = Callable[[jax.Array], jax.Array]
"""``product(v) -> H·v`` for a symmetric H, both ``[d]`` float32."""


class Tridiagonal(NamedTuple):
    """The result of a Lanczos run: H projected on the k directions of the run.

    Attributes:
        diagonal: ``[k]`` float32; the first entry is the Rayleigh quotient of the start.
        below: ``[k]`` float32, the entries beside the diagonal; the last is the norm of the remainder.
    """

    diagonal: jax.Array
    below: jax.Array


class Probe(NamedTuple):
    """Estimates of H's spectrum from one Lanczos run. H may be indefinite, like the Hessian of a loss.

    Attributes:
        trace: vᵀHv with E vvᵀ = I: an unbiased sample of tr(H).
        absolute_trace: a sample of tr|H|, the sum of the eigenvalues' magnitudes.
        positive_trace: a sample of tr(H₊), the sum of the positive eigenvalues.
        largest: largest Ritz value; H's largest eigenvalue is no smaller.
        smallest: smallest Ritz value; H's smallest eigenvalue is no larger.
        norm: the largest magnitude of a Ritz value; ‖H‖ is no smaller.
        norm_residual: H has an eigenvalue within this distance of that Ritz value.
    """

    trace: float
    absolute_trace: float
    positive_trace: float
    largest: float
    smallest: float
    norm: float
    norm_residual: float


def hessian_product(loss: LossFn, params: Params, batch: Any) -> Product:
    """Returns the product with ∇²loss at the flattened ``params``: the forward derivative of the gradient.

    The gradient is linearised once, so a product costs little more than the gradient. For use inside ``jit``.
    """
    flat, unravel = ravel_pytree(params)
    return jax.linearize(lambda theta: ravel_pytree(jax.grad(loss)(unravel(theta), batch))[0], flat)[1]


def layer_mask(params: Params, layer: int | None) -> jax.Array:
    """Returns ``[d]`` float32, 1 for the parameters of ``layer`` (an index of each leaf's first axis); None: all 1."""
    ones = jax.tree.map(jnp.ones_like, params)
    if layer is not None:
        ones = jax.tree.map(lambda leaf: jnp.zeros_like(leaf).at[layer].set(1), ones)
    return ravel_pytree(ones)[0]


def random_signs(key: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns independent random signs where ``mask`` is 1 and 0 elsewhere, scaled to norm 1: ``[d]``."""
    signs = jnp.where(jax.random.bits(key, mask.shape) >> 31, 1.0, -1.0) * mask
    return signs / jnp.sqrt(jnp.sum(mask))


def lanczos(product: Product, start: jax.Array, steps: int) -> Tridiagonal:
    """Runs Lanczos with full reorthogonalisation, with one product per step.

    When the Krylov space ends early, the remaining rows are decoupled from the others and repeat the first diagonal
    entry, which lies inside the spectrum.

    Args:
        product: the product with a symmetric H.
        start: ``[d]`` float32 of norm 1.
        steps: k ≥ 1; memory for ``[k, d]`` float32 is needed.

    Returns:
        The tridiagonal matrix, ``[k]`` and ``[k]`` float32.
    """

    def step(carry, i):
        basis, vector = carry
        basis = basis.at[i].set(vector)
        image = product(vector)
        diagonal = vector @ image
        size = jnp.linalg.norm(image)
        for _ in range(2):  # a second time removes rounding errors
            image = image - (basis @ image) @ basis
        below = jnp.linalg.norm(image)
        continues = below > 1e-5 * size
        next_vector = jnp.where(continues, image / below, 0)
        return (basis, next_vector), (diagonal, jnp.where(continues, below, 0), jnp.any(vector != 0))

    basis = jnp.zeros((steps, start.size), start.dtype)
    _, (diagonal, below, alive) = jax.lax.scan(step, (basis, start), jnp.arange(steps))
    return Tridiagonal(jnp.where(alive, diagonal, diagonal[0]), below)


def read(run: Tridiagonal, dimension: int) -> Probe:
    """Returns the estimates of a run from :func:`random_signs`; ``dimension`` is that of H, or the mask's sum."""
    diagonal, below = (np.asarray(part, np.float64) for part in run)
    values, vectors = eigh_tridiagonal(diagonal, below[:-1])
    weights = vectors[0] ** 2 * dimension
    largest_index = np.argmax(np.abs(values))
    return Probe(
        trace=float(diagonal[0] * dimension),
        absolute_trace=float(weights @ np.abs(values)),
        positive_trace=float(weights @ np.maximum(values, 0)),
        largest=float(values[-1]),
        smallest=float(values[0]),
        norm=float(abs(values[largest_index])),
        norm_residual=float(below[-1] * abs(vectors[-1, largest_index])),
    )


class Estimate(NamedTuple):
    """A mean over independent samples.

    Attributes:
        mean: the mean.
        error: its standard error; NaN for one sample.
    """

    mean: float
    error: float


def estimate(samples: Any) -> Estimate:
    """Returns mean and standard error of ``[n]`` samples."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(ddof=1) / np.sqrt(samples.size) if samples.size > 1 else np.nan
    return Estimate(float(samples.mean()), float(error))


def effective_ranks(probes: list[Probe]) -> dict[str, float]:
    """Estimates the effective rank of H from its probes, by three definitions for an indefinite H.

    Returns:
        ``plain``, tr(H)/‖H‖ as in Assumption 1 (arXiv 2402.05926), which negative eigenvalues can make small or
        negative; ``positive``, tr(H₊)/‖H₊‖, with the positive semidefinite H₊ ⪰ H that the assumption's bound needs
        (NaN if H has no positive eigenvalue); and ``absolute``, tr|H|/‖H‖.
    """
    mean = {name: float(np.mean([getattr(probe, name) for probe in probes])) for name in Probe._fields[:3]}
    norm, largest = (max(getattr(probe, name) for probe in probes) for name in ("norm", "largest"))
    return {
        "plain": mean["trace"] / norm,
        "positive": mean["positive_trace"] / largest if largest > 0 else np.nan,
        "absolute": mean["absolute_trace"] / norm,
    }
