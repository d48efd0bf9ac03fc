"""Reads base weights from any format, and writes folders that transformers or this package opens."""

import json
from collections.abc import Callable, Mapping
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import traverse_util

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import layout
from fedmezo_jax.llama.checkpoints.orbax import ORBAX, write_orbax_tensors
from fedmezo_jax.llama.checkpoints.safetensors import write_tensors
from fedmezo_jax.llama.checkpoints.stored_base import Sharding, StoredBase
from fedmezo_jax.llama.checkpoints.weights import SAFETENSORS
from fedmezo_jax.llama.config import LlamaConfig, to_json
from fedmezo_jax.llama.folder import read_json_object, staged
from fedmezo_jax.llama.quantised import OwnType, Quantised, dequantised

WeightFormat = Literal["safetensors", "orbax"]
"""Formats to write: safetensors, which transformers opens too, or an Orbax checkpoint, for this package only."""

_SHARD_BYTES = 4 << 30  # most bytes of weights in one file, unless one tensor is larger


def load_base(
    folder: str | PathLike,
    config: LlamaConfig,
    dtype: Any = "float32",
    kernels: OwnType | Literal["as-stored"] | None = None,
    sharding: Sharding | None = None,
) -> dict[str, Any]:
    """Read a model's frozen weights into the base pytree (``layout.base_shapes``); see :class:`StoredBase`."""
    return StoredBase(folder, config, dtype, kernels, sharding).load()


def save_base(
    folder: str | PathLike,
    config: LlamaConfig,
    base: Mapping[str, Any],
    *,
    dtype: str = "float32",
    tokenizer: Any = None,
    form: WeightFormat = "safetensors",
) -> None:
    """Write a base pytree as a model folder, with a transformers tokenizer's files; all files appear at once.

    Quantised kernels are dequantised.

    Raises:
        UserError: a weight is not finite in ``dtype``, or the folder already has an Orbax checkpoint.
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(base)
    slots = layout(config)

    def read(name: str) -> np.ndarray:
        slot = slots[name]
        leaf = flat[slot.path] if slot.layer is None else jax.tree.map(itemgetter(slot.layer), flat[slot.path])
        leaf = dequantised(leaf) if isinstance(leaf, Quantised) else leaf
        return np.asarray(leaf).T if slot.path[-1] == "kernel" else np.asarray(leaf)

    if form == "orbax" and (Path(folder) / ORBAX).exists():
        raise UserError(f"{folder}: holds an Orbax checkpoint already; give another folder")
    with staged(Path(folder)) as fresh:
        write_tokenizer(fresh, tokenizer)
        write_weights(fresh, config, read, dtype, form)


def write_weights(
    folder: Path, config: LlamaConfig, read: Callable[[str], np.ndarray], dtype: str, form: WeightFormat = "safetensors"
) -> None:
    """Write ``config.json`` and weights: one file, or shards with an index if safetensors are above 4 GiB.

    The tensors of one file are in memory at a time.

    Args:
        folder: the folder to write into.
        config: the model's config.
        read: returns a tensor by Hugging Face's name, in Hugging Face's shape.
        dtype: type of the stored weights: float32, float16 or bfloat16.
        form: the format to write.

    Raises:
        UserError: a weight is not finite in ``dtype``.
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
    """``sizes`` maps a tensor's name to its number of entries."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, size in sizes.items():
        if shards[-1] and shard_bytes + size * dtype.itemsize > _SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size * dtype.itemsize
    stem, _, kind = SAFETENSORS.partition(".")
    files = [f"{stem}-{i + 1:05}-of-{len(shards):05}.{kind}" for i in range(len(shards))]
    if len(shards) == 1:
        files = [SAFETENSORS]
    for file, names in zip(files, shards, strict=True):
        write_tensors(folder / file, {name: _cast(read(name), dtype, name) for name in names})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
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
    # transformers 5 writes a class name that transformers 4 does not know. Both open the older name.
    path = folder / "tokenizer_config.json"
    renamed = read_json_object(path) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(renamed, indent=2) + "\n", encoding="utf-8")
