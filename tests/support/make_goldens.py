"""What Hugging Face's ``LlamaForCausalLM`` computes on tiny random models, for machines without PyTorch.

    python tests/make_goldens.py

writes ``tests/goldens/llama.safetensors``, with every case of :data:`CASES` at every level from the norm to the loss.
Weights and inputs are not stored: they are drawn from ``numpy.random.RandomState``, whose streams are frozen for good.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDENS = Path(__file__).parent / "goldens" / "llama.safetensors"
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


def raw_config(case: str) -> dict:
    """``config.json`` of a case, without what transformers fills in."""
    return {"model_type": "llama", **SIZES, **CASES[case]}


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
            if c["attention_bias"] if name.startswith("self_attn") else c["mlp_bias"]:
                made[f"{prefix}{name}.bias"] = 0.5 * draw.standard_normal(shape[0])
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


if __name__ == "__main__":
    goldens = {f"{case}/{level}": value for case in CASES for level, value in reference(case).items()}
    save_file({name: np.array(value, order="C") for name, value in goldens.items()}, GOLDENS)
    print(f"{GOLDENS}: {GOLDENS.stat().st_size:,} bytes")
