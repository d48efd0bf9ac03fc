"""Conversion of a LLaMA in GGUF, llama.cpp's file format, to a Hugging Face folder with float32 weights."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoint import write_folder
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.layout import layout
from fedmezo_jax.llama.tensorfile import Entry, misfits

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# How a text is cut into words before byte-pair merges, by GGUF's name for it.
_SPLITS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
_CONTROL = 3  # GGUF's token type for special tokens


def convert_gguf(file: str | PathLike, folder: str | PathLike) -> None:
    """Write the Hugging Face folder (config, float32 safetensors, tokenizer) of a LLaMA's GGUF file; all at once.

    Quantised weights are dequantised exactly. Raises ``UserError`` where the file is damaged, is no LLaMA, or holds
    a tensor, rotary scaling or tokenizer that is not supported.
    """
    file = Path(file)
    try:
        reader = GGUFReader(file)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{file}: is no readable GGUF file ({error}); fetch it again") from None
    stored = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
    config = _read_config(file, meta, stored)
    expected = {name: slot.shape for name, slot in layout(config).items()}
    # GGUF writes shapes innermost first; every one of its types can be dequantised to float32.
    found = {name: Entry(file, tuple(map(int, tensor.shape[::-1])), "F32") for name, tensor in stored.items()}
    if problems := misfits(expected, found):
        raise UserError(f"{file}: does not fit its metadata: " + "; ".join(problems))
    tokenizer = _read_tokenizer(file, meta)
    weights = {name: _read_weight(stored[name], name, config) for name in expected}
    write_folder(folder, config, weights, tokenizer=tokenizer)


def _hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; an unknown name stays as it is."""
    parts = name.split(".")
    block = f"model.layers.{parts[1]}." if parts[0] == "blk" and len(parts) == 4 else ""
    if len(parts) != (4 if block else 2) or parts[-2] not in _NAMES:
        return name
    return f"{block}{_NAMES[parts[-2]]}.{parts[-1]}"


def _read_weight(tensor: ReaderTensor, name: str, config: LlamaConfig) -> np.ndarray:
    """A tensor in float32, its rows in Hugging Face's order."""
    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    if ".q_proj." in name or ".k_proj." in name:
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        return rows_for_rotate_half(weight, heads)
    return weight


def rows_for_rotate_half(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k (``[heads*head_dim, ...]``) from interleaved rotary pairs to rotate-half.

    GGUF rotates rows (2i, 2i+1) of a head together, Hugging Face rows (i, i + head_dim/2).
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _read_config(file: Path, meta: Mapping[str, Any], stored: Mapping[str, ReaderTensor]) -> LlamaConfig:
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file}: holds a model of architecture {architecture!r}, only llama is supported")
    scaling = meta.get("llama.rope.scaling.type", "none")
    rope = {"rope_type": "linear", "factor": meta.get("llama.rope.scaling.factor")} if scaling == "linear" else None
    unsupported = [
        f"{name} = {meta[name]}"
        for name, accepted in {"llama.rope.scaling.type": ("none", "linear"), "llama.expert_count": (0,)}.items()
        if name in meta and meta[name] not in accepted
    ]
    heads, hidden = meta.get("llama.attention.head_count"), meta.get("llama.embedding_length")
    head_dim = meta.get("llama.attention.key_length") or (hidden // heads if heads and hidden else None)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if meta.get(name, head_dim) != head_dim:
            unsupported.append(f"{name} = {meta[name]} where a head is {head_dim} wide")
    if unsupported:
        raise UserError(f"{file}: not supported: " + "; ".join(unsupported))
    tokens = meta.get("tokenizer.ggml.tokens", [])
    try:
        return LlamaConfig.from_json(
            {
                "vocab_size": meta.get("llama.vocab_size") or len(tokens) or None,
                "hidden_size": hidden,
                "intermediate_size": meta.get("llama.feed_forward_length"),
                "num_hidden_layers": meta.get("llama.block_count"),
                "num_attention_heads": heads,
                "num_key_value_heads": meta.get("llama.attention.head_count_kv"),
                "head_dim": head_dim,
                "rms_norm_eps": _as_written(meta.get("llama.attention.layer_norm_rms_epsilon")),
                "rope_theta": _as_written(meta.get("llama.rope.freq_base")),
                "rope_scaling": rope,
                "tie_word_embeddings": "lm_head.weight" not in stored,
                "attention_bias": "model.layers.0.self_attn.q_proj.bias" in stored,
                "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in stored,
                "max_position_embeddings": meta.get("llama.context_length"),
                "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
                "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
            }
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _as_written(value: float | None) -> float | None:
    """The shortest decimal that a float32 stands for: 1e-05, not 9.999999747378752e-06."""
    return None if value is None else float(str(np.float32(value)))


def _read_tokenizer(file: Path, meta: Mapping[str, Any]) -> Any:
    """The byte-level BPE in a file's metadata, as a ``PreTrainedTokenizerFast``."""
    from transformers import PreTrainedTokenizerFast  # takes seconds to import, and most runs never need it here

    model, split = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if model != "gpt2" or split not in _SPLITS or meta.get("tokenizer.ggml.add_bos_token"):
        raise UserError(
            f"{file}: its tokenizer ({model}, {split}) is not supported, only gpt2 with {', '.join(_SPLITS)} that adds "
            "no begin token; give the model's Hugging Face folder instead"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta.get("tokenizer.ggml.token_type", [])
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {
        f"{role}_token": tokens[meta[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if f"tokenizer.ggml.{key}_token_id" in meta
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=meta.get("tokenizer.chat_template"),
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
