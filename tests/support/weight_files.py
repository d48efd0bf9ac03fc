"""Any small model in Hugging Face's tensors, written in each format by other means than the code under test."""

import json
import math

import gguf
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util
from llama_files import SMALL
from make_goldens import has_bias
from safetensors.numpy import save_file

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
FAMILIES = {
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "ministral": {"model_type": "ministral", "layer_types": ["full_attention", "sliding_attention"]},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "qwen3, biases": {"model_type": "qwen3", "attention_bias": True},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4},
}
IN_GGUF = [family for family in FAMILIES if family != "ministral"]
FORMS = ("safetensors", "sharded safetensors", "flax", "sharded flax", "orbax", "gguf")


def write_in(form, folder, raw, tensors, dtype="float32"):
    """A model folder in a format; ``raw`` is the object of config.json, ``tensors`` float32 by Hugging Face's names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    cast = {name: tensor.astype(np.dtype(dtype)) for name, tensor in tensors.items()}
    if form == "gguf":
        write_gguf_model(folder / "model.gguf", raw, tensors)
    elif form == "orbax":
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save((folder / "orbax").absolute(), traverse_util.unflatten_dict(cast, sep="."))
    elif form == "flax":
        (folder / "flax_model.msgpack").write_bytes(serialization.to_bytes(flax_tree(cast)))
    elif form == "safetensors":
        save_file(cast, folder / "model.safetensors")
    else:
        kind, save = ("msgpack", save_flax) if "flax" in form else ("safetensors", save_file)
        stem = "flax_model" if "flax" in form else "model"
        files = [f"{stem}-0000{i}-of-00003.{kind}" for i in (1, 2, 3)]
        parts = {file: dict(list(cast.items())[i::3]) for i, file in enumerate(files)}
        for file, part in parts.items():
            save(part, folder / file)
        named = {file: [flax_path(name) for name in part] for file, part in parts.items()} if "flax" in form else parts
        weight_map = {name: file for file, names in named.items() for name in names}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def flax_path(name):
    """FlaxLlamaForCausalLM's key: kernels [in, out], an ``embedding``, norms' ``weight``."""
    *path, last = name.split(".")
    if last == "weight" and path[-1].endswith("_proj"):
        last = "kernel"
    elif last == "weight" and path[-1] in ("lm_head", "embed_tokens"):
        last = {"lm_head": "kernel", "embed_tokens": "embedding"}[path[-1]]
    return "/".join([*path, last])


def flax_tree(tensors):
    tree = {}
    for name, tensor in tensors.items():
        *path, last = flax_path(name).split("/")
        branch = tree
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = np.ascontiguousarray(tensor.T) if last == "kernel" else tensor
    return tree


def save_flax(tensors, file):
    file.write_bytes(serialization.to_bytes(flax_tree(tensors)))


def stacked(tensors):
    """The base pytree, built by hand."""
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    tree = {
        "embed_tokens": {"embedding": tensors["model.embed_tokens.weight"]},
        "norm": {"scale": tensors["model.norm.weight"]},
        "layers": {"self_attn": {}, "mlp": {}},
    }
    if "lm_head.weight" in tensors:
        tree["lm_head"] = {"kernel": tensors["lm_head.weight"].T}
    for name in tensors:
        if name.startswith("model.layers.0."):
            *path, last = name.removeprefix("model.layers.0.").split(".")
            leaf = np.stack([tensors[name.replace(".0.", f".{i}.", 1)] for i in range(layers)])
            if path[-1].endswith("norm"):
                place = tree["layers"][path[0]] if len(path) == 2 else tree["layers"]
                place[path[-1]] = {"scale": leaf}
            else:
                place = tree["layers"][path[0]].setdefault(path[1], {})
                place["kernel" if last == "weight" else "bias"] = leaf.swapaxes(1, 2) if last == "weight" else leaf
    return jax.tree.map(np.ascontiguousarray, tree)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    stem, _, last = name.rpartition(".")
    for theirs, ours in GGUF_NAMES.items():
        if stem == theirs:
            return f"{ours}.{last}"
        if stem.startswith("model.layers.") and stem.split(".", 3)[3] == theirs:
            return f"blk.{stem.split('.')[2]}.{ours}.{last}"
    raise KeyError(name)


def interleaved(tensor, heads):
    """Rows of q or k as llama.cpp stores them: row i and row i + h/2 of a head become neighbours."""
    half = len(tensor) // heads // 2
    order = [head * 2 * half + i + part * half for head in range(heads) for i in range(half) for part in (0, 1)]
    return tensor[order]


def rope_factors(rope, theta, head_dim):
    """llama.cpp's rope_freqs tensor, by wavelengths as in Meta's own code."""
    old, found = rope["original_max_position_embeddings"], []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < old / rope["high_freq_factor"]:
            found.append(1.0)
        elif wavelength > old / rope["low_freq_factor"]:
            found.append(rope["factor"])
        else:
            smooth = (old / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, np.float32)


def write_gguf_model(file, raw, tensors, metadata=lambda writer: None, kind="F32", blocks=None):
    """A GGUF file as llama.cpp's converter lays it out, matrices quantised to ``kind``.

    ``blocks`` are (kind, bytes [rows, …]) by Hugging Face's name, to be written as they are instead.
    """
    heads, keys = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    family = {"mistral": "llama"}.get(raw["model_type"], raw["model_type"])
    writer = gguf.GGUFWriter(file, family)
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw.get("max_position_embeddings", 2048))
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(raw["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_bos_token_id(raw.get("bos_token_id", 1))
    writer.add_eos_token_id(raw.get("eos_token_id", 2))
    rope = raw.get("rope_scaling")
    if rope and rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope and rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope:
        writer.add_tensor("rope_freqs.weight", rope_factors(rope, raw["rope_theta"], head_dim))
    metadata(writer)
    for name, tensor in tensors.items():
        if blocks and name in blocks:
            stored, quants = blocks[name]
            writer.add_tensor(gguf_name(name), quants.reshape(len(quants), -1), raw_dtype=stored)
            continue
        if family in ("llama", "smollm3") and (".q_proj." in name or ".k_proj." in name):
            tensor = interleaved(tensor, heads if ".q_proj." in name else keys)
        if tensor.ndim == 1 or kind == "F32":
            writer.add_tensor(gguf_name(name), tensor)
        else:
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


_HALVES_AT = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}  # floats of a block


def random_blocks(kind, rows=7, blocks=3, size=1.0):
    """Random bytes [rows, blocks, bytes of a block] whose floating-point numbers are finite, and of this size."""
    draw = np.random.default_rng(int(kind))
    if kind.name in ("F32", "F16"):
        numbers = draw.normal(size=(rows, blocks, 1)).astype(np.float32 if kind.name == "F32" else np.float16)
        return numbers.view(np.uint8)
    if kind.name == "BF16":
        return np.ascontiguousarray(draw.normal(size=(rows, blocks, 1)).astype(np.float32).view(np.uint8)[..., 2:])
    raw = draw.integers(0, 256, (rows, blocks, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in _HALVES_AT[kind.name]:
        raw[..., at : at + 2] = (size * draw.normal(size=(rows, blocks, 1))).astype(np.float16).view(np.uint8)
    return raw


def shapes_of(heads, tied, attention_bias, mlp_bias):
    return SMALL | {
        "num_key_value_heads": heads,
        "tie_word_embeddings": tied,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
    }


def weights_of(raw, seed=0):
    """Random weights with every width from the config, exact in sixteen bits."""
    draw, hidden, mlp = np.random.default_rng(seed), raw["hidden_size"], raw["intermediate_size"]
    queries, keys = (raw[f"num_{kind}_heads"] * raw["head_dim"] for kind in ("attention", "key_value"))
    linear = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    shapes = {"model.embed_tokens.weight": (raw["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (raw["vocab_size"], hidden)
    for i in range(raw["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (hidden,)
        for norm in ("q_norm", "k_norm") if raw["model_type"] == "qwen3" else ():
            shapes[f"model.layers.{i}.self_attn.{norm}.weight"] = (raw["head_dim"],)
        for name, shape in linear.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            if has_bias(raw, name):
                shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
    return {name: draw.integers(-100, 100, shape).astype(np.float32) / 64 for name, shape in shapes.items()}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
