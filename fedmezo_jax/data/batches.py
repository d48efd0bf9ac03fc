"""The mini-batches of a round, as a pure function of the round's number: a resumed run draws the same ones."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import jax
import numpy as np

from fedmezo_jax.data.partition import Partition
from fedmezo_jax.data.seeding import generator

Tree = TypeVar("Tree")
TOKENS_AT_ONCE = 8192
"""Clients run at once so long as their batches hold no more tokens than this; further ones follow in blocks."""
# A client with few rows passes through many epochs in a round; drawing its permutations by the block saves one
# generator for each of them.
_BLOCK = 64


@lru_cache(maxsize=8192)
def _walk(seed: int, client: int, n: int, block: int) -> np.ndarray:
    """Rows 0..n-1 in random order, one permutation after another: int64 [epochs * n] with epochs = ceil(_BLOCK / n)."""
    epochs = -(-_BLOCK // n)
    rng = generator(seed, "batches", client, block)
    walk = rng.permuted(np.tile(np.arange(n), (epochs, 1)), axis=1).ravel()
    walk.flags.writeable = False
    return walk


def _take(seed: int, client: int, n: int, start: int, count: int) -> np.ndarray:
    """`count` steps of a client's endless walk from step `start`, as positions in 0..n-1."""
    length = -(-_BLOCK // n) * n
    blocks = range(start // length, (start + count - 1) // length + 1)
    steps = np.concatenate([_walk(seed, client, n, block) for block in blocks])
    return steps[start - blocks[0] * length :][:count]


def round_picks(
    rows: Any,
    parts: Partition,
    participants: Sequence[int] | np.ndarray,
    round_index: int,
    *,
    seed: int,
    local_steps: int,
    batch_size: int,
    by_length: bool = False,
) -> np.ndarray:
    """The rows that the participants of one round work on.

    Each client walks through its own rows, permuted anew in every epoch; round t takes the steps from t*H*batch on,
    whether or not the client took part in the rounds before. A client with fewer rows than a batch meets rows twice.

    With `by_length` each client's rows of the round are put into steps by length: its B shortest rows make one step,
    the B next ones another, and so on; all clients take these steps in one random order. So a client meets the very
    rows in a round that it meets otherwise, but rows of like length share a batch (in which every label weighs the
    same), and all clients are at their short rows at the same time (see :mod:`fedmezo_jax.data.buckets`).

    Args:
        rows: all training rows, any pytree of arrays; a `TokenBatch` with `by_length`.
        parts: the rows of every client, as indices into `rows`.
        participants: clients of this round, [clients].
        round_index: number of the round, from 0.
        seed: seed of the walks.
        local_steps: local steps H.
        batch_size: rows a step.
        by_length: whether rows of like length meet in a step, or any rows.

    Returns:
        Indices into `rows`, int64 [clients, H, batch].
    """
    count = local_steps * batch_size
    picked = np.stack(
        [
            parts[client][_take(seed, int(client), len(parts[client]), round_index * count, count)]
            for client in participants
        ]
    )
    if by_length:
        length = rows.label_positions[picked].max(axis=-1)
        picked = np.take_along_axis(picked, np.argsort(length, axis=1, kind="stable"), axis=1)
    picked = picked.reshape(-1, local_steps, batch_size)
    if by_length:
        picked = picked[:, generator(seed, "steps", round_index).permutation(local_steps)]
    return picked


def take(rows: Tree, picked: np.ndarray) -> Tree:
    """The picked rows of a pytree; its leaves get the leading axes of `picked`."""
    return jax.tree.map(lambda leaf: leaf[picked], rows)


def round_batches(rows: Tree, *args: Any, **settings: Any) -> Tree:
    """The rows of :func:`round_picks` themselves, of the same arguments: leaves [clients, H, batch, ...]."""
    return take(rows, round_picks(rows, *args, **settings))
