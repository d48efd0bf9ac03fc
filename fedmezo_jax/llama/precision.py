"""Products with frozen weights, at a chosen precision.

A projected gradient is the difference of two nearly equal losses, so rounding that a single forward pass would forgive
drowns it: with bfloat16 inputs its error is larger than itself at the paper's μ. ``paired`` keeps the speed of bfloat16
and loses that error. Both points of a pair run side by side and every frozen product is taken on their mean and
half-difference,

    m = (x₊ + x₋)/2,   d = (x₊ − x₋)/2,   W·x± = W·m ± W·d,

which is the same in exact arithmetic. Rounding m to bfloat16 changes both losses alike and cancels in L₊ − L₋; rounding
d is relative to d, which is small. Everything but these products stays in float32.

Relative error of the projected gradient on SmolLM2-135M and GSM8K (``python -m experiments.benchmarks.precision``):

    μ           3e-4     1e-3     3e-3     1e-2
    float32    0.3 %    0.2 %    0.5 %    5.7 %
    bfloat16   693 %    204 %     77 %     24 %
    paired     3.1 %    2.1 %    1.3 %    5.4 %
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fedmezo_jax.llama.quantised import LARGEST, Quantised, operand

Precision: TypeAlias = Literal["float32", "bfloat16", "paired"]
PAIR = "pair"
"""The ``vmap`` axis, of size 2 in the order (+, −), under which ``paired`` must run."""


def default_precision(sixteen_bit: bool, differentiated: bool = False) -> tuple[Precision, str]:
    """The precision to use where none is asked for, and the reason.

    Args:
        sixteen_bit: whether the model's weights have at most sixteen bits.
        differentiated: whether slopes are derivatives of the loss and not differences of its values at θ ± μz.
    """
    if not sixteen_bit:
        return "float32", "the weights have 32 bits"
    if differentiated and jax.default_backend() == "cpu":
        return "float32", "derivatives in bfloat16 are no faster on a CPU"
    if differentiated:
        return "bfloat16", "the weights have at most sixteen bits"
    if jax.default_backend() == "cpu" and not _multiplies_bfloat16():
        return "float32", "this CPU has no bfloat16 products, without which paired is slower"
    return "paired", "the weights have at most sixteen bits, and this device multiplies bfloat16"


def _multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU has bfloat16 products (AVX-512, AMX or Arm's); False where that cannot be read."""
    try:
        flags = cpuinfo.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


_LEAST_ROWS = 64


def least_rows(precision: Precision, clients: int) -> int:
    """How many rows each client's products need, so that a client's numbers do not depend on who it runs with.

    Under ``vmap`` the rows of all clients are one product. XLA's float32 product for CPUs sums a row in another order
    where there are few rows in all: below 56 at width 128 and below 40 at width 576, on two cores. With at least 64
    rows in all, a client that runs alone gets the bits that it gets among others.

    Args:
        precision: of the products.
        clients: how many clients run at once.
    """
    return -(-_LEAST_ROWS // clients) if _by_shape(precision) else 1


def least_clients(precision: Precision, batch_size: int) -> int:
    """How many clients must run at once, so that a client's numbers do not depend on who it runs with.

    A program for a single example on a CPU is fused otherwise than one for several: a client that runs alone on batches
    of one example runs beside a copy of itself, at twice the work. A pair (``paired``) is two examples already.
    """
    alone = batch_size == 1 and precision != "paired"
    return 2 if alone and jax.default_backend() == "cpu" else 1


def _by_shape(precision: Precision) -> bool:
    """Whether the order of a sum depends on how many rows there are."""
    return precision == "float32" and jax.default_backend() == "cpu"


class Products(NamedTuple):
    """How products with frozen weights are computed.

    Attributes:
        precision: dtype of the inputs of a product, see the module.
        least_rows: fewer rows than this are filled up with zeros for the product.
        eight_bit: whether kernels in int8 or fp8 are multiplied by activations in eight bits, see
            :func:`_eight_bit_product`.
    """

    precision: Precision
    least_rows: int = 1
    eight_bit: bool = False


def frozen_product(x: jax.Array, kernel: jax.Array | Quantised, products: Products) -> jax.Array:
    """``x @ kernel`` with float32 accumulation.

    Args:
        x: ``[..., in]`` float32 activations.
        kernel: ``[in, out]`` frozen weights, quantised or of any float dtype; the same for all clients and both points
            of a pair.
        products: how.

    Returns:
        ``[..., out]`` float32.
    """
    rows = x.size // x.shape[-1]
    if rows < products.least_rows:
        filled = jnp.pad(x.reshape(rows, -1), [(0, products.least_rows - rows), (0, 0)])
        return frozen_product(filled, kernel, products)[:rows].reshape(*x.shape[:-1], -1)
    eight_bit = products.eight_bit and isinstance(kernel, Quantised)
    if products.precision != "paired":
        return (
            _eight_bit_product(x, kernel, products.precision) if eight_bit else _product(x, kernel, products.precision)
        )
    sign = 1.0 - 2.0 * jax.lax.axis_index(PAIR).astype(jnp.float32)
    plus, minus = jax.lax.all_gather(x, PAIR)  # not a mean over the axis: XLA's reductions on CPUs are slow
    mean, difference = (plus + minus) / 2, (plus - minus) / 2
    if eight_bit:
        return _eight_bit_product(mean, kernel, "bfloat16") + sign * _product(difference, kernel, "bfloat16")
    mean, difference = _product(jnp.stack([mean, difference]), kernel, "bfloat16")
    return mean + sign * difference


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _eight_bit_product(x: jax.Array, kernel: Quantised, precision: Precision) -> jax.Array:
    """``x @ kernel`` with each row of x rounded to the kernel's type, at a scale of its own.

    A rounded product is a step function of x, whose derivative is 0 or infinite. Its tangent is that of the product
    that it stands for: that of x without rounding, in ``precision``.
    """
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LARGEST[kernel.kind]
    numbers = x / jnp.where(scale > 0, scale, 1)
    if kernel.kind == "int8":
        y = jnp.matmul(jnp.round(numbers).astype(jnp.int8), kernel.values.T, preferred_element_type=jnp.int32)
    else:
        y = jnp.matmul(numbers.astype(kernel.values.dtype), kernel.values.T, preferred_element_type=jnp.float32)
    return y.astype(jnp.float32) * scale * kernel.scale[:, 0]


@_eight_bit_product.defjvp
def _eight_bit_tangent(precision: Precision, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (moved, _) = primals, tangents
    return _eight_bit_product(x, kernel, precision), _product(moved, kernel, precision)


def _product(x: jax.Array, kernel: jax.Array | Quantised, precision: Precision) -> jax.Array:
    """``x @ kernel`` at one point, in float32 or bfloat16."""
    weights, scale = operand(kernel, jnp.float32 if precision == "float32" else jnp.bfloat16)
    y = product(x, weights) if precision == "float32" else _bfloat16_product(x, weights)
    return y if scale is None else y * scale


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x @ y`` in full float32: accelerators would otherwise round float32 inputs to fewer bits."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def keep_in_loop(weights: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights to be sliced at the index of a loop, and the index; both as they are.

    XLA's compiler for CPUs slices bfloat16 by way of float32, and would take the conversion of all weights out of the
    loop: a float32 copy of the base. What depends on the index stays inside.
    """
    return jax.lax.optimization_barrier((weights, index))


def unfused(sums: jax.Array) -> jax.Array:
    """Sums over an axis, as they are, which XLA must not fuse with what follows.

    Whether it would depends on the size of the arrays, and the order of the sum on whether it does: a client's tangents
    would depend on how many clients run at once.
    """
    return jax.lax.optimization_barrier(sums)


def _bfloat16_product(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(jnp.bfloat16), weights, preferred_element_type=jnp.float32)


WARN_ABOVE = 0.2
"""Relative error of a projected gradient above which a run should be warned."""
# Rounding of a loss, and of a difference of losses relative to it.
_ROUNDING: dict[Precision, tuple[float, float]] = {
    "float32": (1e-6, 0),
    "paired": (1e-6, 0.02),
    "bfloat16": (1.8e-3, 0),
}


def expected_error(precision: Precision, scale: float) -> float:
    """The relative error of the projected gradient to expect at perturbation scale μ.

    √((ρ/μ)² + δ² + (c·μ²)²): the losses' rounding grows as they approach each other, and their third derivative with
    their distance. ρ, δ and c are fitted to ``python -m experiments.benchmarks.precision`` on SmolLM2-135M and GSM8K;
    another model's differ, and that command measures them.
    """
    loss, difference = _ROUNDING[precision]
    return math.hypot(loss / scale, difference, 350 * scale**2)
