"""LoRA adapters in and out of PEFT's folders: ``adapter_config.json`` and ``adapter_model.safetensors``."""

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
_LARGEST_RANK = 2**31 - 1
_LONGEST_EXPRESSION = 10_000  # characters; PEFT's tools write some hundred
_PLAIN_STARTS = (True, False, None, "gaussian", "eva")


class Adapter(NamedTuple):
    """A LoRA adapter; its update to a projection is (alpha/rank) A B."""

    lora: dict[str, Any]  # the LoRA pytree, float32
    rank: int
    alpha: float  # for a rank-stabilised adapter, PEFT's lora_alpha times sqrt(rank), so that alpha/rank is its scale
    targets: tuple[str, ...]  # in canonical order
    trained: tuple[int, ...] | None  # the layers that have one, ascending; None for all


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

    With ``trained``, the layers that have an adapter, the folder's ``layers_to_transform`` names them.
    """
    tensors = {}
    for name in (targets := check_targets(targets)):
        for half in "AB":
            leaf = np.asarray(lora[name][half], np.float32)
            for layer, matrix in zip(range(len(leaf)) if trained is None else trained, leaf, strict=True):
                tensors[_key(layer, name, half)] = matrix.T
    some = {} if trained is None else {"layers_to_transform": list(trained)}
    config = some | {
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
    found = read_header(weights)
    if problems := mismatches(expected, found):
        raise UserError(f"{weights}: does not fit {_CONFIG} and the base model: " + "; ".join(problems))
    lora: dict[str, Any] = {}
    for name, shape in shapes.items():
        lora[name] = {}
        for half in "AB":
            leaf = np.empty(shape[half], np.float32)
            for row, layer in enumerate(layers):
                leaf[row] = found[_key(layer, name, half)].read().T
            if not np.isfinite(leaf).all():
                raise UserError(f"{weights}: lora_{half} of {name} is not finite; the run that made it had diverged")
            lora[name][half] = jnp.asarray(leaf)
    return Adapter(lora, rank, alpha, targets, trained)


def _key(layer: int, name: str, half: str) -> str:
    return f"base_model.model.model.layers.{layer}.{block_of(name)}.{name}.lora_{half}.weight"


def _read_config(path: Path, config: LlamaConfig) -> tuple[int, float, tuple[str, ...], tuple[int, ...] | None]:
    """Rank, alpha such that alpha/rank is the scale, targets, and the layers that have an adapter (None for all)."""
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
    assert isinstance(rank, int)  # as checked above
    assert isinstance(alpha, int | float)
    scaled = float(alpha) * math.sqrt(rank) if raw.get("use_rslora") else float(alpha)
    return rank, scaled, targets, trained


def _read_layers(raw: Mapping[str, Any], count: int) -> tuple[int, ...] | None:
    """The layers of PEFT's ``layers_to_transform``, a number or a list; None where it says nothing."""
    layers = raw.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    if raw.get("layers_pattern") not in (None, "layers", [], ["layers"]):
        raise UserError(f"layers_pattern {_shown(raw['layers_pattern'])} is not the name of LLaMA's layers")
    layers = layers if isinstance(layers, list) else [layers]
    fit = all(type(layer) is int and 0 <= layer < count for layer in layers)
    if not fit or len(set(layers)) < len(layers):
        raise UserError(f"layers_to_transform {_shown(layers)} must be distinct numbers from 0 to {count - 1}")
    if isinstance(raw.get("target_modules"), str):
        raise UserError("layers_to_transform needs target_modules to be a list of names")
    return tuple(sorted(layers))


def _read_targets(modules: Any, config: LlamaConfig) -> tuple[str, ...]:
    """The projections that PEFT's ``target_modules`` selects: names, endings of dotted names, or an expression.

    PEFT adapts a module whose whole name matches the expression, or whose name is, or ends in a dot and, an entry.
    """
    if modules == "all-linear":
        return TARGETS
    layers = config.num_hidden_layers
    places = {f"model.layers.{i}.{block_of(name)}.{name}": name for name in TARGETS for i in range(layers)}
    candidates = [*places, "model.embed_tokens", "lm_head"]
    if isinstance(modules, str):
        chosen = _matching(modules, candidates)
    elif isinstance(modules, list) and all(isinstance(name, str) for name in modules):
        names = set(modules)
        chosen = [place for place in candidates if not names.isdisjoint(_endings(place))]
    else:
        raise UserError(f"only names, an expression or 'all-linear' are supported, not {_shown(modules)}")
    targets = check_targets(dict.fromkeys(places.get(place, place) for place in chosen))
    if partial := [name for name in targets if sum(places.get(place) == name for place in chosen) < layers]:
        raise UserError(f"{', '.join(partial)} of some layers alone, which is not supported")
    return targets


def _endings(place: str) -> list[str]:
    """``a.b.c`` -> ``a.b.c``, ``b.c``, ``c``."""
    parts = place.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _matching(expression: str, places: list[str]) -> list[str]:
    """The places that a regular expression of Python's matches as a whole, as ``re.fullmatch`` would find them.

    RE2 does the matching, in time linear in the text for every expression. Lookarounds and backreferences, which it
    lacks, are refused, and so are expressions that mean something else to Python.
    """
    import pyarrow as pa  # a second to import, for adapters with an expression alone
    import pyarrow.compute as pc

    shown = shorten(repr(expression))
    if len(expression) > _LONGEST_EXPRESSION:
        raise UserError(f"an expression of {len(expression):,} characters is too long; list the projections by name")
    try:
        with warnings.catch_warnings(action="error"):  # of sets that Python is going to read otherwise
            re.compile(expression)
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        raise UserError(f"{shown} is no regular expression ({error}); list the projections by name") from None
    if "{," in expression or "[:" in expression:  # a text and a class of characters to RE2
        raise UserError(f"{shown}: '{{,' and '[:' are not supported; list the projections by name")
    try:
        whole = rf"\A(?:{expression})\z"
        found = pc.match_substring_regex(pa.array(places), whole).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{shown} is not supported ({shorten(reason)}); list the projections by name") from None
    return [place for place, matches in zip(places, found, strict=True) if matches]


def _shown(value: Any) -> str:
    return shorten(repr(value))
