"""The mini-batches of a round. They depend only on the round's number, so a resumed run draws the same ones."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import jax
import numpy as np

from fedmezo_jax.data.seeding import generator

Tree = TypeVar("Tree")
TOKENS_AT_ONCE = 8192
"""Clients run together as long as their batches hold at most this many tokens; otherwise they run in blocks."""
# A client with few examples passes through many epochs in a round. Drawing its permutations in blocks saves a
# generator per epoch.
_BLOCK = 64


@lru_cache(maxsize=8192)
def _walk(seed: int, client: int, n: int, block: int) -> np.ndarray:
    """One permutation of 0..n-1 after another: int64 [epochs * n] with epochs = ceil(_BLOCK / n)."""
    epochs = -(-_BLOCK // n)
    rng = generator(seed, "batches", client, block)
    walk = rng.permuted(np.tile(np.arange(n), (epochs, 1)), axis=1).ravel()
    walk.flags.writeable = False
    return walk


def _take(seed: int, client: int, n: int, start: int, count: int) -> np.ndarray:
    """Positions ``start`` to ``start + count`` of a client's walk over permutations of 0..n-1: int64 [count]."""
    walk_length = -(-_BLOCK // n) * n
    blocks = range(start // walk_length, (start + count - 1) // walk_length + 1)
    walk = np.concatenate([_walk(seed, client, n, block) for block in blocks])
    return walk[start - blocks[0] * walk_length :][:count]


def uses_in_round(seed: int, client: int, n: int, round_index: int, count: int) -> np.ndarray:
    """How often a round uses each of a client's n examples, int64 [n], where it takes ``count`` of them."""
    return np.bincount(_take(seed, client, n, round_index * count, count), minlength=n)


def round_picks(
    rows: Any,
    parts: Sequence[np.ndarray],
    participants: Sequence[int] | np.ndarray,
    round_index: int,
    *,
    seed: int,
    local_steps: int,
    batch_size: int,
    by_length: bool = False,
) -> np.ndarray:
    """Picks the examples that the participants of one round train on.

    Each client goes through its own examples in a new random order every epoch. Round t takes H * batch_size of them
    from position t * H * batch_size on, whether or not the client took part in earlier rounds. A client with fewer
    examples than a batch repeats them within the batch.

    With ``by_length`` each client sorts its examples of the round by length: its B shortest examples make one step, the
    next B another, and so on. All clients take these steps in the same random order. A client trains on the same
    examples as without ``by_length``, but examples of similar length share a batch (in which every label weighs the
    same), and all clients have their short examples at the same step (see :mod:`fedmezo_jax.data.buckets`).

    Args:
        rows: all training examples, any pytree of arrays; a ``TokenBatch`` with ``by_length``.
        parts: the examples of every client, as indices into ``rows``.
        participants: clients of this round, [clients].
        round_index: number of the round, from 0.
        seed: seed of the random orders.
        local_steps: local steps H.
        batch_size: examples per step.
        by_length: whether examples of similar length share a step.

    Returns:
        Indices into ``rows``, int64 [clients, H, batch].
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
    """Returns the picked examples of a pytree; its leaves get the leading axes of ``picked``."""
    return jax.tree.map(lambda leaf: leaf[picked], rows)


def round_batches(rows: Tree, *args: Any, **settings: Any) -> Tree:
    """Returns the examples that :func:`round_picks` picks, with leaves [clients, H, batch, ...]. Same arguments."""
    return take(rows, round_picks(rows, *args, **settings))
