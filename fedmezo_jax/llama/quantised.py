"""Frozen kernels in eight or four bits, which stay so while the model is trained.

Zeroth-order steps and tangents of the adapters need no gradient of these kernels, so nothing but the product itself has
to know of them. A product takes the integers of one kernel as floats, which is exact, and multiplies by the scales:

- int8 has a scale for each output, which multiplies the result;
- int4 has one for each block of 32 inputs of an output. It has five significant bits, so that a weight, which is an
  integer up to 7 times its scale, is exact in bfloat16: products in float32 and in bfloat16 are of the same weights;
- Q8_0 and Q4_0 are blocks of 32 in GGUF files, with a float16 scale each.

The qwix package would quantise on the device, with scales whose products with integers bfloat16 rounds, and its int4
arrays take a byte a weight on the host; hence these few lines.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fedmezo_jax.errors import UserError

KernelType: TypeAlias = Literal["int8", "int4", "Q8_0", "Q4_0"]
"""Ours, and the blocks of GGUF files that are held as they are."""
BaseType: TypeAlias = Literal["float32", "bfloat16", "int8", "int4", "as-stored"]
"""How the frozen weights are held: all in a float type, or the kernels of the layers in eight or four bits."""

BLOCK = 32
"""Inputs that share a scale at four bits."""
_AT_ONCE = 1 << 20  # weights quantised at a time; the temporaries are a few times as large


class _Options(Protocol):
    @property
    def base(self) -> BaseType | None: ...

    @property
    def precision(self) -> str | None: ...


class Quantised(NamedTuple):
    """A kernel ``[…, in, out]`` of small integers with scales.

    Attributes:
        values: int8 ``[…, in, out]``; or uint8 ``[…, in/2, out]``, where byte j of the 16 of a block holds the entries
            j, in its lower bits, and j + 16, each plus 8.
        scale: ``[…, blocks, out]``, float32 for int8, bfloat16 for int4 and float16 for GGUF's: what multiplies the
            integers of each of ``blocks`` equal parts of the inputs.
    """

    values: Any
    scale: Any


def held_as(config: _Options) -> tuple[str, KernelType | Literal["as-stored"] | None]:
    """How these options hold the weights: the dtype of floats, and what the layers' kernels are quantised to, if so.

    Floats have the type that ``base`` names, or else that of the products.
    """
    if config.base == "float32" or config.base == "bfloat16":
        return config.base, None
    return "float32" if config.precision in (None, "float32") else "bfloat16", config.base


def quantised_shape(shape: tuple[int, ...], kernels: str) -> Quantised:
    """The parts of a kernel ``[…, in, out]`` of a :data:`KernelType` as ``jax.ShapeDtypeStruct``.

    Raises:
        UserError: the inputs are no multiple of :data:`BLOCK`; or it is ``as-stored``, and there is no file.
    """
    *lead, inputs, outputs = shape
    if kernels == "as-stored":
        raise UserError("--base as-stored depends on a file's blocks: give int8 for Q8_0, or int4 for Q4_0")
    if kernels == "int8":
        return Quantised(jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct((*lead, 1, outputs), jnp.float32))
    if inputs % BLOCK:
        raise UserError(
            f"--base int4 has blocks of {BLOCK} weights, which do not divide a width of {inputs}: give int8"
        )
    blocks = (*lead, inputs // BLOCK, outputs)
    scale = jax.ShapeDtypeStruct(blocks, jnp.bfloat16 if kernels == "int4" else jnp.float16)
    if kernels == "Q8_0":
        return Quantised(jax.ShapeDtypeStruct(shape, jnp.int8), scale)
    return Quantised(jax.ShapeDtypeStruct((*lead, inputs // 2, outputs), jnp.uint8), scale)


def quantise(stored: np.ndarray, kernels: Literal["int8", "int4"], target: Quantised) -> None:
    """Quantises a weight of a file, ``[out, in]``, into the arrays of one kernel ``[in, out]`` on the host.

    Each weight is off by half its scale at most. Beside ``stored`` this takes a few megabytes.
    """
    outputs, inputs = stored.shape
    width, largest = (inputs, 127) if kernels == "int8" else (BLOCK, 7)
    rows_at_once = max(1, _AT_ONCE // inputs)
    for start in range(0, outputs, rows_at_once):
        columns = slice(start, start + rows_at_once)
        blocks = stored[columns].astype(np.float32).reshape(-1, inputs // width, width)
        scale = np.max(np.abs(blocks), axis=-1, keepdims=True) / np.float32(largest)
        if kernels == "int4":
            scale = _rounded_up(scale)
        integers = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)).astype(np.int8)
        if kernels == "int4":
            low, high = np.split((integers + 8).view(np.uint8), 2, axis=-1)
            integers = low | high << 4
        target.values[:, columns] = integers.reshape(len(blocks), -1).T
        target.scale[:, columns] = scale[..., 0].T


def _rounded_up(scale: np.ndarray) -> np.ndarray:
    """The next float32 numbers of five significant bits."""
    dropped = np.uint32(2**19 - 1)
    return ((scale.view(np.uint32) + dropped) & ~dropped).view(np.float32)


def dequantised(kernel: Quantised) -> jax.Array:
    """The weights themselves, float32 ``[…, in, out]``."""
    integers = _integers(kernel)
    *lead, inputs, outputs = integers.shape
    blocks = kernel.scale.shape[-2]
    parts = integers.astype(jnp.float32).reshape(*lead, blocks, inputs // blocks, outputs)
    return (parts * kernel.scale[..., None, :].astype(jnp.float32)).reshape(integers.shape)


def operand(kernel: jax.Array | Quantised, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """The matrix ``[in, out]`` to multiply with in ``dtype``, and what multiplies the result ``[out]``, if anything."""
    if not isinstance(kernel, Quantised):
        return kernel.astype(dtype), None
    if kernel.scale.shape[-2] == 1:
        return _integers(kernel).astype(dtype), kernel.scale[0]
    return dequantised(kernel).astype(dtype), None


def _integers(kernel: Quantised) -> jax.Array:
    if kernel.values.dtype != jnp.uint8:
        return kernel.values
    *lead, half, outputs = kernel.values.shape
    packed = kernel.values.reshape(*lead, half // (BLOCK // 2), 1, BLOCK // 2, outputs)
    unpacked = (packed >> jnp.array([0, 4], jnp.uint8)[:, None, None]) & 15
    return unpacked.reshape(*lead, 2 * half, outputs).astype(jnp.int8) - 8
