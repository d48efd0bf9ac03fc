"""How far apart clients really are, measured by back-propagation: what a heterogeneity index ought to follow.

:func:`fedmezo_jax.data.partition.category_distances` says how far apart their data are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedmezo_jax.core.mezo import LossFn, Params


def gradients(loss: LossFn, params: Params, batches: Any) -> jax.Array:
    """``[n, d]`` float32: the flat gradient on each of n batches (leaves ``[n, …]``), one after the other."""
    return jax.lax.map(lambda batch: ravel_pytree(jax.grad(loss)(params, batch))[0], batches)


def disparity(first: jax.Array, second: jax.Array) -> jax.Array:
    """‖∇f − ∇f_i‖² with ∇f = mean_i ∇f_i, without the bias that the sampling of rows brings: ``[N]``.

    A squared norm of noisy gradients is too large by the variance of the noise, most of all where rows are few. The
    inner product of two independent estimates is not; it may come out below zero.

    Args:
        first: ``[N, d]``, each client's gradient on one half of its sample.
        second: ``[N, d]``, on the other half.
    """
    one, other = (half - jnp.mean(half, axis=0) for half in (first, second))
    return jnp.sum(one * other, axis=1)
