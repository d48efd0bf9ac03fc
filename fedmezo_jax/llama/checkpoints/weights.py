"""The weights of a model folder in any format, as single tensors with Hugging Face's names."""

import math
import os
from collections import Counter
from pathlib import Path

import numpy as np

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.flax_msgpack import read_flax_header
from fedmezo_jax.llama.checkpoints.layout import layout
from fedmezo_jax.llama.checkpoints.orbax import ORBAX, read_orbax_header
from fedmezo_jax.llama.checkpoints.safetensors import Entry, listed, mismatches, read_header
from fedmezo_jax.llama.config import LlamaConfig, read_config
from fedmezo_jax.llama.folder import read_json_object, shorten

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAFETENSORS, FLAX = "model.safetensors", "flax_model.msgpack"
_PICKLES = ("bin", "pt", "pth", "ckpt", "pkl")


def open_weights(folder: Path, config: LlamaConfig) -> dict[str, Entry]:
    """Returns every tensor of the config's LLaMA (``layout``) by name; none is read yet.

    The first of these is used: model.safetensors (one file, or shards with an index), flax_model.msgpack (likewise), a
    folder ``orbax``, a single ``.gguf`` file.

    Raises:
        UserError: lists all damaged files, or else all tensors that are missing, unexpected, or of another shape or
            type; also for pickled weights, which are never opened.
    """
    entries, problems = _find(folder, config)
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json: " + "; ".join(problems))
    return entries


def sixteen_bit(folder: Path, config: LlamaConfig) -> bool:
    """Returns whether most of a model's weights are stored in sixteen bits; errors as :func:`open_weights`."""
    sizes: Counter[bool] = Counter()
    for entry in open_weights(folder, config).values():
        sizes[entry.dtype != "F32"] += math.prod(entry.shape)
    return sizes[True] > sizes[False]


def check_folder(folder: Path) -> None:
    """Check a folder's config and the headers of its weights.

    Raises:
        UserError: lists everything that is wrong.
    """
    config, problems = read_config(folder)
    weight_files(folder)
    faults = [f"{folder / 'config.json'}: " + "; ".join(problems)] if problems else []
    if config is not None:
        try:
            open_weights(folder, config)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("; and ".join(faults))


def weight_files(folder: Path) -> list[Path]:
    """Returns the weight files of a model folder (for Orbax, its folder).

    Raises:
        UserError: there are none that can be opened.
    """
    for name in (SAFETENSORS, FLAX):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return _shards(index)
    if (folder / ORBAX).is_dir():
        return [folder / ORBAX]
    if len(files := sorted(folder.glob("*.gguf"))) == 1:
        return files
    if files:
        raise UserError(f"{folder}: holds {len(files)} GGUF files; give the one that is meant by its name")
    if pickled := sorted(file.name for kind in _PICKLES for file in folder.glob(f"*.{kind}")):
        raise UserError(
            f"{folder}: {pickled[0]} is a pickle, which can run code and is never opened here; where you trust it, "
            f"convert it with transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r})"
        )
    raise UserError(
        f"{folder}: holds neither {SAFETENSORS} nor {SAFETENSORS}.index.json, nor {FLAX}, an {ORBAX} folder or a "
        ".gguf file; give a model's folder"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map from tensors to files; fetch it again")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [shorten(name) for name in names if Path(name).name != name]:
        raise UserError(f"{index}: names files outside its folder ({listed(outside)}); fetch it again")
    if absent := [shorten(name) for name in names if not os.path.isfile(index.parent / name)]:  # accepts any name
        raise UserError(f"{index}: names files that are not there: {listed(absent)}; fetch them")
    return [index.parent / name for name in names]


def _find(folder: Path, config: LlamaConfig) -> tuple[dict[str, Entry], list[str]]:
    """A folder's tensors, and how they differ from the config's."""
    entries: dict[str, Entry] = {}
    damaged, duplicates = [], []
    for file in weight_files(folder):
        try:
            header = _header(file, config)
        except UserError as error:
            damaged.append(str(error))
            continue
        duplicates += [
            f"{name} is in both {entries[name].file.name} and {file.name}" for name in header if name in entries
        ]
        entries |= header
    if damaged:
        raise UserError("; ".join(damaged))
    entries = {name: entry for name, entry in entries.items() if not name.endswith("rotary_emb.inv_freq")}
    expected = {name: slot.shape for name, slot in layout(config).items()}
    head = entries.pop(_HEAD, None) if config.tie_word_embeddings else None
    problems = mismatches(expected, entries) + duplicates
    if head is not None and not problems:
        embedding = entries[_EMBEDDING]
        if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
            problems = [f"{_HEAD} in {head.file.name} differs from {_EMBEDDING} although tie_word_embeddings is true"]
    return entries, problems


def _header(file: Path, config: LlamaConfig) -> dict[str, Entry]:
    if file.name == ORBAX:
        return read_orbax_header(file)
    if file.suffix == ".msgpack":
        return read_flax_header(file, config)
    if file.suffix == ".gguf":
        # only these files need the gguf package
        from fedmezo_jax.llama.checkpoints.gguf import open_gguf
        from fedmezo_jax.llama.checkpoints.gguf_config import gguf_weights

        return gguf_weights(open_gguf(file.resolve()), config)  # the target of a link, for messages
    return read_header(file)
