"""Products with frozen weights, at a chosen precision.

A projected gradient is the difference of two nearly equal losses, so rounding that a single forward pass would forgive
drowns it: with bfloat16 inputs its error is larger than itself at the paper's μ. ``paired`` keeps the speed of bfloat16
and loses that error. Both points of a pair run side by side and every frozen product is taken on their mean and
half-difference,

    m = (x₊ + x₋)/2,   d = (x₊ − x₋)/2,   W·x± = W·m ± W·d,

which is the same in exact arithmetic. Rounding m to bfloat16 changes both losses alike and cancels in L₊ − L₋; rounding
d is relative to d, which is small. Everything but these products stays in float32.

Measured by ``python -m experiments.precision`` on SmolLM2-135M and GSM8K, relative error of the projected gradient:

    μ           3e-4     1e-3     3e-3     1e-2
    float32    0.4 %   0.08 %    0.3 %    3.4 %
    bfloat16   426 %    213 %     60 %     18 %
    paired     1.2 %    2.0 %    2.3 %    2.7 %
"""

import math
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
    plus, minus = jax.lax.all_gather(x, PAIR)  # not a mean over the axis: XLA's reductions on CPUs are slow
    halves = jnp.stack([(plus + minus) / 2, (plus - minus) / 2])
    mean, difference = _bfloat16_product(halves, kernel)
    return mean + sign * difference


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x @ y`` in full float32: accelerators would otherwise round float32 inputs to fewer bits."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def in_loop(weights: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights to be sliced at the index of a loop, and the index; both as they are.

    XLA's compiler for CPUs slices bfloat16 by way of float32, and would take the conversion of all weights out of the
    loop: a float32 copy of the base. What depends on the index stays inside.
    """
    return jax.lax.optimization_barrier((weights, index))


def _bfloat16_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


WORRYING = 0.2
"""Relative error of a projected gradient above which a run should be warned."""
# Rounding of a loss, and of a difference of losses relative to it.
_ROUNDING: dict[Precision, tuple[float, float]] = {
    "float32": (1e-6, 0),
    "paired": (1e-6, 0.02),
    "bfloat16": (1.8e-3, 0),
}


def likely_error(precision: Precision, scale: float) -> float:
    """The relative error of the projected gradient to expect at perturbation scale μ.

    √((ρ/μ)² + δ² + (c·μ²)²): the losses' rounding grows as they approach each other, and their third derivative with
    their distance. ρ, δ and c are fitted to ``python -m experiments.precision`` on SmolLM2-135M and GSM8K; another
    model's differ, and that command measures them.
    """
    loss, difference = _ROUNDING[precision]
    return math.hypot(loss / scale, difference, 350 * scale**2)
