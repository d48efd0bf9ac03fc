"""Packing: the examples of a local step one after another in one row, so that little is computed on padding.

The layers' products run on the packed tokens. Attention alone spreads them out into a row for each example, so that no
token sees another example, and positions count from each example's start.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmezo_jax.data.examples import Array, Rows


class Layout(NamedTuple):
    """Where the tokens of B examples of at most S tokens stand in a packed row of T.

    Attributes:
        example: int32 ``[T]``, the example of each packed token.
        position: int32 ``[T]``, its position in the example.
        place: int32 ``[B, S]``, where in the row a token stands; behind an example's end any place.
    """

    example: Array
    position: Array
    place: Array

    def spread(self, packed: jax.Array) -> jax.Array:
        """``[1, T, …]`` to ``[B, S, …]``; what stands behind an example's end has no meaning."""
        return packed[0][self.place]

    def gather(self, rows: jax.Array) -> jax.Array:
        """``[B, S, …]`` to ``[1, T, …]``; what stands behind the last example has no meaning."""
        return rows[self.example, self.position][None]


class PackedBatch(NamedTuple):
    """The examples of a local step in one row, with L labels in all.

    Attributes:
        inputs: int32 ``[1, T]`` tokens, or float ``[1, T, D]`` hidden states.
        layout: where they stand.
        label_positions: int32 ``[L]``, index of the packed token that predicts the label; 0 for padding.
        labels: int32 ``[L]``, token id of the label.
        label_weights: float32 ``[L]``, 1 for a label and 0 for padding.
    """

    inputs: Array
    layout: Layout
    label_positions: Array
    labels: Array
    label_weights: Array


def pack(rows: Rows, shape: tuple[int, int]) -> PackedBatch:
    """Packs examples into one row.

    Args:
        rows: B examples, leaves ``[B, …]``; the labels of each stand before its padding.
        shape: T and L, at least the tokens and the labels of all examples.
    """
    tokens, labels = shape
    inputs, positions, label_ids, weights = map(jnp.asarray, rows)
    layout = _layout(jnp.max(positions, axis=-1) + 2, tokens, inputs.shape[1])
    of_labels = _layout(jnp.sum(weights > 0, axis=-1), labels, weights.shape[1])
    picked = of_labels.example, of_labels.position
    used = jnp.arange(labels) < jnp.sum(weights > 0)
    at = jnp.where(used, layout.place[of_labels.example, positions[picked]], 0)
    return PackedBatch(layout.gather(inputs), layout, at, label_ids[picked], jnp.where(used, weights[picked], 0))


def _layout(lengths: jax.Array, total: int, longest: int) -> Layout:
    """Of examples of these lengths, int ``[B]``, of at most ``longest`` tokens, in a row of ``total``."""
    ends = jnp.cumsum(lengths)
    starts = ends - lengths
    at = jnp.arange(total)
    example = jnp.minimum(jnp.sum(at[:, None] >= ends, axis=1), len(lengths) - 1)
    position = jnp.minimum(at - starts[example], longest - 1)
    place = jnp.minimum(starts[:, None] + jnp.arange(longest), total - 1)
    return Layout(*(index.astype(jnp.int32) for index in (example, position, place)))
