"""LoRA adapters in and out of PEFT's folders: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.folder import read_json_object, staged
from fedmezo_jax.llama.layout import block_of
from fedmezo_jax.llama.lora import TARGETS, check_targets, lora_shapes
from fedmezo_jax.llama.tensorfile import misfits, read_header, write_tensors

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "init_lora_weights", "task_type", "bias"}
# Fields that leave the logits alone whatever they hold. Any other field must be inactive: null, false or empty.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}
# The other ways to start A and B in PEFT also change the base weights, which an adapter's folder does not hold.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva")


class Adapter(NamedTuple):
    """A LoRA adapter; its update to a projection is (alpha/rank) A B."""

    lora: dict[str, Any]  # the LoRA pytree, float32
    rank: int
    alpha: float  # for a rank-stabilised adapter, PEFT's lora_alpha times sqrt(rank), so that alpha/rank is its scale
    targets: tuple[str, ...]  # in canonical order


def save_adapter(
    folder: str | PathLike, lora: Mapping[str, Any], *, rank: int, alpha: float, targets: Iterable[str], base_name: str
) -> None:
    """Write a LoRA pytree as a folder that Hugging Face PEFT loads onto the model ``base_name``."""
    tensors = {}
    for name in (targets := check_targets(targets)):
        for half in "AB":
            leaf = np.asarray(lora[name][half], np.float32)
            for layer, matrix in enumerate(leaf):
                tensors[_key(layer, name, half)] = matrix.T
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "target_modules": list(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    with staged(Path(folder)) as fresh:
        write_tensors(fresh / _WEIGHTS, tensors)
        (fresh / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: str | PathLike, config: LlamaConfig) -> Adapter:
    """Read a PEFT LoRA folder for a model of this config.

    Raises ``UserError`` naming the file and all that is not supported (DoRA, patterns of ranks, biases, saved modules,
    other PEFT types, ...), or all tensors that are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    rank, alpha, targets = _read_config(folder / _CONFIG, config)
    weights = folder / _WEIGHTS
    if not weights.is_file():
        pickled = (
            " (adapter_model.bin is a pickle and is never opened)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise UserError(
            f"{weights}: is not there{pickled}; save the adapter with PEFT's save_pretrained as safetensors"
        )
    shapes = lora_shapes(config, rank, targets)
    expected = {
        _key(layer, name, half): shape[half][:0:-1]
        for name, shape in shapes.items()
        for half in "AB"
        for layer in range(config.num_hidden_layers)
    }
    found = read_header(weights)
    if problems := misfits(expected, found):
        raise UserError(f"{weights}: does not fit {_CONFIG} and the base model: " + "; ".join(problems))
    lora: dict[str, Any] = {}
    for name, shape in shapes.items():
        lora[name] = {}
        for half in "AB":
            leaf = np.empty(shape[half], np.float32)
            for layer in range(config.num_hidden_layers):
                leaf[layer] = found[_key(layer, name, half)].read().T
            if not np.isfinite(leaf).all():
                raise UserError(f"{weights}: lora_{half} of {name} is not finite; the run that made it had diverged")
            lora[name][half] = jnp.asarray(leaf)
    return Adapter(lora, rank, alpha, targets)


def _key(layer: int, name: str, half: str) -> str:
    return f"base_model.model.model.layers.{layer}.{block_of(name)}.{name}.lora_{half}.weight"


def _read_config(path: Path, config: LlamaConfig) -> tuple[int, float, tuple[str, ...]]:
    """Rank, alpha such that alpha/rank is the scale, and targets."""
    raw = read_json_object(path)
    problems = []
    rank, alpha, modules = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type {raw.get('peft_type')!r} is not LORA")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"task_type {raw['task_type']!r} is not CAUSAL_LM")
    if raw.get("bias") not in (None, "none"):
        problems.append(f"bias {raw['bias']!r} is not supported")
    if raw.get("init_lora_weights") not in _PLAIN_STARTS:
        problems.append(
            f"init_lora_weights {raw['init_lora_weights']!r} changes the base weights; convert it to plain LoRA"
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(f"r must be a whole number from 1, not {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        problems.append(f"lora_alpha must be a number, not {alpha!r}")
    if not isinstance(raw.get("use_rslora", False), bool):
        problems.append(f"use_rslora must be true or false, not {raw['use_rslora']!r}")
    targets: tuple[str, ...] = ()
    try:
        targets = _read_targets(modules, config)
    except UserError as error:
        problems.append(f"target_modules: {error}")
    for field in sorted(raw.keys() - _READ - _HARMLESS):
        if raw[field] not in (None, False, [], {}):
            problems.append(f"{field} = {json.dumps(raw[field])} is not supported")
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    assert isinstance(rank, int)  # as checked above
    assert isinstance(alpha, int | float)
    return rank, float(alpha) * math.sqrt(rank) if raw.get("use_rslora") else float(alpha), targets


def _read_targets(modules: Any, config: LlamaConfig) -> tuple[str, ...]:
    """The projections that PEFT's ``target_modules`` selects: names, endings of dotted names, or an expression.

    PEFT adapts a module whose whole name matches the expression, or whose name is, or ends in a dot and, an entry.
    """
    if modules == "all-linear":
        return TARGETS
    layers = config.num_hidden_layers
    places = {f"model.layers.{i}.{block_of(name)}.{name}": name for name in TARGETS for i in range(layers)}
    others = ("model.embed_tokens", "lm_head")
    if isinstance(modules, str):
        try:
            matches = re.compile(modules).fullmatch
        except re.error as error:
            raise UserError(f"{modules!r} is no regular expression ({error})") from None
        chosen = [place for place in (*places, *others) if matches(place)]
    elif isinstance(modules, list) and all(isinstance(name, str) for name in modules):
        endings = tuple(f".{name}" for name in modules)
        chosen = [place for place in (*places, *others) if f".{place}".endswith(endings)]
    else:
        raise UserError(f"only names, an expression or 'all-linear' are supported, not {modules!r}")
    targets = check_targets(dict.fromkeys(places.get(place, place) for place in chosen))
    if partial := [name for name in targets if sum(places.get(place) == name for place in chosen) < layers]:
        raise UserError(f"{', '.join(partial)} of some layers alone, which is not supported")
    return targets
