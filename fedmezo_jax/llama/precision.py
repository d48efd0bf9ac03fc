"""Products with frozen weights, at a chosen precision.

A projected gradient is the difference of two nearly equal losses, so rounding that a single forward pass would forgive
drowns it: with bfloat16 inputs its error is tens of per cent at the paper's μ. ``paired`` keeps the speed of bfloat16
and loses that error. Both points of a pair run side by side and every frozen product is taken on their mean and
half-difference,

    m = (x₊ + x₋)/2,   d = (x₊ − x₋)/2,   W·x± = W·m ± W·d,

which is the same in exact arithmetic. Rounding m to bfloat16 changes both losses alike and cancels in L₊ − L₋; rounding
d is relative to d, which is small. Everything but these products stays in float32.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

Precision: TypeAlias = Literal["float32", "bfloat16", "paired"]
PAIR = "pair"
"""The ``vmap`` axis, of size 2 in the order (+, −), under which ``paired`` must run."""


def frozen_product(x: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
    """``x @ kernel`` with float32 accumulation.

    Args:
        x: ``[..., in]`` float32 activations.
        kernel: ``[in, out]`` frozen weights of any float dtype, the same for all clients and both points of a pair.
        precision: dtype of the inputs of the product, see the module.

    Returns:
        ``[..., out]`` float32.
    """
    if precision == "float32":
        return product(x, kernel.astype(jnp.float32))
    if precision == "bfloat16":
        return _bfloat16_product(x, kernel)
    sign = 1.0 - 2.0 * jax.lax.axis_index(PAIR).astype(jnp.float32)
    halves = jnp.stack([jax.lax.pmean(x, PAIR), jax.lax.pmean(sign * x, PAIR)])
    mean, difference = _bfloat16_product(halves, kernel)
    return mean + sign * difference


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x @ y`` in full float32: accelerators would otherwise round float32 inputs to fewer bits."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _bfloat16_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
