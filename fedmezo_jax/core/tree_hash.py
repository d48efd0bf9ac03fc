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
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        for part in _on_host(leaf):
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


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
