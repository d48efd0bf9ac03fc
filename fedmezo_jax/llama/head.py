"""Losses of labels, from the vocabulary's head in blocks, and their tangents.

The head is by far the widest product. A label's loss depends on one row of the final hidden states alone, so that its
tangent is the inner product of that row's tangent with the loss's gradient,

    ∂loss/∂x = Σ_v softmax(logits)_v · W_v − W_label,

which is the same for every tangent. It takes one more product with W for all n tangents of a forward gradient, where
each tangent's logits would take one. Nothing is stored for a backward pass.

Shapes in this file: R rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from fedmezo_jax.llama.precision import Precision, Products, frozen_product, keep_in_loop, unfused

_BLOCK = 4096


def label_scores(
    x: jax.Array, table: jax.Array, labels: jax.Array, tied: bool, precision: Precision
) -> tuple[jax.Array, jax.Array]:
    """−log softmax(x·W)[label] in nats, and whether each label is the most likely token.

    Args:
        x: final hidden states, normed, ``[R, D]`` float32.
        table: W, ``[V, D]`` where it is tied to the embedding, otherwise ``[D, V]``.
        labels: ``[R]`` int32.
        tied: whether it is.
        precision: of the products.

    Returns:
        ``[R]`` float32, and ``[R]`` bool.
    """
    losses, is_best, _ = _scores(x, table, labels, tied, precision, False)
    return losses, is_best


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def label_losses(x: jax.Array, table: jax.Array, labels: jax.Array, tied: bool, precision: Precision) -> jax.Array:
    """The losses of :func:`label_scores`, with the module's tangents."""
    return label_scores(x, table, labels, tied, precision)[0]


def _tangents(tied: bool, precision: Precision, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, table, labels), (x_tangent, table_tangent, _) = primals, tangents
    if not isinstance(table_tangent, SymbolicZero):  # the base itself is trained
        zero = isinstance(x_tangent, SymbolicZero)
        moved = (jnp.zeros_like(x) if zero else x_tangent, table_tangent)
        return jax.jvp(lambda x, table: label_scores(x, table, labels, tied, precision)[0], (x, table), moved)
    losses, _, mean_row = _scores(x, table, labels, tied, precision, True)
    if isinstance(x_tangent, SymbolicZero):
        return losses, jnp.zeros_like(losses)
    own_row = table[labels] if tied else table[:, labels].T
    return losses, unfused(jnp.sum((mean_row - own_row.astype(jnp.float32)) * x_tangent, axis=-1))


label_losses.defjvp(_tangents, symbolic_zeros=True)


def _scores(
    x: jax.Array, table: jax.Array, labels: jax.Array, tied: bool, precision: Precision, with_mean_row: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """:func:`label_scores`, and Σ_v softmax_v · W_v, ``[R, D]`` float32, if that is asked for.

    The logits exist for one block of the vocabulary at a time, no wider than about an MLP's activations; the blocks'
    maxima and sums are joined as they come (online softmax, arXiv 1805.02867).
    """
    vocabulary = table.shape[0 if tied else 1]
    blocks = -(-vocabulary // _BLOCK)
    width = -(-vocabulary // blocks)

    def join(carry, block):
        largest, total, picked, rows = carry
        start = jnp.minimum(block * width, vocabulary - width)  # the last block may overlap the one before it
        part = jax.lax.dynamic_slice_in_dim(*keep_in_loop(table, start), width, axis=0 if tied else 1)
        logits = frozen_product(x, part.T if tied else part, Products(precision))
        place = labels - start
        own = jnp.take_along_axis(logits, jnp.clip(place, 0, width - 1)[:, None], axis=1)[:, 0]
        picked = jnp.where((place >= 0) & (place < width), own, picked)
        if vocabulary % width:
            logits = jnp.where(start + jnp.arange(width) >= block * width, logits, -jnp.inf)
        # Its derivative cancels in what is returned.
        higher = jax.lax.stop_gradient(jnp.maximum(largest, jnp.max(logits, axis=1)))
        shrunk, weights = jnp.exp(largest - higher), jnp.exp(logits - higher[:, None])
        total = total * shrunk + jnp.sum(weights, axis=1)
        if with_mean_row:
            rows = rows * shrunk[:, None] + frozen_product(weights, part if tied else part.T, Products(precision))
        return (higher, total, picked, rows), None

    count = len(x)
    rows = jnp.zeros(x.shape if with_mean_row else (count, 0))
    start = (jnp.full(count, -jnp.inf), jnp.zeros(count), jnp.zeros(count), rows)
    (largest, total, picked, rows), _ = jax.lax.scan(join, start, jnp.arange(blocks))
    return largest + jnp.log(total) - picked, picked == largest, rows / total[:, None]
