"""Base weights in from any format and out to folders that transformers, or this package, opens."""

import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import traverse_util

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import Slot, layout, leaves
from fedmezo_jax.llama.checkpoints.orbax import ORBAX, write_orbax_tensors
from fedmezo_jax.llama.checkpoints.safetensors import Entry, write_tensors
from fedmezo_jax.llama.checkpoints.weights import SAFETENSORS, open_weights
from fedmezo_jax.llama.checks import check_tensor
from fedmezo_jax.llama.config import LlamaConfig, to_json
from fedmezo_jax.llama.folder import read_json_object, staged

Sharding = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]
"""The sharding of a leaf of the base pytree, from its path (``("layers", "mlp", "up_proj", "kernel")``) and shape."""

WeightFormat = Literal["safetensors", "orbax"]
"""Formats to write: safetensors, for transformers too, or an Orbax checkpoint, for this package."""

_SHARD_BYTES = 4 << 30  # most bytes of weights in one file, as long as one tensor is not larger


def load_base(
    folder: str | PathLike, config: LlamaConfig, dtype: Any = "float32", sharding: Sharding | None = None
) -> dict[str, Any]:
    """Read a model's frozen weights into the base pytree (``layout.base_shapes``).

    The folder's format is found as by ``weights.open_weights``; float32, float16, bfloat16 and quantised weights are
    cast to ``dtype``. Each leaf goes to JAX's default device, or where ``sharding`` says for its path and shape (over
    several processes, each keeps its own part). Tensors are read one by one into leaves allocated once: on the CPU the
    peak of host memory is the result and one tensor; elsewhere a leaf and a tensor.

    Raises ``UserError``, before any weight is read, with all that is missing, unexpected, of another shape or type;
    and for a damaged file, for pickled weights, or for a weight that is not finite in ``dtype`` or whose square
    overflows float32.
    """
    return assemble(open_weights(Path(folder), config), config, dtype, sharding)


def assemble(
    entries: Mapping[str, Entry], config: LlamaConfig, dtype: Any = "float32", sharding: Sharding | None = None
) -> dict[str, Any]:
    """The base pytree of the tensors that ``open_weights`` found, as :func:`load_base` gives it."""
    shapes = leaves(config)
    slots: dict[tuple[str, ...], list[tuple[str, Slot]]] = {path: [] for path in shapes}
    for name, slot in layout(config).items():
        slots[slot.path].append((name, slot))
    flat = {}
    for path, shape in shapes.items():
        leaf = _aligned_empty(shape, np.dtype(dtype))
        for name, slot in slots[path]:
            _fill(leaf if slot.layer is None else leaf[slot.layer], entries[name], name, path[-1] == "kernel")
        flat[path] = _placed(leaf, None if sharding is None else sharding(path, shape))
        del leaf
    return traverse_util.unflatten_dict(flat)


def _placed(leaf: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(leaf)
    placed = jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    return jax.block_until_ready(placed)  # before the host's copy goes, and before there is another


def _fill(place: np.ndarray, entry: Entry, name: str, transposed: bool) -> None:
    """Read a tensor into its place, casting it, and check it: the only time that all weights are looked at."""
    stored = entry.read()
    with np.errstate(over="ignore"):  # the check below names an overflow
        place[...] = stored.T if transposed else stored
    del stored  # the check takes as much memory again
    check_tensor(place, name, entry.file)


def save_base(
    folder: str | PathLike,
    config: LlamaConfig,
    base: Mapping[str, Any],
    *,
    dtype: str = "float32",
    tokenizer: Any = None,
    form: WeightFormat = "safetensors",
) -> None:
    """Write a base pytree as a model folder, with a transformers tokenizer's files; all appear at once.

    Raises ``UserError`` where a weight is not finite in ``dtype``, and where an Orbax checkpoint is there already.
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(base)
    slots = layout(config)

    def read(name: str) -> np.ndarray:
        slot = slots[name]
        leaf = flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer]
        return np.asarray(leaf).T if slot.path[-1] == "kernel" else np.asarray(leaf)

    if form == "orbax" and (Path(folder) / ORBAX).exists():
        raise UserError(f"{folder}: holds an Orbax checkpoint already; give another folder")
    with staged(Path(folder)) as fresh:
        write_tokenizer(fresh, tokenizer)
        write_weights(fresh, config, read, dtype, form)


def write_weights(
    folder: Path, config: LlamaConfig, read: Callable[[str], np.ndarray], dtype: str, form: WeightFormat = "safetensors"
) -> None:
    """Write ``config.json`` and weights: one file, or shards with an index where safetensors are above 4 GiB.

    ``read`` gives a tensor by Hugging Face's name, in its shape; it is stored as ``dtype`` (float32, float16,
    bfloat16). One file's tensors are in memory at one time. Raises ``UserError`` for one that is not finite then.
    """
    slots, stored = layout(config), np.dtype(dtype)
    if form == "orbax":
        write_orbax_tensors(folder, {name: _cast(read(name), stored, name) for name in slots})
    else:
        _write_safetensors(folder, {name: int(np.prod(slot.shape)) for name, slot in slots.items()}, read, stored)
    (folder / "config.json").write_text(json.dumps(to_json(config, dtype), indent=2) + "\n", encoding="utf-8")


def _write_safetensors(
    folder: Path, sizes: Mapping[str, int], read: Callable[[str], np.ndarray], dtype: np.dtype
) -> None:
    """``sizes`` are numbers of entries, by name."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size * dtype.itemsize > _SHARD_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size * dtype.itemsize
    stem, _, kind = SAFETENSORS.partition(".")
    files = [f"{stem}-{i + 1:05}-of-{len(parts):05}.{kind}" for i in range(len(parts))]
    if len(parts) == 1:
        files = [SAFETENSORS]
    for file, names in zip(files, parts, strict=True):
        write_tensors(folder / file, {name: _cast(read(name), dtype, name) for name in names})
    if len(parts) > 1:
        weight_map = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values()) * dtype.itemsize}, "weight_map": weight_map}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype, copy=False)
    if not np.isfinite(cast).all():
        raise UserError(f"{name} is not finite in {dtype}; choose bfloat16 or float32")
    return cast


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a transformers tokenizer's files, if there is a tokenizer."""
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name that transformers 4 does not know, and opens the older name as well.
    path = folder / "tokenizer_config.json"
    renamed = read_json_object(path) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(renamed, indent=2) + "\n", encoding="utf-8")


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary: JAX on the CPU then takes it over instead of copying it."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
