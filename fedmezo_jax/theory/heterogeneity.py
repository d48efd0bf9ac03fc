"""How much clients' gradients differ, measured by back-propagation: the reference for a heterogeneity index.

:func:`fedmezo_jax.data.partition.category_distances` measures how much their data differ.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedmezo_jax.core.mezo import LossFn, Params


def gradients(loss: LossFn, params: Params, batches: Any) -> jax.Array:
    """Returns the flat gradient on each of n batches (leaves ``[n, …]``), computed in turn: ``[n, d]`` float32."""
    return jax.lax.map(lambda batch: ravel_pytree(jax.grad(loss)(params, batch))[0], batches)


def disparity(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns unbiased estimates of ‖∇f − ∇f_i‖² with ∇f = mean_i ∇f_i: ``[N]``.

    The squared norm of noisy gradients is too large by the variance of the noise, especially with few examples. The
    inner product of two independent estimates is unbiased; it may be negative.

    Args:
        first: ``[N, d]``, each client's gradient on one half of its sample.
        second: ``[N, d]``, each client's gradient on the other half.
    """
    first_deviation, second_deviation = (half - jnp.mean(half, axis=0) for half in (first, second))
    return jnp.sum(first_deviation * second_deviation, axis=1)
