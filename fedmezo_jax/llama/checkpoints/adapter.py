"""Reads and writes LoRA adapters as PEFT folders: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import math
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import block_of
from fedmezo_jax.llama.checkpoints.safetensors import mismatches, read_header, write_tensors
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.folder import read_json_object, shorten, staged
from fedmezo_jax.llama.lora import TARGETS, check_targets, lora_shapes

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_READ = {
    *("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "init_lora_weights", "task_type", "bias"),
    *("layers_to_transform", "layers_pattern"),
}
# Fields that never change the logits. Any other field must be inactive: null, false or empty.
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
_LARGEST_RANK = 2**31 - 1
_LONGEST_EXPRESSION = 10_000  # characters; PEFT's tools write a few hundred
# PEFT's other initialisations of A and B also change the base weights, which the folder does not contain.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva")


class Adapter(NamedTuple):
    """A LoRA adapter; its update to a projection is (alpha/rank) A B.

    Attributes:
        lora: the LoRA pytree, float32.
        rank: the rank of every A and B.
        alpha: alpha/rank is the scale. For a rank-stabilised adapter this is PEFT's lora_alpha times sqrt(rank).
        targets: names of the adapted projections, in canonical order.
        trained: the layers that have an adapter, ascending; None for all.
    """

    lora: dict[str, Any]
    rank: int
    alpha: float
    targets: tuple[str, ...]
    trained: tuple[int, ...] | None


def save_adapter(
    folder: str | PathLike,
    lora: Mapping[str, Any],
    *,
    rank: int,
    alpha: float,
    targets: Iterable[str],
    base_name: str,
    trained: tuple[int, ...] | None = None,
) -> None:
    """Write a LoRA pytree as a folder that Hugging Face PEFT loads onto the model ``base_name``.

    Args:
        folder: the folder to write; its files appear at once.
        lora: the LoRA pytree, with leaves [layers, ...].
        rank: the adapter's rank.
        alpha: the scale is alpha/rank.
        targets: names of the adapted projections.
        base_name: name of the base model.
        trained: the layers that have an adapter, written as ``layers_to_transform``; None for all.
    """
    tensors = {}
    for name in (targets := check_targets(targets)):
        for half in "AB":
            leaf = np.asarray(lora[name][half], np.float32)
            for layer, matrix in zip(range(len(leaf)) if trained is None else trained, leaf, strict=True):
                tensors[_key(layer, name, half)] = matrix.T
    layer_field = {} if trained is None else {"layers_to_transform": list(trained)}
    config = layer_field | {
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

    Raises:
        UserError: lists everything that is not supported (DoRA, rank patterns, biases, saved modules, other PEFT types,
            ...), or all tensors that are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    rank, alpha, targets, trained = _read_config(folder / _CONFIG, config)
    weights = folder / _WEIGHTS
    if not weights.is_file():
        pickled = (
            " (adapter_model.bin is a pickle and is never opened)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise UserError(
            f"{weights}: is not there{pickled}; save the adapter with PEFT's save_pretrained as safetensors"
        )
    shapes = lora_shapes(config, rank, targets, trained)
    layers = range(config.num_hidden_layers) if trained is None else trained
    expected = {
        _key(layer, name, half): shape[half][:0:-1]
        for name, shape in shapes.items()
        for half in "AB"
        for layer in layers
    }
    entries = read_header(weights)
    if problems := mismatches(expected, entries):
        raise UserError(f"{weights}: does not fit {_CONFIG} and the base model: " + "; ".join(problems))
    lora: dict[str, Any] = {}
    for name, shape in shapes.items():
        lora[name] = {}
        for half in "AB":
            leaf = np.empty(shape[half], np.float32)
            for index, layer in enumerate(layers):
                leaf[index] = entries[_key(layer, name, half)].read().T
            if not np.isfinite(leaf).all():
                raise UserError(f"{weights}: lora_{half} of {name} is not finite; the run that made it had diverged")
            lora[name][half] = jnp.asarray(leaf)
    return Adapter(lora, rank, alpha, targets, trained)


def _key(layer: int, name: str, half: str) -> str:
    return f"base_model.model.model.layers.{layer}.{block_of(name)}.{name}.lora_{half}.weight"


def _read_config(path: Path, config: LlamaConfig) -> tuple[int, float, tuple[str, ...], tuple[int, ...] | None]:
    """Returns rank, alpha (the scale is alpha/rank), targets, and the layers with an adapter (None for all)."""
    raw = read_json_object(path)
    problems = []
    rank, alpha, modules = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type {_shown(raw.get('peft_type'))} is not LORA")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"task_type {_shown(raw['task_type'])} is not CAUSAL_LM")
    if raw.get("bias") not in (None, "none"):
        problems.append(f"bias {_shown(raw['bias'])} is not supported")
    if raw.get("init_lora_weights") not in _PLAIN_STARTS:
        problems.append(
            f"init_lora_weights {_shown(raw['init_lora_weights'])} changes the base weights; convert it to plain LoRA"
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _LARGEST_RANK:
        problems.append(f"r must be a whole number from 1 to {_LARGEST_RANK}, not {_shown(rank)}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        problems.append(f"lora_alpha must be a number, not {_shown(alpha)}")
    if not isinstance(raw.get("use_rslora", False), bool):
        problems.append(f"use_rslora must be true or false, not {_shown(raw['use_rslora'])}")
    targets: tuple[str, ...] = ()
    try:
        targets = _read_targets(modules, config)
    except UserError as error:
        problems.append(f"target_modules: {error}")
    trained = None
    try:
        trained = _read_layers(raw, config.num_hidden_layers)
    except UserError as error:
        problems.append(str(error))
    for field in sorted(raw.keys() - _READ - _HARMLESS):
        if raw[field] not in (None, False, [], {}):
            problems.append(f"{shorten(field)} = {shorten(json.dumps(raw[field]))} is not supported")
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    assert isinstance(rank, int)  # checked above
    assert isinstance(alpha, int | float)
    scaled = float(alpha) * math.sqrt(rank) if raw.get("use_rslora") else float(alpha)
    return rank, scaled, targets, trained


def _read_layers(raw: Mapping[str, Any], count: int) -> tuple[int, ...] | None:
    """The layers in PEFT's ``layers_to_transform``, a number or a list; None if it is empty."""
    layers = raw.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    if raw.get("layers_pattern") not in (None, "layers", [], ["layers"]):
        raise UserError(f"layers_pattern {_shown(raw['layers_pattern'])} is not the name of LLaMA's layers")
    layers = layers if isinstance(layers, list) else [layers]
    in_range = all(type(layer) is int and 0 <= layer < count for layer in layers)
    if not in_range or len(set(layers)) < len(layers):
        raise UserError(f"layers_to_transform {_shown(layers)} must be distinct numbers from 0 to {count - 1}")
    if isinstance(raw.get("target_modules"), str):
        raise UserError("layers_to_transform needs target_modules to be a list of names")
    return tuple(sorted(layers))


def _read_targets(modules: Any, config: LlamaConfig) -> tuple[str, ...]:
    """The projections that PEFT's ``target_modules`` selects, which is a list of names or a regular expression.

    PEFT adapts a module if its whole name matches the expression, or if its name is an entry or ends in "." and an
    entry.
    """
    if modules == "all-linear":
        return TARGETS
    layers = config.num_hidden_layers
    projection_names = {f"model.layers.{i}.{block_of(name)}.{name}": name for name in TARGETS for i in range(layers)}
    candidates = [*projection_names, "model.embed_tokens", "lm_head"]
    if isinstance(modules, str):
        chosen = _matching(modules, candidates)
    elif isinstance(modules, list) and all(isinstance(name, str) for name in modules):
        entries = set(modules)
        chosen = [module for module in candidates if not entries.isdisjoint(_endings(module))]
    else:
        raise UserError(f"only names, an expression or 'all-linear' are supported, not {_shown(modules)}")
    targets = check_targets(dict.fromkeys(projection_names.get(module, module) for module in chosen))
    if partial := [name for name in targets if sum(projection_names.get(module) == name for module in chosen) < layers]:
        raise UserError(f"{', '.join(partial)} of some layers alone, which is not supported")
    return targets


def _endings(module: str) -> list[str]:
    """``a.b.c`` -> ``a.b.c``, ``b.c``, ``c``."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _matching(expression: str, modules: list[str]) -> list[str]:
    """The module names that a Python regular expression matches as a whole, as with ``re.fullmatch``.

    RE2 does the matching, in linear time for every expression. Lookarounds and backreferences, which RE2 lacks, are
    refused, and so are expressions that have another meaning in Python.
    """
    import pyarrow as pa  # takes a second to import; only expressions need it
    import pyarrow.compute as pc

    shown = shorten(repr(expression))
    if len(expression) > _LONGEST_EXPRESSION:
        raise UserError(f"an expression of {len(expression):,} characters is too long; list the projections by name")
    try:
        with warnings.catch_warnings(action="error"):  # sets whose meaning will change in Python
            re.compile(expression)
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        raise UserError(f"{shown} is no regular expression ({error}); list the projections by name") from None
    if "{," in expression or "[:" in expression:  # RE2 reads these as text and as a character class
        raise UserError(f"{shown}: '{{,' and '[:' are not supported; list the projections by name")
    try:
        whole = rf"\A(?:{expression})\z"
        is_match = pc.match_substring_regex(pa.array(modules), whole).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{shown} is not supported ({shorten(reason)}); list the projections by name") from None
    return [module for module, matches in zip(modules, is_match, strict=True) if matches]


def _shown(value: Any) -> str:
    return shorten(repr(value))
