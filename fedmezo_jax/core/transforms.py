"""Transforms of projected gradients between measurement and step: functions ``[n] -> [n]``, chained as in optax.

They run in the client, so that what is sent and recorded is what moves θ. Each is a ``jax.tree_util.Partial``: its
numbers are arguments of the compiled round, and a limit that changes every round compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

Transform: TypeAlias = Callable[[jax.Array], jax.Array]
"""``transform(projected_gradients) -> projected_gradients``, both ``[n]`` float32."""


def clip(limit: ArrayLike) -> Transform:
    """Clips each projected gradient to [−limit, limit]; one that is NaN becomes 0 and moves nothing."""
    return Partial(_clip, limit)


def chain(*transforms: Transform) -> Transform:
    """Applies the transforms one after the other, the first one first."""
    return Partial(_chain, transforms)


def _clip(limit: jax.Array, gradients: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(gradients), 0, jnp.clip(gradients, -limit, limit))


def _chain(transforms: tuple[Transform, ...], gradients: jax.Array) -> jax.Array:
    for transform in transforms:
        gradients = transform(gradients)
    return gradients
