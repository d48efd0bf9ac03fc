"""Reads the config from a GGUF file's metadata, and the rotary scaling from its ``rope_freqs`` tensor."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.gguf import ROPE_FREQS, Gguf, architecture, gguf_entries, read_stored
from fedmezo_jax.llama.checkpoints.safetensors import Entry
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.families import FAMILIES
from fedmezo_jax.llama.folder import shorten
from fedmezo_jax.llama.rope import Llama3Rope

_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_OLD = (
    1.0,
    4.0,
    8192,
)  # the same for every LLaMA from 3.1 on; the files do not contain them

# Metadata that affect the computation: the values that change nothing, or None if the value is read.
_KNOWN: dict[str, tuple | None] = {
    "attention.head_count": None,
    "attention.head_count_kv": None,
    "attention.key_length": None,
    "attention.layer_norm_rms_epsilon": None,
    "attention.value_length": None,
    "block_count": None,
    "context_length": None,
    "embedding_length": None,
    "expert_count": (0,),
    "expert_used_count": (0,),
    "feed_forward_length": None,
    "rope.dimension_count": None,
    "rope.freq_base": None,
    "rope.scaling.factor": None,
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.original_context_length": None,
    "rope.scaling.type": ("none", "linear", "yarn"),
    "rope.scaling.yarn_beta_fast": None,
    "rope.scaling.yarn_beta_slow": None,
    "tensor_data_layout": ("Meta AI original pth",),
    "vocab_size": None,
}


def read_gguf_config(opened: Gguf) -> LlamaConfig:
    """Returns the config of a file.

    Raises:
        UserError: lists everything in the file that is not supported.
    """
    file, meta = opened.file, opened.meta
    family = architecture(opened)
    prefix = f"{family}."
    model_meta = {name.removeprefix(prefix): value for name, value in meta.items() if name.startswith(prefix)}
    unsupported = [
        f"{prefix}{shorten(name)} = {shorten(str(value))}"
        for name, value in model_meta.items()
        if name not in _KNOWN or ((accepted := _KNOWN[name]) is not None and value not in accepted)
    ]
    unsupported += [
        f"{prefix}{name} = {shorten(repr(value))}, which is no number"
        for name, value in model_meta.items()
        if _KNOWN.get(name, ()) is None and (isinstance(value, bool) or not isinstance(value, int | float))
    ]
    if meta.get("split.count", 1) not in (0, 1):
        unsupported.append(f"one part of {meta['split.count']}; join them with llama.cpp's llama-gguf-split --merge")
    if unsupported:
        raise UserError(f"{file}: not supported: " + "; ".join(unsupported))
    heads, hidden = model_meta.get("attention.head_count"), model_meta.get("embedding_length")
    head_dim = model_meta.get("attention.key_length")
    if not head_dim and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        head_dim = hidden // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if model_meta.get(name, head_dim) != head_dim:
            unsupported.append(f"{prefix}{name} = {model_meta[name]} where a head is {head_dim} wide")
    if unsupported:
        raise UserError(f"{file}: not supported: " + "; ".join(unsupported))
    tokens = meta.get("tokenizer.ggml.tokens")
    biases = {"attention_bias": "self_attn.q_proj.bias", "mlp_bias": "mlp.gate_proj.bias"}
    try:
        return LlamaConfig.from_json(
            {
                "model_type": family,
                "vocab_size": model_meta.get("vocab_size") or (len(tokens) if isinstance(tokens, list) else None),
                "hidden_size": hidden,
                "intermediate_size": model_meta.get("feed_forward_length"),
                "num_hidden_layers": model_meta.get("block_count"),
                "num_attention_heads": heads,
                "num_key_value_heads": model_meta.get("attention.head_count_kv"),
                "head_dim": head_dim,
                "rms_norm_eps": _as_written(model_meta.get("attention.layer_norm_rms_epsilon")),
                "rope_theta": _as_written(model_meta.get("rope.freq_base", 10000.0)),
                "rope_scaling": _rope_scaling(opened, model_meta, head_dim),
                "tie_word_embeddings": "lm_head.weight" not in opened.tensors,
                **{
                    flag: f"model.layers.0.{tensor}" in opened.tensors
                    for flag, tensor in biases.items()
                    if flag in FAMILIES[family].flags
                },
                "max_position_embeddings": model_meta.get("context_length"),
                "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
                "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
            }
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _as_written(value: float | None) -> float | None:
    """The shortest decimal that a float32 stands for: 1e-05, not 9.999999747378752e-06."""
    return None if value is None else float(str(np.float32(value)))


def _rope_scaling(opened: Gguf, model_meta: Mapping[str, Any], head_dim: int | None) -> dict[str, Any] | None:
    kind = model_meta.get("rope.scaling.type", "none")
    stored = opened.tensors.get(ROPE_FREQS)
    if stored is None or not head_dim:
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": _as_written(model_meta.get("rope.scaling.factor"))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = model_meta.get("rope.scaling.original_context_length")
            for field in ("beta_fast", "beta_slow"):
                scaling[field] = _as_written(model_meta.get(f"rope.scaling.yarn_{field}"))
        return scaling
    scaling = None
    if kind == "none" and stored.shape == (head_dim // 2,):
        scaling = llama3_scaling(
            read_stored(opened.file, stored), _as_written(model_meta.get("rope.freq_base")) or 10000.0
        )
    if scaling is None:
        raise UserError(
            f"{ROPE_FREQS} is not LLaMA 3.1's scaling (low_freq_factor 1 and high_freq_factor 4); give the model's "
            "Hugging Face folder instead"
        )
    return {"rope_type": "llama3", **asdict(scaling)}


def rope_divisors(scaling: Llama3Rope, theta: float, head_dim: int) -> np.ndarray:
    """Returns the divisor of each rotary frequency, float64 [head_dim/2], as llama.cpp stores it in rope_freqs."""
    turns = scaling.original_max_position_embeddings * _frequencies(theta, head_dim) / (2 * np.pi)
    kept_share = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return 1 / (kept_share + (1 - kept_share) / scaling.factor)


def llama3_scaling(divisors: np.ndarray, theta: float) -> Llama3Rope | None:
    """Returns the scaling with these divisors, float32 [head_dim/2], or None if none with LLaMA's own ramp has them.

    Any divisor between 1 and the factor determines the position of the ramp. Without one, every position between two
    frequencies gives the same model, and LLaMA's own is tried.
    """
    factor = _as_written(divisors.max())
    assert factor is not None
    if not (np.isfinite(divisors).all() and divisors.min() > 0):
        return None
    on_ramp = (divisors > 1 + 1e-5) & (divisors < factor * (1 - 1e-5))
    kept_share = (1 / divisors[on_ramp] - 1 / factor) / (1 - 1 / factor)
    turns = _LLAMA3_LOW + kept_share * (_LLAMA3_HIGH - _LLAMA3_LOW)
    old_lengths = 2 * np.pi * turns / _frequencies(theta, 2 * len(divisors))[on_ramp]
    old_lengths = old_lengths[np.isfinite(old_lengths)]
    for old_length in (_LLAMA3_OLD, *(round(float(old_length)) for old_length in old_lengths)):
        scaling = Llama3Rope(factor, _LLAMA3_LOW, _LLAMA3_HIGH, old_length)
        if old_length > 0 and np.allclose(
            rope_divisors(scaling, theta, 2 * len(divisors)), divisors, rtol=1e-5, atol=0
        ):
            return scaling
    return None


def _frequencies(theta: float, head_dim: int) -> np.ndarray:
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)


def gguf_weights(opened: Gguf, config: LlamaConfig) -> dict[str, Entry]:
    """Returns the tensors of a GGUF file, without ``rope_freqs`` if it agrees with the config's rotary scaling."""
    entries = gguf_entries(opened, config)
    if ROPE_FREQS in entries and isinstance(config.rope_scaling, Llama3Rope):
        divisors = rope_divisors(config.rope_scaling, config.rope_theta, config.head_dim)
        stored = entries[ROPE_FREQS].read()
        if stored.shape == divisors.shape and np.allclose(stored, divisors, rtol=1e-5, atol=0):
            del entries[ROPE_FREQS]
    return entries
