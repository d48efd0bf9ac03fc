"""A name for a tree of arrays that depends on every bit of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fedmezo_jax.core.mezo import Params


def tree_hash(tree: Params) -> str:
    """SHA-256 of a tree of arrays on the host: names, shapes, dtypes and bytes of its leaves."""
    digest = TreeDigest()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.begin(path, leaf.dtype, leaf.shape)
        for part in _on_host(leaf):
            digest.add(part)
    return digest.hex()


class TreeDigest:
    """The :func:`tree_hash` of a tree whose leaves come one after the other, in the order of the tree and in parts."""

    def __init__(self):
        """Of no leaf yet."""
        self._digest = hashlib.sha256()

    def begin(self, path: tuple[Any, ...], dtype: Any, shape: tuple[int, ...]) -> None:
        """The next leaf, of which nothing has come yet; ``path`` is JAX's."""
        self._digest.update(f"{jax.tree_util.keystr(path)} {dtype} {shape}\n".encode())

    def add(self, part: np.ndarray) -> None:
        """The leaf's next entries, in their order."""
        self._digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)

    def hex(self) -> str:
        """The hash of all that has come."""
        return self._digest.hexdigest()


def _on_host(leaf: Any) -> Iterator[np.ndarray]:
    """A leaf's rows in order, in one piece or, where other processes hold some of it, one by one: it may not fit."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        yield np.asarray(leaf)
        return
    assert isinstance(leaf.sharding, NamedSharding)
    pick = jax.jit(lambda leaf, i: leaf[i], out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()))
    # A layer of a stack at a time; a table, whose rows are many and small, by the thousand.
    rows = np.arange(len(leaf)) if leaf.ndim > 2 else np.array_split(np.arange(len(leaf)), -(-len(leaf) // 1000))
    yield from (np.asarray(pick(leaf, i)) for i in rows)
