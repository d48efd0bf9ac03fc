"""What Hugging Face's classes compute on tiny random models, for machines without PyTorch.

    python tests/support/make_goldens.py

writes ``llama.safetensors``, with every case of :data:`CASES` at every level from the norm to the loss, and
``families.safetensors``, with logits and greedy tokens of every case of :data:`FAMILY_CASES`, into ``goldens/``.
Weights and inputs are not stored: they are drawn from ``numpy.random.RandomState``, whose streams are frozen for good.
"""

from copy import deepcopy
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDENS = Path(__file__).parent / "goldens" / "llama.safetensors"
FAMILY_GOLDENS = GOLDENS.with_name("families.safetensors")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
# Of the four wavelengths, 6, 63, 628 and 6283 positions, the first is kept, the second blended, the others divided.
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CASES = {
    **{
        f"{heads} key/value heads, {'tied' if tied else 'untied'}": {
            "num_key_value_heads": heads,
            "tie_word_embeddings": tied,
        }
        for heads in (1, 2, 4)
        for tied in (False, True)
    },
    "rope linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope llama3": {"rope_scaling": _LLAMA3},
    "rope base 500, epsilon 0.1, attention biases": {"rope_theta": 500.0, "rms_norm_eps": 0.1, "attention_bias": True},
    "mlp biases, wide heads": {"mlp_bias": True, "head_dim": 12},
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LAYERS = {"num_hidden_layers": 3}
_WINDOW = {"use_sliding_window": True, "sliding_window": 5}
FAMILY_CASES = {
    name: {**_LAYERS, **changed}
    for name, changed in {
        "llama, yarn": {"model_type": "llama", "rope_scaling": _YARN},
        "llama, dynamic": {
            **{"model_type": "llama", "max_position_embeddings": 8},
            "rope_scaling": {"rope_type": "dynamic", "factor": 3.0},
        },
        "mistral": {"model_type": "mistral", "sliding_window": None},
        "mistral, window": {"model_type": "mistral", "sliding_window": 5, "num_key_value_heads": 1},
        "mistral, tied, linear": {
            **{"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True, "head_dim": 12},
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        "ministral, window in one layer": {
            **{"model_type": "ministral", "sliding_window": 5},
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "qwen2": {"model_type": "qwen2"},
        "qwen2, tied, yarn": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_scaling": _YARN},
        "qwen2, window above": {"model_type": "qwen2", "max_window_layers": 1, "num_key_value_heads": 4, **_WINDOW},
        "qwen3": {"model_type": "qwen3"},
        "qwen3, tied, wide heads, biases": {
            **{"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 12, "attention_bias": True},
            **{"num_key_value_heads": 1, "rms_norm_eps": 0.1},
        },
        "qwen3, yarn": {
            "model_type": "qwen3",
            "rope_scaling": _YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.5, "truncate": False},
        },
        "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
        "smollm3, untied, biases, interval": {
            **{"model_type": "smollm3", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
            **{"no_rope_layer_interval": 2, "rope_theta": 500.0, "rope_scaling": _LLAMA3},
        },
        "smollm3, window": {"model_type": "smollm3", "no_rope_layers": [0, 1, 1], **_WINDOW},
    }.items()
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [60, 8, 28, 18, 2, 8]]
NEW_TOKENS = 12


def raw_config(case: str) -> dict:
    """``config.json`` of a case, without what transformers fills in, which it does in objects that it is given."""
    if case in CASES:
        return deepcopy({"model_type": "llama", **SIZES, **CASES[case]})
    raw = SIZES | {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0} | FAMILY_CASES[case]
    flags = {"llama": 2, "smollm3": 2, "qwen3": 1}.get(raw["model_type"], 0)
    for flag in ("attention_bias", "mlp_bias")[flags:]:
        del raw[flag]
    return deepcopy(raw)


def has_bias(raw: dict, projection: str) -> bool:
    """Whether a projection such as ``self_attn.q_proj`` has a bias."""
    if projection.startswith("mlp"):
        return raw.get("mlp_bias", False)
    return raw.get("attention_bias", False) or (raw["model_type"] == "qwen2" and not projection.endswith("o_proj"))


def tensors(case: str) -> dict[str, np.ndarray]:
    """The case's weights in Hugging Face's names and [out, in] shapes, large enough that no part is near linear."""
    c, draw = raw_config(case), np.random.RandomState(0)
    width, queries = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
    keys = c["num_key_value_heads"] * c["head_dim"]
    linear = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (c["intermediate_size"], width),
        "mlp.up_proj": (c["intermediate_size"], width),
        "mlp.down_proj": (width, c["intermediate_size"]),
    }
    made = {"model.embed_tokens.weight": 0.15 * draw.standard_normal((c["vocab_size"], width))}
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{prefix}{norm}.weight"] = 1 + 0.3 * draw.standard_normal(width)
        for name, shape in linear.items():
            made[f"{prefix}{name}.weight"] = draw.standard_normal(shape) / shape[1] ** 0.5
            if has_bias(c, name):
                made[f"{prefix}{name}.bias"] = 0.5 * draw.standard_normal(shape[0])
        for norm in ("q_norm", "k_norm") if c["model_type"] == "qwen3" else ():
            made[f"{prefix}self_attn.{norm}.weight"] = 1 + 0.3 * draw.standard_normal(c["head_dim"])
    made["model.norm.weight"] = 1 + 0.3 * draw.standard_normal(width)
    if not c["tie_word_embeddings"]:
        made["lm_head.weight"] = draw.standard_normal((c["vocab_size"], width)) / width**0.5
    return {name: tensor.astype(np.float32) for name, tensor in made.items()}


def inputs(case: str) -> dict[str, np.ndarray]:
    """Tokens and labels (-100: none) [2, 12], a residual stream [1, 12, 32] and queries [1, 12, 4, h]."""
    c, draw = raw_config(case), np.random.RandomState(1)
    tokens = draw.randint(0, c["vocab_size"], (2, 12))
    labels = np.where(np.arange(12) >= [[5], [8]], tokens, -100)
    return {
        "tokens": tokens.astype(np.int32),
        "labels": labels,
        "stream": draw.standard_normal((1, 12, c["hidden_size"])).astype(np.float32),
        "queries": draw.standard_normal((1, 12, c["num_attention_heads"], c["head_dim"])).astype(np.float32),
    }


def reference(case: str) -> dict[str, np.ndarray]:
    """Hugging Face's numbers at every level, float32: norm, rotated, attention, block (of layer 1), logits, loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    given = {name: torch.from_numpy(value) for name, value in inputs(case).items()}
    model = LlamaForCausalLM(LlamaConfig(**raw_config(case), attn_implementation="eager")).eval()
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors(case).items()}
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    layer, stream = model.model.layers[1], given["stream"]
    with torch.no_grad():
        rope = model.model.rotary_emb(stream, torch.arange(12)[None])
        mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
        queries = given["queries"].transpose(1, 2)
        whole = model(given["tokens"].long(), labels=given["labels"])
        found = {
            "norm": layer.input_layernorm(stream),
            "rotated": apply_rotary_pos_emb(queries, queries, *rope)[0].transpose(1, 2),
            "attention": layer.self_attn(stream, position_embeddings=rope, attention_mask=mask)[0],
            "block": layer(stream, position_embeddings=rope, attention_mask=mask),
            "logits": whole.logits,
            "loss": whole.loss,
        }
    return {level: value.numpy() for level, value in found.items()}


def family_model(case: str, **changed):
    """Hugging Face's model of a case, with fields of its ``config.json`` changed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**raw_config(case) | changed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors(case).items()}
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def family_reference(case: str) -> dict[str, np.ndarray]:
    """Hugging Face's logits [2, 12, V] and, within the model's context, its greedy tokens after :data:`PROMPTS`."""
    import torch

    model = family_model(case)
    with torch.no_grad():
        found = {"logits": model(torch.from_numpy(inputs(case)["tokens"]).long()).logits.numpy()}
        if raw_config(case).get("max_position_embeddings", 2048) > 64:
            greedy = [
                model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
                for prompt in PROMPTS
            ]
            found["greedy"] = torch.stack(greedy).numpy().astype(np.int32)
    return found


def save(references: dict[str, dict[str, np.ndarray]], file: Path) -> None:
    """Writes numbers by case and level."""
    goldens = {f"{case}/{level}": value for case, levels in references.items() for level, value in levels.items()}
    save_file({name: np.array(value, order="C") for name, value in goldens.items()}, file)
    print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    save({case: reference(case) for case in CASES}, GOLDENS)
    save({case: family_reference(case) for case in FAMILY_CASES}, FAMILY_GOLDENS)
