"""A model's frozen weights in their files, read in parts, so that they never have to be in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.tree_util import DictKey

from fedmezo_jax.core.tree_hash import TreeDigest
from fedmezo_jax.llama.checkpoints.layout import EMBEDDING, Slot, layout, leaves
from fedmezo_jax.llama.checkpoints.safetensors import Entry
from fedmezo_jax.llama.checkpoints.weights import open_weights
from fedmezo_jax.llama.checks import check_tensor
from fedmezo_jax.llama.config import LlamaConfig

Sharding = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]
"""The sharding of a leaf of the base pytree, from its path (``("layers", "mlp", "up_proj", "kernel")``) and shape."""


class StoredBase:
    """The weights of a model folder. Tensors are read one by one, into leaves that are allocated once.

    All methods raise ``UserError``: before any weight is read, with all that is missing, unexpected, or of another
    shape or type; and for a damaged file, for pickled weights, or for a weight that is not finite in ``dtype`` or whose
    square overflows float32.
    """

    def __init__(
        self,
        folder: str | PathLike,
        config: LlamaConfig,
        dtype: Any = "float32",
        sharding: Sharding | None = None,
    ):
        """Opens nothing yet.

        Args:
            folder: a model folder in any format of ``weights.open_weights``.
            config: the model's config.
            dtype: all weights are cast to it, also quantised ones.
            sharding: gives the sharding of a leaf; None puts every leaf on JAX's default device. With several processes
                each keeps its own part.
        """
        self.config, self.dtype = config, np.dtype(dtype)
        self._folder, self._sharding = Path(folder), sharding

    def load(self) -> dict[str, Any]:
        """The base pytree (``layout.base_shapes``).

        On the CPU the peak of host memory is the result plus one tensor; on other devices it is one leaf plus one
        tensor.
        """
        return self._load(0, None)

    def load_from(self, first: int) -> tuple[dict[str, Any], str]:
        """The weights that run hidden states from layer ``first`` on (``layout.leaves``), and the hash of all.

        The hash is :func:`~fedmezo_jax.core.tree_hash.tree_hash` of the whole base. The others are read for it one by
        one. With ``first`` the number of layers, next to nothing is held.
        """
        digest = TreeDigest()
        return self._load(first, digest), digest.hex()

    def layers(self, stop: int, at_once: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the layers below ``stop``, so many at a time, with the index of the first of them.

        They are stacked on the host, as the base has them under ``layers``, and valid until the next are asked for,
        which are read into the same memory. (JAX on the CPU uses it without a copy, and would free it late.)
        """
        host = {
            path: _aligned_empty((min(at_once, stop), *shape[1:]), self.dtype)
            for path, shape in leaves(self.config).items()
            if path[0] == "layers"
        }
        for start in range(0, stop, at_once):
            count = min(at_once, stop - start)
            for path, leaf in host.items():
                for (name, _), target in zip(self._slots[path][start : start + count], leaf, strict=False):
                    self._read(path, name, target)
            stacked = {path[1:]: leaf[:count] for path, leaf in host.items()}
            yield start, traverse_util.unflatten_dict(stacked)

    def embedding(self) -> np.ndarray:
        """The table of token vectors on the host, ``[V, D]``."""
        table = _aligned_empty(leaves(self.config)[EMBEDDING], self.dtype)
        ((name, _),) = self._slots[EMBEDDING]
        self._read(EMBEDDING, name, table)
        return table

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer."""
        entries = sum(math.prod(shape[1:]) for path, shape in leaves(self.config).items() if path[0] == "layers")
        return entries * self.dtype.itemsize

    def _load(self, first: int, digest: TreeDigest | None) -> dict[str, Any]:
        """In the order of the tree, as the digest needs it."""
        held, flat = leaves(self.config, first), {}
        for path, shape in sorted(leaves(self.config).items()):
            if digest:
                digest.begin(tuple(map(DictKey, path)), self.dtype, shape)
            leaf = _aligned_empty(held[path], self.dtype) if path in held else None
            for name, slot in self._slots[path]:
                if leaf is None or (slot.layer is not None and slot.layer < first):
                    target = _aligned_empty(shape if slot.layer is None else shape[1:], self.dtype)
                else:
                    target = leaf if slot.layer is None else leaf[slot.layer - first]
                self._read(path, name, target)
                if digest:
                    digest.add(target)
                del target
            if leaf is not None:
                flat[path] = _placed(leaf, None if self._sharding is None else self._sharding(path, leaf.shape))
            del leaf
        return traverse_util.unflatten_dict(flat)

    @cached_property
    def _entries(self) -> Mapping[str, Entry]:
        return open_weights(self._folder, self.config)

    @cached_property
    def _slots(self) -> dict[tuple[str, ...], list[tuple[str, Slot]]]:
        """The tensors of each leaf by name, in the order of the layers."""
        slots: dict[tuple[str, ...], list[tuple[str, Slot]]] = {path: [] for path in leaves(self.config)}
        for name, slot in layout(self.config).items():
            slots[slot.path].append((name, slot))
        return slots

    def _read(self, path: tuple[str, ...], name: str, target: np.ndarray) -> None:
        """Reads a tensor into its place, casts it and checks it. No other code looks at all weights."""
        entry = self._entries[name]
        stored = entry.read()
        with np.errstate(over="ignore"):  # the check below reports an overflow
            target[...] = stored.T if path[-1] == "kernel" else stored
        del stored  # the check needs as much memory
        check_tensor(target, name, entry.file)


def _placed(leaf: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(leaf)
    placed = jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    return jax.block_until_ready(placed)  # before the host's copy is freed and the next one allocated


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary, which JAX on the CPU uses without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
