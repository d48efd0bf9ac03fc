"""Checks of a model: token ids within its vocabulary, weights that do not overflow, finite outputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import layout
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.model import Base, Lora
from fedmezo_jax.llama.quantised import Quantised, dequantised


def check_ids(largest: int, config: LlamaConfig, name: object) -> None:
    """Checks that token ids are within the vocabulary; JAX would silently look up the embedding's last row.

    Args:
        largest: the largest id.
        config: the model's config.
        name: what the message calls the model.

    Raises:
        UserError: the id is beyond the vocabulary.
    """
    if largest >= config.vocab_size:
        raise UserError(
            f"{name}: its tokenizer makes token {largest}, but the model's vocabulary has {config.vocab_size}: "
            "give the tokenizer that belongs to the model"
        )


def check_finite(finite: bool, what: str, config: LlamaConfig, base: Base, lora: Lora, name: object) -> None:
    """Reports a model whose outputs overflow although all its weights are finite.

    Args:
        finite: whether its outputs are finite.
        what: what the message calls the outputs, in the plural.
        config: the model's config.
        base: its frozen weights.
        lora: the adapter, ``{}`` for none.
        name: what the message calls the model.

    Raises:
        UserError: the outputs are not finite; names the largest weights.
    """
    if finite:
        return
    weight, size = largest_weight(config, base)
    adapter = ""
    if lora:
        sizes = {target: max(float(np.abs(half).max()) for half in halves.values()) for target, halves in lora.items()}
        target = max(sizes, key=lambda target: sizes[target])
        adapter = f", and of the adapter {sizes[target]:.3g} in {target}"
    raise UserError(
        f"{name}: the {what} are not finite, although the weights are; the largest weight is {size:.3g} in "
        f"{weight}{adapter}: fetch the model{' and the adapter' if lora else ''} again, or give another"
    )


def check_tensor(tensor: np.ndarray, name: str, file: object) -> None:
    """Checks that the entries of a tensor are finite, and that their squares are finite in float32.

    Activations of such a size would make normalised values zero, and the outputs finite but meaningless.

    Args:
        tensor: the tensor, in the dtype that the model computes with.
        name: Hugging Face's name.
        file: the tensor's file, for the message.

    Raises:
        UserError: an entry is not finite or too large.
    """
    size = largest_magnitude(tensor)
    if not math.isfinite(size):
        raise UserError(f"{file}: {name} is not finite in {tensor.dtype}; fetch the file again")
    if size > _LARGEST:
        raise UserError(
            f"{file}: {name} holds a weight of {size:.3g}, whose square overflows float32: fetch the model again, or "
            "give another"
        )


_LARGEST = float(np.sqrt(np.finfo(np.float32).max))


def largest_magnitude(tensor: np.ndarray) -> float:
    """Returns the largest magnitude in a tensor of floats, without a copy of it; infinite or NaN if an entry is.

    Without the sign bit, floats have the same order as the integers with the same bits; infinity and NaN are largest.
    Among integers without a sign the largest is the largest negative float, and among signed ones the largest positive.
    """
    bits = [int(np.max(tensor.view(f"{sign}{tensor.itemsize}"))) for sign in "ui"]
    without_sign = (1 << 8 * tensor.itemsize - 1) - 1
    largest = np.array(max(pattern & without_sign for pattern in bits), f"u{tensor.itemsize}")
    return float(largest.view(tensor.dtype))


def largest_weight(config: LlamaConfig, base: Base) -> tuple[str, float]:
    """Returns Hugging Face's name of the tensor with the largest weight, and the magnitude of this weight."""
    largest_by_path: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(jax.device_get(_largest(base)))
    path = max(largest_by_path, key=lambda path: largest_by_path[path].size)
    size, layer = largest_by_path[path]
    return next(
        (name, float(size))
        for name, slot in layout(config).items()
        if slot.path == path and slot.layer in (None, int(layer))
    )


class _Largest(NamedTuple):
    """The largest magnitude in a leaf.

    Attributes:
        size: the magnitude.
        at: its index on the leading axis.
    """

    size: jax.Array
    at: jax.Array


@jax.jit
def _largest(base: Base) -> dict[str, Any]:
    """Each leaf's :class:`_Largest`."""

    def largest(leaf):
        if isinstance(leaf, Quantised):
            sizes = jax.lax.map(lambda layer: jnp.max(jnp.abs(dequantised(layer))), leaf)
        else:
            sizes = jnp.max(jnp.abs(leaf.astype(jnp.float32)), axis=tuple(range(1, leaf.ndim)))
        return _Largest(jnp.max(sizes), jnp.argmax(sizes))

    return jax.tree.map(largest, base, is_leaf=lambda leaf: isinstance(leaf, Quantised))
