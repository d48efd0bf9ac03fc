"""A model's frozen weights in their files, read in parts, so that they never have to be in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import traverse_util
from jax.tree_util import DictKey

from fedmezo_jax.core.tree_hash import TreeDigest
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import EMBEDDING, Slot, held_leaves, layout, leaves
from fedmezo_jax.llama.checkpoints.safetensors import Entry
from fedmezo_jax.llama.checkpoints.weights import open_weights
from fedmezo_jax.llama.checks import check_tensor
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.quantised import KernelType, OwnType, Quantised, StoredType, of_type, quantise

Sharding = Callable[[tuple[str, ...], Any], Any]
"""The sharding of a leaf of the base pytree, or those of its parts in their places, from the leaf's path
(``("layers", "mlp", "up_proj", "kernel")``) and the leaf."""


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
        kernels: OwnType | Literal["as-stored"] | None = None,
        sharding: Sharding | None = None,
    ):
        """Opens nothing yet.

        Args:
            folder: a model folder in any format of ``weights.open_weights``.
            config: the model's config.
            dtype: all weights are cast to it, also those of a quantised file.
            kernels: what the kernels of the layers are quantised to, one by one while they are read; None leaves them
                in ``dtype``, and ``as-stored`` keeps the blocks of a GGUF file. They are then leaves of type
                :class:`Quantised`.
            sharding: gives the sharding of a leaf; None puts every leaf on JAX's default device. With several processes
                each keeps its own part.
        """
        self.config, self.dtype = config, np.dtype(dtype)
        self._kernels: OwnType | Literal["as-stored"] | None = kernels
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
            path: jax.tree.map(lambda part: _aligned_empty((min(at_once, stop), *part.shape[1:]), part.dtype), leaf)
            for path, leaf in self._held(0).items()
            if path[0] == "layers"
        }
        for start in range(0, stop, at_once):
            count = min(at_once, stop - start)
            for path, leaf in host.items():
                for i, (name, _) in enumerate(self._slots[path][start : start + count]):
                    self._read(path, name, jax.tree.map(itemgetter(i), leaf))
            stacked = {path[1:]: jax.tree.map(lambda part: part[:count], leaf) for path, leaf in host.items()}  # noqa: B023
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
        layers = [leaf for path, leaf in self._held(0).items() if path[0] == "layers"]
        return sum(math.prod(part.shape[1:]) * part.dtype.itemsize for part in jax.tree.leaves(layers))

    def _load(self, first: int, digest: TreeDigest | None) -> dict[str, Any]:
        """Embedding and head come first, since reading them takes most; a digest needs the order of the tree."""
        held, flat = self._held(first), {}
        every = self._held(0).items()
        for path, like in sorted(every) if digest else every:
            leaf = _empty(held[path]) if path in held else None
            read = partial(self._layer, path, leaf, first)
            if digest:
                _add(digest, path, like, read, len(self._slots[path]))
            else:
                for i in range(len(self._slots[path])):
                    read(i)
            if leaf is not None:
                flat[path] = (
                    jax.tree.map(_placed, leaf, self._sharding(path, leaf)) if self._sharding else jax.device_put(leaf)
                )
            del leaf, read
        return traverse_util.unflatten_dict(flat)

    def _layer(self, path: tuple[str, ...], leaf: Any, first: int, i: int, again: bool = False) -> Any:
        """Reads tensor i of a leaf, into the leaf where that has it; where it is asked for again, it is there."""
        name, slot = self._slots[path][i]
        if leaf is not None and (slot.layer is None or slot.layer >= first):
            target = leaf if slot.layer is None else jax.tree.map(itemgetter(slot.layer - first), leaf)
            if again:
                return target
        else:
            target = _empty(self._held(0)[path], skip=slot.layer is not None)
        self._read(path, name, target)
        return target

    def _held(self, first: int) -> dict[tuple[str, ...], Any]:
        """Each leaf by path as it is held, from layer ``first`` on (``layout.held_leaves``)."""
        return held_leaves(self.config, self.dtype, self._kinds, first)

    @cached_property
    def _kinds(self) -> OwnType | Mapping[tuple[str, ...], KernelType] | None:
        return self._kernels if self._kernels != "as-stored" else _stored_kinds(self._entries, self.config)

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

    def _read(self, path: tuple[str, ...], name: str, target: Any) -> None:
        """Reads a tensor into its place, casts or quantises it and checks it. No other code looks at all weights."""
        entry = self._entries[name]
        if isinstance(target, Quantised):
            _read_quantised(entry, name, target)
            return
        stored = entry.read()
        with np.errstate(over="ignore"):  # the check below reports an overflow
            target[...] = stored.T if path[-1] == "kernel" else stored
        del stored  # the check needs as much memory
        check_tensor(target, name, entry.file)


def _read_quantised(entry: Entry, name: str, target: Quantised) -> None:
    if target.kind in get_args(OwnType):
        stored = entry.read()
        check_tensor(stored, name, entry.file)
        quantise(stored, target)
    elif entry.blocks:
        kind, read = entry.blocks
        if isinstance(target.kind, tuple):
            for part in jax.tree.leaves(target):
                part[...] = 0
            place = [*target.kind].index(kind)
            target.which[...] = place
            target = of_type(target, target.kind[place])
        read(target)
        check_tensor(target.scale, name, entry.file)


def _stored_kinds(entries: Mapping[str, Entry], config: LlamaConfig) -> dict[tuple[str, ...], KernelType]:
    """The type of a file's blocks, or the types, for each kernel of the layers.

    Raises:
        UserError: a kernel has no blocks of a type that is kept.
    """
    kept, kinds = get_args(StoredType), dict[tuple[str, ...], set[str]]()
    for name, slot in layout(config).items():
        if slot.layer is None or slot.path[-1] != "kernel":
            continue
        blocks = entries[name].blocks
        found = blocks[0] if blocks else entries[name].dtype
        if found not in kept:
            raise UserError(
                f"{entries[name].file}: --base as-stored keeps {', '.join(kept)}, and {name} is {found}: "
                "give int8 or int4"
            )
        kinds.setdefault(slot.path, set()).add(found)
    ordered: dict[tuple[str, ...], tuple[StoredType, ...]]
    ordered = {path: tuple(kind for kind in kept if kind in found) for path, found in kinds.items()}
    return {path: found[0] if len(found) == 1 else found for path, found in ordered.items()}


def _add(digest: TreeDigest, path: tuple[str, ...], like: Any, read: Callable[[int, bool], Any], count: int) -> None:
    """Adds a leaf to a digest, reading its tensors in turn: for each of its parts, where it is quantised.

    ``read`` is told whether it has read the tensor before.
    """
    for i, (keys, part) in enumerate(jax.tree_util.tree_leaves_with_path(like)):
        digest.begin((*map(DictKey, path), *keys), part.dtype, part.shape)
        for layer in range(count):
            digest.add(jax.tree.leaves(read(layer, i > 0))[i])


def _empty(like: Any, skip: int = 0) -> Any:
    """Empty arrays on the host for a leaf or its parts, without so many leading axes."""
    return jax.tree.map(lambda part: _aligned_empty(part.shape[skip:], np.dtype(part.dtype)), like)


def _placed(leaf: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    placed = jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    return jax.block_until_ready(placed)  # before the host's copy is freed and the next one allocated


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary, which JAX on the CPU uses without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
