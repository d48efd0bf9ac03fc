"""Clients in blocks: as many at once as the memory allows, one block after the other, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_blocks(run: Callable[[Any], Any], blocks: Any, round_index: jax.Array) -> Any:
    """``jax.lax.map(run, blocks)`` with the same bits for one block as for several.

    XLA unrolls a loop of one trip and fuses its body with what surrounds it, and the numbers of a single client then
    differ from those that it has in a loop. So a single block becomes one trip, unknown to the compiler, over two.
    """
    if jax.tree.leaves(blocks)[0].shape[0] > 1:
        return jax.lax.map(run, blocks)
    blocks = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), blocks)
    run = jax.jit(run, inline=True)  # traced once, for the shapes and for the loop

    def step(i, outcome):
        new = run(jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), blocks))
        return jax.tree.map(lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, i, 0), outcome, new)

    shapes = jax.eval_shape(run, jax.tree.map(lambda leaf: leaf[0], blocks))
    outcome = jax.tree.map(lambda shape: jnp.zeros((2, *shape.shape), shape.dtype), shapes)
    trips = jnp.where(round_index < 0, 2, 1)  # always 1
    return jax.tree.map(lambda leaf: leaf[:1], jax.lax.fori_loop(0, trips, step, outcome))


def block_width(clients: int, block_size: int) -> int:
    """How many of a group's clients run at once, in blocks of at most ``block_size``.

    Blocks are made as even as they can be, so that little is spent on filling the last one up with copies.
    """
    blocks = -(-clients // block_size)
    return -(-clients // blocks)


def in_blocks(tree: Any, groups: int, block_size: int, least_width: int) -> Any:
    """Splits leading axes ``[P, …]`` into ``[blocks, groups·size, …]``: each group's clients stay with it."""

    def split(leaf):
        per_group = leaf.shape[0] // groups
        size = max(least_width, block_width(per_group, block_size))
        blocks = -(-per_group // size)
        leaf = leaf.reshape(groups, per_group, *leaf.shape[1:])
        if fill := blocks * size - per_group:
            leaf = jnp.concatenate([leaf, jnp.repeat(leaf[:, :1], fill, axis=1)], axis=1)
        leaf = jnp.swapaxes(leaf.reshape(groups, blocks, size, *leaf.shape[2:]), 0, 1)
        return jax.lax.collapse(leaf, 1, 3)

    return jax.tree.map(split, tree)


def out_of_blocks(tree: Any, groups: int, rows: int) -> Any:
    """Undoes :func:`in_blocks`, the filling left out: ``[blocks, groups·size, …]`` into ``[rows, …]``."""

    def join(leaf):
        blocks, width = leaf.shape[:2]
        leaf = jnp.swapaxes(leaf.reshape(blocks, groups, width // groups, *leaf.shape[2:]), 0, 1)
        leaf = jax.lax.collapse(leaf, 1, 3)[:, : rows // groups]
        return jax.lax.collapse(leaf, 0, 2)

    return jax.tree.map(join, tree)
