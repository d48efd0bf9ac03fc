"""Frozen kernels in eight or fewer bits, which stay so while the model is trained.

Zeroth-order steps and tangents of the adapters need no gradient of these kernels, so nothing but the product itself has
to know of them. A product takes the numbers of one kernel as floats, which is exact, and multiplies by the scales:

- int8 has a scale for each output, which multiplies the result, and so has fp8, whose weights are float8_e4m3fn;
- int4 has one for each block of 32 inputs of an output. It has five significant bits, so that a weight, which is an
  integer up to 7 times its scale, is exact in bfloat16: products in float32 and in bfloat16 are of the same weights;
- Q8_0 and Q4_0 are blocks of 32 in GGUF files, with a float16 scale each;
- Q4_K and Q6_K are blocks of 256 there. Each sub-block, of 32 or 16, has an integer that multiplies the block's scale,
  and in Q4_K another for an offset. Files called Q4_K_M have both among the layers of one projection.

With ``--eight-bit-products`` the activations are rounded to eight bits too, and the product itself is one of eight-bit
numbers (``precision.py``).

The qwix package would quantise on the device, with scales whose products with integers bfloat16 rounds, and its int4
arrays take a byte a weight on the host. Its eight-bit products have no tangents of their own, which the derivative of a
rounded product needs, and it has no blocks of GGUF. Hence these few lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fedmezo_jax.errors import UserError

OwnType: TypeAlias = Literal["int8", "fp8", "int4"]
"""What weights are quantised to here."""
StoredType: TypeAlias = Literal["Q8_0", "Q4_0", "Q4_K", "Q6_K"]
"""The blocks of GGUF files that are held as they are."""
KernelType: TypeAlias = OwnType | StoredType | tuple[StoredType, ...]
"""A type; several where the layers of one projection are of several, in the order of :data:`StoredType`."""
BaseType: TypeAlias = Literal["float32", "bfloat16", "int8", "fp8", "int4", "as-stored"]
"""How the frozen weights are held: all in a float type, or the kernels of the layers in fewer bits."""

_AT_ONCE = 1 << 18  # weights quantised at a time; the temporaries are a few times as large


class _Options(Protocol):
    @property
    def base(self) -> BaseType | None: ...

    @property
    def precision(self) -> str | None: ...


class _Format(NamedTuple):
    """What a kernel of a type consists of.

    Attributes:
        block: inputs that share a block; 0 for all of them.
        values: dtype of the values.
        bits: of a weight among the values.
        scale: dtype of the scales.
        scales: how many a block has.
        subscales: dtype of the integers of its sub-blocks.
        integers: how many a block has, as they are packed.
    """

    block: int
    values: Any
    bits: int
    scale: Any
    scales: int = 1
    subscales: Any = None
    integers: int = 0


_FORMATS: dict[KernelType, _Format] = {
    "int8": _Format(0, jnp.int8, 8, jnp.float32),
    "fp8": _Format(0, jnp.float8_e4m3fn, 8, jnp.float32),
    "int4": _Format(32, jnp.uint8, 4, jnp.bfloat16),
    "Q8_0": _Format(32, jnp.int8, 8, jnp.float16),
    "Q4_0": _Format(32, jnp.uint8, 4, jnp.float16),
    "Q4_K": _Format(256, jnp.uint8, 4, jnp.float16, 2, jnp.uint8, 12),
    "Q6_K": _Format(256, jnp.uint8, 6, jnp.float16, 1, jnp.int8, 16),
}
LARGEST: dict[KernelType, int] = {"int8": 127, "fp8": 448, "int4": 7}
"""The largest number of each type."""


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale", "subscales", "which"), meta_fields=("kind",))
@dataclass(frozen=True)
class Quantised:
    """A kernel ``[…, in, out]`` of small numbers with scales.

    With several types each part has rows for the one that needs most, and layers of the others zeros behind theirs.

    Attributes:
        kind: its type.
        values: ``[…, out, in]`` in int8 and fp8, as GPUs want the kernels of eight-bit products. In the other types
            ``[…, rows, out]``: a row for each input in Q8_0; in int4 and Q4_0, byte j of the 16 of a block holds the
            entries j, in its lower bits, and j + 16, each plus 8; in Q4_K and Q6_K the bytes of a block are GGUF's.
        scale: ``[…, out, 1]`` in int8 and fp8. In the others ``[…, rows, out]``, what multiplies the numbers of each
            block of inputs; in Q4_K followed by what multiplies the offsets.
        subscales: ``[…, rows, out]``, the integers of the sub-blocks in Q4_K, packed as in GGUF, and in Q6_K.
        which: uint8 ``[…, 1, 1]``, the place of a layer's type among several.
    """

    kind: KernelType
    values: Any
    scale: Any
    subscales: Any = None
    which: Any = None


def held_as(config: _Options) -> tuple[str, OwnType | Literal["as-stored"] | None]:
    """How these options hold the weights: the dtype of floats, and what the layers' kernels are quantised to, if so.

    Floats have the type that ``base`` names, or else that of the products.
    """
    if config.base == "float32" or config.base == "bfloat16":
        return config.base, None
    return "float32" if config.precision in (None, "float32") else "bfloat16", config.base


def outputs_first(kind: KernelType) -> bool:
    """Whether the parts of a kernel of this type are ``[…, out, rows]``: its scales are of whole outputs."""
    return isinstance(kind, str) and not _FORMATS[kind].block


def check_eight_bit(eight_bit: bool, base: BaseType | None) -> None:
    """Refuses eight-bit products of kernels without one scale for each output.

    Raises:
        UserError: the base is neither int8 nor fp8.
    """
    if eight_bit and base not in ("int8", "fp8"):
        raise UserError("--eight-bit-products needs --base int8 or fp8, which have one scale for each output")


def quantised_shape(shape: tuple[int, ...], kind: KernelType | Literal["as-stored"]) -> Quantised:
    """The parts of a kernel ``[…, in, out]`` of a type as ``jax.ShapeDtypeStruct``.

    Raises:
        UserError: the inputs are no multiple of a block; or it is ``as-stored``, and there is no file.
    """
    *lead, inputs, outputs = shape
    if kind == "as-stored":
        raise UserError(
            "--base as-stored depends on a file's blocks: give int8 for Q8_0 or Q6_K, or int4 for the others"
        )
    if isinstance(kind, tuple):
        return _of_several((*lead, inputs, outputs), kind)
    form = _FORMATS[kind]
    block = form.block or inputs
    if inputs % block:
        raise UserError(
            f"--base {kind} has blocks of {block} weights, which do not divide a width of {inputs}: give int8"
        )

    def part(rows: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, outputs, rows) if outputs_first(kind) else (*lead, rows, outputs), dtype)

    blocks = inputs // block
    subscales = part(blocks * form.integers, form.subscales) if form.integers else None
    return Quantised(
        kind, part(inputs * form.bits // 8, form.values), part(blocks * form.scales, form.scale), subscales
    )


def _of_several(shape: tuple[int, ...], kinds: tuple[StoredType, ...]) -> Quantised:
    alone = [quantised_shape(shape, kind) for kind in kinds]

    def part(name: str, dtype: Any) -> jax.ShapeDtypeStruct | None:
        shapes = [own.shape for kernel in alone if (own := getattr(kernel, name)) is not None]
        return jax.ShapeDtypeStruct(max(shapes), dtype) if shapes else None

    which = jax.ShapeDtypeStruct((*shape[:-2], 1, 1), jnp.uint8)
    return Quantised(kinds, part("values", jnp.uint8), part("scale", jnp.float16), part("subscales", jnp.uint8), which)


def of_type(kernel: Quantised, kind: StoredType) -> Quantised:
    """The parts of a kernel of several types, on the host or not, as those of one; on the host they are views."""
    assert isinstance(kernel.kind, tuple)
    *lead, rows, outputs = kernel.values.shape
    inputs = rows * 8 // max(_FORMATS[each].bits for each in kernel.kind)
    like = quantised_shape((*lead, inputs, outputs), kind)

    def own(name: str) -> Any:
        shape = getattr(like, name)
        return None if shape is None else getattr(kernel, name)[..., : shape.shape[-2], :].view(shape.dtype)

    return Quantised(kind, own("values"), own("scale"), own("subscales"))


def quantise(stored: np.ndarray, target: Quantised) -> None:
    """Quantises a weight of a file, ``[out, in]``, into the arrays of one kernel on the host.

    Its kind is an :data:`OwnType`. Each weight is off by half its scale at most, or in fp8 by 1/16 of itself or the
    512th part of its scale. Beside ``stored`` this takes a few megabytes.
    """
    kind, (outputs, inputs) = target.kind, stored.shape
    width = _FORMATS[kind].block or inputs
    rows_at_once = max(1, _AT_ONCE // inputs)
    for start in range(0, outputs, rows_at_once):
        some = slice(start, start + rows_at_once)
        blocks = stored[some].astype(np.float32).reshape(-1, inputs // width, width)
        scale = np.max(np.abs(blocks), axis=-1, keepdims=True) / np.float32(LARGEST[kind])
        if kind == "int4":
            scale = _rounded_up(scale)
        numbers = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
        values = numbers.astype(target.values.dtype) if kind == "fp8" else np.rint(numbers).astype(np.int8)
        if kind == "int4":
            low, high = np.split((values + 8).view(np.uint8), 2, axis=-1)
            values = low | high << 4
        for part, numbers in ((target.values, values), (target.scale, scale)):
            by_output = part if outputs_first(kind) else part.T
            by_output[some] = numbers.reshape(len(blocks), -1)


def _rounded_up(scale: np.ndarray) -> np.ndarray:
    """The next float32 numbers of five significant bits."""
    dropped = np.uint32(2**19 - 1)
    return ((scale.view(np.uint32) + dropped) & ~dropped).view(np.float32)


def dequantised(kernel: Quantised, dtype: Any = jnp.float32) -> jax.Array:
    """The weights themselves, ``[…, in, out]``, in float32 or rounded from that to another type."""
    if isinstance(kernel.kind, tuple):
        if kernel.which.ndim > 2:
            return jax.lax.map(partial(dequantised, dtype=dtype), kernel)
        branches = [partial(dequantised, of_type(kernel, kind), dtype) for kind in kernel.kind]
        return jax.lax.switch(kernel.which[0, 0], branches)
    if outputs_first(kernel.kind):
        return (kernel.values.astype(jnp.float32) * kernel.scale).swapaxes(-1, -2).astype(dtype)
    numbers = _numbers(kernel).astype(jnp.float32)
    scale, offset = _scales(kernel)
    *lead, inputs, outputs = numbers.shape
    blocks = scale.shape[-2]
    parts = numbers.reshape(*lead, blocks, inputs // blocks, outputs) * scale[..., None, :]
    return (parts if offset is None else parts - offset[..., None, :]).reshape(numbers.shape).astype(dtype)


def operand(kernel: jax.Array | Quantised, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """The matrix ``[in, out]`` to multiply with in ``dtype``, and what multiplies the result ``[out]``, if anything."""
    if not isinstance(kernel, Quantised):
        return kernel.astype(dtype), None
    if outputs_first(kernel.kind):
        return kernel.values.T.astype(dtype), kernel.scale[:, 0]
    return dequantised(kernel, dtype), None


def _numbers(kernel: Quantised) -> jax.Array:
    """The numbers that the scales multiply, ``[…, in, out]``."""
    if kernel.kind in ("int4", "Q4_0"):
        return _fields(kernel.values, 16, (0, 4)).astype(jnp.int8) - 8
    if kernel.kind == "Q4_K":
        return _fields(kernel.values, 32, (0, 4))
    if kernel.kind == "Q6_K":
        *lead, rows, outputs = kernel.values.shape
        blocks = kernel.values.reshape(*lead, rows // 192, 192, outputs)
        low = _fields(blocks[..., :128, :], 64, (0, 4))
        high = _fields(blocks[..., 128:, :], 32, (0, 2, 4, 6), 3)
        return (low | high << 4).reshape(*lead, rows // 3 * 4, outputs).astype(jnp.int8) - 32
    return kernel.values


def _fields(packed: jax.Array, run: int, shifts: tuple[int, ...], mask: int = 15) -> jax.Array:
    """Unpacks bytes ``[…, rows, out]``: each run of so many gives as many entries for each of the shifts in turn."""
    *lead, rows, outputs = packed.shape
    runs = packed.reshape(*lead, rows // run, 1, run, outputs)
    fields = (runs >> jnp.array(shifts, jnp.uint8)[:, None, None]) & mask
    return fields.reshape(*lead, rows * len(shifts), outputs)


def _scales(kernel: Quantised) -> tuple[jax.Array, jax.Array | None]:
    """The scale of each block or sub-block, float32 ``[…, blocks, out]``, and what is taken off its weights, if so."""
    scale = kernel.scale.astype(jnp.float32)
    if kernel.subscales is None:
        return scale, None
    form = _FORMATS[kernel.kind]
    *lead, rows, outputs = kernel.subscales.shape
    packed = kernel.subscales.reshape(*lead, rows // form.integers, form.integers, outputs)
    if kernel.kind == "Q6_K":
        return (scale[..., None, :] * packed.astype(jnp.float32)).reshape(kernel.subscales.shape), None
    first, second, rest = jnp.split(packed, 3, axis=-2)  # six bits each, of which the last four keep two elsewhere
    scales = jnp.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=-2)
    offsets = jnp.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=-2)
    by_block = scale.reshape(*lead, rows // form.integers, 2, outputs)

    def of(which: int, integers: jax.Array) -> jax.Array:
        product = by_block[..., which : which + 1, :] * integers.astype(jnp.float32)
        return product.reshape(*lead, rows // form.integers * 8, outputs)

    return of(0, scales), of(1, offsets)
