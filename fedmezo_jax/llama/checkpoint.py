"""Base weights in and out of Hugging Face folders: ``config.json`` and safetensors, in one file or sharded."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.config import LlamaConfig, read_json_object, to_json
from fedmezo_jax.llama.layout import layout, leaves
from fedmezo_jax.llama.tensorfile import Entry, misfits, read_header, read_tensor, staged, write_tensors

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_base(folder: str | PathLike, config: LlamaConfig, dtype: Any = "float32") -> dict[str, Any]:
    """Read a model's frozen weights into the base pytree (``layout.base_shapes``), on JAX's default device.

    Files in float32, float16 or bfloat16 are cast to ``dtype``. Tensors are read one by one into arrays allocated
    once, so that the peak of host memory is the result and one stored tensor (and, off the CPU, one leaf).

    Raises ``UserError``, before any weight is read, with all that is missing, unexpected, of another shape or type;
    and for a damaged file, for pickled weights, or for a weight that is not finite in ``dtype``.
    """
    folder = Path(folder)
    entries = _entries(folder, config)
    shapes = leaves(config)
    slots: dict[tuple[str, ...], list[tuple[str, int | None]]] = {path: [] for path in shapes}
    for name, slot in layout(config).items():
        slots[slot.path].append((name, slot.layer))
    flat = {}
    for path, shape in shapes.items():
        leaf = _aligned_empty(shape, np.dtype(dtype))
        for name, layer in slots[path]:
            stored = read_tensor(entries[name].file, name)
            place = leaf if layer is None else leaf[layer]
            with np.errstate(over="ignore"):  # an overflow is told below, by name
                place[...] = stored.T if path[-1] == "kernel" else stored
            if not np.isfinite(place).all():
                raise UserError(
                    f"{entries[name].file}: {name} is not finite in {np.dtype(dtype)}; fetch the file again"
                )
        flat[path] = jax.device_put(leaf)
    return traverse_util.unflatten_dict(flat)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; ``UserError`` where one is absent or the weights are pickled."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: has no weight_map from tensors to files; fetch it again")
        names = sorted({str(name) for name in weight_map.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index}: names files outside its folder ({', '.join(outside)}); fetch it again")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{index}: names files that are not there: {', '.join(absent)}; fetch them")
        return [folder / name for name in names]
    if pickled := sorted(file.name for kind in ("bin", "pt", "pth") for file in folder.glob(f"*.{kind}")):
        raise UserError(
            f"{folder}: {pickled[0]} is a pickle, which can run code and is never opened here; where you trust it, "
            f"convert it with transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r})"
        )
    raise UserError(
        f"{folder}: holds neither model.safetensors nor model.safetensors.index.json; give a model's folder"
    )


def save_base(
    folder: str | PathLike,
    config: LlamaConfig,
    base: Mapping[str, Any],
    *,
    dtype: str = "float32",
    tokenizer: Any = None,
) -> None:
    """Write a base pytree as a folder that transformers opens: see ``write_folder``."""
    flat = traverse_util.flatten_dict(base)
    tensors = {}
    for name, slot in layout(config).items():
        leaf = np.asarray(flat[slot.path])
        leaf = leaf if slot.layer is None else leaf[slot.layer]
        tensors[name] = leaf.T if slot.path[-1] == "kernel" else leaf
    write_folder(folder, config, tensors, dtype=dtype, tokenizer=tokenizer)


def write_folder(
    folder: str | PathLike,
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    tokenizer: Any = None,
) -> None:
    """Write ``config.json``, ``model.safetensors`` and a transformers tokenizer's files; all appear at once.

    ``tensors`` are in Hugging Face's names and shapes; they are stored as ``dtype`` (float32, float16, bfloat16).
    """
    with staged(Path(folder)) as fresh:
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
            _name_class_for_all_versions(fresh / "tokenizer_config.json")
        stored = {name: tensor.astype(np.dtype(dtype), copy=False) for name, tensor in tensors.items()}
        write_tensors(fresh / "model.safetensors", stored)
        (fresh / "config.json").write_text(json.dumps(to_json(config, dtype), indent=2) + "\n", encoding="utf-8")


def _name_class_for_all_versions(path: Path) -> None:
    """transformers 5 writes a class name that transformers 4 does not know, and opens the older name as well."""
    raw = read_json_object(path)
    path.write_text(json.dumps(raw | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n", encoding="utf-8")


def _entries(folder: Path, config: LlamaConfig) -> dict[str, Entry]:
    """The header entries of a folder's tensors, checked against the config."""
    entries: dict[str, Entry] = {}
    damaged, twice = [], []
    for file in weight_files(folder):
        try:
            header = read_header(file)
        except UserError as error:
            damaged.append(str(error))
            continue
        twice += [f"{name} is in both {entries[name].file.name} and {file.name}" for name in header if name in entries]
        entries |= header
    if damaged:
        raise UserError("; ".join(damaged))
    entries = {name: entry for name, entry in entries.items() if not name.endswith("rotary_emb.inv_freq")}
    expected = {name: slot.shape for name, slot in layout(config).items()}
    head = entries.pop(_HEAD, None) if config.tie_word_embeddings else None
    problems = misfits(expected, entries) + twice
    if head is not None and not problems:
        embedding = entries[_EMBEDDING]
        same = head.shape == embedding.shape and _equal(head, embedding)
        if not same:
            problems = [f"{_HEAD} in {head.file.name} differs from {_EMBEDDING} although tie_word_embeddings is true"]
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json: " + "; ".join(problems))
    return entries


def _equal(head: Entry, embedding: Entry) -> bool:
    return bool(np.array_equal(read_tensor(head.file, _HEAD), read_tensor(embedding.file, _EMBEDDING)))


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary: JAX on the CPU then takes it over instead of copying it."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
