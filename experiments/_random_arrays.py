"""Random arrays made on the device, without memory beyond their own."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

DEVIATION = 0.02
"""Standard deviation of the entries, LLaMA's ``initializer_range``."""


def random_like(tree: Any, seed: int = 0) -> Any:
    """Returns arrays for a tree of ``jax.ShapeDtypeStruct``.

    Floats are uniform with mean 0 and deviation :data:`DEVIATION`. An entry is a hash of its index, so that one
    elementwise program writes it in place: JAX's generators would need several times the array for a while. Integers
    are 0, and keys those of the seed.
    """
    return jax.tree.map(partial(_array, seed=seed), tree)


def _array(leaf: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(seed, impl="threefry2x32"), leaf.shape)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return _floats(leaf.shape, leaf.dtype, jnp.uint32(seed))


@partial(jax.jit, static_argnums=(0, 1))
def _floats(shape: tuple[int, ...], dtype: Any, seed: jax.Array) -> jax.Array:
    # The integer hash "lowbias32" of C. Wellons, https://github.com/skeeto/hash-prospector
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) ^ seed
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    bits = bits ^ (bits >> 16)
    width = DEVIATION * math.sqrt(12)
    return ((bits.astype(jnp.float32) * 2.0**-32 - 0.5) * width).astype(dtype)
