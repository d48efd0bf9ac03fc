"""Writes a model folder in another format or dtype, and with an adapter merged into its weights."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.adapter import Adapter
from fedmezo_jax.llama.checkpoints.base_model import WeightFormat, write_weights
from fedmezo_jax.llama.checkpoints.layout import layout
from fedmezo_jax.llama.checkpoints.safetensors import Entry
from fedmezo_jax.llama.checkpoints.weights import open_weights
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.folder import staged
from fedmezo_jax.out_folder import out_folder

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def export(
    model: Path, out: Path, adapter: Adapter | None = None, dtype: str = "float32", form: WeightFormat = "safetensors"
):
    """Write a model folder, with the adapter merged in if one is given; all files appear at once.

    Args:
        model: the folder to read, in any format.
        out: the folder to write; must be new or empty.
        adapter: a LoRA adapter; W becomes W + (alpha/rank)·A·B.
        dtype: type of the weights written: float32, float16 or bfloat16.
        form: safetensors, which transformers opens too, or Orbax, which only this package opens.

    Raises:
        UserError: the model does not fit, ``out`` cannot be created or is not empty, or a weight is not finite.
    """
    with out_folder(out):
        if any(out.iterdir()):
            raise UserError(f"--out {out} holds files: give a new or empty folder")
        config = LlamaConfig.from_json(model)
        entries: Mapping[str, Entry] = open_weights(model, config)
        if adapter is not None:
            entries = merged(entries, config, adapter)
        with staged(out) as fresh:
            write_weights(fresh, config, lambda name: _read(entries[name], name), dtype, form)
            for name in _TOKENIZER_FILES:
                if (model / name).is_file():
                    shutil.copyfile(model / name, fresh / name)
            out.rmdir()


def _read(entry: Entry, name: str) -> np.ndarray:
    tensor = entry.read()
    if not np.isfinite(tensor).all():
        raise UserError(f"{entry.file}: {name} holds weights that are not finite; fetch the file again")
    return tensor


def merged(entries: Mapping[str, Entry], config: LlamaConfig, adapter: Adapter) -> dict[str, Entry]:
    """Returns the tensors of ``open_weights``, with (alpha/rank)·A·B added to each adapted weight in float32."""
    merged_entries = dict(entries)
    lora_index = {layer: row for row, layer in enumerate(adapter.trained or range(config.num_hidden_layers))}
    for name, slot in layout(config).items():
        if slot.path[-1] == "kernel" and slot.path[-2] in adapter.lora and slot.layer in lora_index:
            halves = {
                key: np.asarray(leaf[lora_index[slot.layer]]) for key, leaf in adapter.lora[slot.path[-2]].items()
            }
            read_merged = partial(_add, entries[name], name, halves["A"], halves["B"], adapter.alpha / adapter.rank)
            merged_entries[name] = entries[name]._replace(dtype="F32", read=read_merged)
    return merged_entries


def _add(entry: Entry, name: str, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    weight = _read(entry, name).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        total = weight + np.float32(scale) * (a @ b).T
    if not np.isfinite(total).all():
        raise UserError(f"the adapter makes {name} overflow; give another adapter")
    return total
