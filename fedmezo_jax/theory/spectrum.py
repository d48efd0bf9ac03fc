"""The spectrum of a Hessian that is never formed: trace, norm and effective rank from products with vectors.

A Lanczos run of k steps from a random sign vector v tells at once: vᵀHv, an unbiased sample of the trace (Hutchinson);
the ends of the spectrum, from the Ritz values; and the trace of any function of H (stochastic Lanczos quadrature:
Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38(4), 2017). d is the number of parameters throughout.
matfree 0.6 has the same methods, but its Lanczos run is NaN where the Krylov space ends early (H = 0, H = I).
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
    """What a Lanczos run leaves: H as seen by the k directions that it went through.

    Attributes:
        diagonal: ``[k]`` float32; the first entry is the Rayleigh quotient of the start.
        below: ``[k]`` float32, the entries beside the diagonal; the last is the norm of what lies outside.
    """

    diagonal: jax.Array
    below: jax.Array


class Probe(NamedTuple):
    """What one Lanczos run says of H's spectrum. H may be indefinite, as a loss's Hessian is.

    Attributes:
        trace: vᵀHv with E vvᵀ = I: an unbiased sample of tr(H).
        absolute_trace: a sample of tr|H|, the sum of the eigenvalues' sizes.
        positive_trace: a sample of tr(H₊), the sum of the positive eigenvalues.
        largest: largest Ritz value; H's largest eigenvalue is no smaller.
        smallest: smallest Ritz value; H's smallest eigenvalue is no larger.
        norm: the larger of their sizes; ‖H‖ is no smaller.
        norm_residual: H has an eigenvalue within this distance of the Ritz value that is the norm.
    """

    trace: float
    absolute_trace: float
    positive_trace: float
    largest: float
    smallest: float
    norm: float
    norm_residual: float


def hessian_product(loss: LossFn, params: Params, batch: Any) -> Product:
    """The product with ∇²loss at ``params`` laid flat: the forward derivative of the gradient.

    The gradient is linearised once, so that a product costs little more than the gradient. For use inside ``jit``.
    """
    flat, unravel = ravel_pytree(params)
    return jax.linearize(lambda theta: ravel_pytree(jax.grad(loss)(unravel(theta), batch))[0], flat)[1]


def layer_mask(params: Params, layer: int | None) -> jax.Array:
    """``[d]`` float32, 1 where a parameter belongs to ``layer`` (an index of each leaf's first axis); None: all 1."""
    ones = jax.tree.map(jnp.ones_like, params)
    if layer is not None:
        ones = jax.tree.map(lambda leaf: jnp.zeros_like(leaf).at[layer].set(1), ones)
    return ravel_pytree(ones)[0]


def random_signs(key: jax.Array, mask: jax.Array) -> jax.Array:
    """Independent signs where ``mask`` is 1 and 0 elsewhere, scaled to norm 1."""
    signs = jnp.where(jax.random.bits(key, mask.shape) >> 31, 1.0, -1.0) * mask
    return signs / jnp.sqrt(jnp.sum(mask))


def lanczos(product: Product, start: jax.Array, steps: int) -> Tridiagonal:
    """Lanczos with full reorthogonalisation, one product a step.

    Args:
        product: of a symmetric H.
        start: ``[d]`` float32 of norm 1.
        steps: k ≥ 1; ``[k, d]`` float32 are held.

    Once H leads out of the directions' span no more, the rows that remain are decoupled from the others and repeat the
    first diagonal entry, which lies inside the spectrum.
    """

    def step(carry, i):
        basis, vector = carry
        basis = basis.at[i].set(vector)
        image = product(vector)
        diagonal = vector @ image
        size = jnp.linalg.norm(image)
        for _ in range(2):  # once leaves rounding behind
            image = image - (basis @ image) @ basis
        below = jnp.linalg.norm(image)
        goes_on = below > 1e-5 * size
        following = jnp.where(goes_on, image / below, 0)
        return (basis, following), (diagonal, jnp.where(goes_on, below, 0), jnp.any(vector != 0))

    basis = jnp.zeros((steps, start.size), start.dtype)
    _, (diagonal, below, alive) = jax.lax.scan(step, (basis, start), jnp.arange(steps))
    return Tridiagonal(jnp.where(alive, diagonal, diagonal[0]), below)


def read(run: Tridiagonal, dimension: int) -> Probe:
    """What a run from :func:`random_signs` says of an H of ``dimension`` (of the mask's ones, for a masked H)."""
    diagonal, below = (np.asarray(part, np.float64) for part in run)
    values, vectors = eigh_tridiagonal(diagonal, below[:-1])
    weights = vectors[0] ** 2 * dimension
    widest = np.argmax(np.abs(values))
    return Probe(
        trace=float(diagonal[0] * dimension),
        absolute_trace=float(weights @ np.abs(values)),
        positive_trace=float(weights @ np.maximum(values, 0)),
        largest=float(values[-1]),
        smallest=float(values[0]),
        norm=float(abs(values[widest])),
        norm_residual=float(below[-1] * abs(vectors[-1, widest])),
    )


class Estimate(NamedTuple):
    """A mean over independent samples and its standard error (NaN for one sample)."""

    mean: float
    error: float


def estimate(samples: Any) -> Estimate:
    """Mean and standard error of ``[n]`` samples."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(ddof=1) / np.sqrt(samples.size) if samples.size > 1 else np.nan
    return Estimate(float(samples.mean()), float(error))


def effective_ranks(probes: list[Probe]) -> dict[str, float]:
    """Effective ranks of one H from its probes, by three readings of an indefinite H.

    Returns:
        ``plain``, tr(H)/‖H‖ as Assumption 1 writes it (arXiv 2402.05926), which negative eigenvalues can make small or
        negative; ``positive``, tr(H₊)/‖H₊‖, of the positive semidefinite H₊ ⪰ H that the assumption's bound needs (NaN
        where H has no positive eigenvalue); and ``absolute``, tr|H|/‖H‖.
    """
    mean = {name: float(np.mean([getattr(probe, name) for probe in probes])) for name in Probe._fields[:3]}
    norm, largest = (max(getattr(probe, name) for probe in probes) for name in ("norm", "largest"))
    return {
        "plain": mean["trace"] / norm,
        "positive": mean["positive_trace"] / largest if largest > 0 else np.nan,
        "absolute": mean["absolute_trace"] / norm,
    }
