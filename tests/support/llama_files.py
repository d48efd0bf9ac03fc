"""Small LLaMA folders for tests, spelled out by hand rather than by the code under test."""

import json

import numpy as np
from safetensors.numpy import save_file

# heads*head_dim = 16 differs from hidden_size = 8, so that no two widths can be mistaken for one another
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

LINEAR = {  # Hugging Face's [out, in]
    "self_attn.q_proj": (16, 8),
    "self_attn.k_proj": (8, 8),
    "self_attn.v_proj": (8, 8),
    "self_attn.o_proj": (8, 16),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}


def small_tensors(tied=False, bias=False, seed=0):
    """Random weights of SMALL in Hugging Face's names, each exact in bfloat16 and in float16."""
    draw = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    if not tied:
        shapes["lm_head.weight"] = (11, 8)
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (8,)
        for name, shape in LINEAR.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if bias:
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    return {name: draw.integers(-100, 100, shape).astype(np.float32) / 64 for name, shape in shapes.items()}


def write_model(folder, tensors, config=SMALL, dtype="float32", **changed):
    """A folder of config.json and one model.safetensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changed))
    save_file({name: tensor.astype(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
