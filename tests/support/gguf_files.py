"""Small LLaMA GGUF files for tests, laid out as llama.cpp lays them out."""

import gguf
import numpy as np
from gguf.quants import quantize

VOCAB, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS = 300, 64, 96, 2, 4, 2
HEAD = HIDDEN // HEADS

LINEAR = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV_HEADS * HEAD, HIDDEN),
    "attn_v": (KV_HEADS * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (MLP, HIDDEN),
    "ffn_up": (MLP, HIDDEN),
    "ffn_down": (HIDDEN, MLP),
}


def byte_alphabet():
    """GPT-2's 256 printable stand-ins for bytes: a printable byte is itself, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


SPECIAL = ["<pad>", "<s>", "</s>"]
MERGES = ["Ġ t", "Ġt h", "2 0", "l l"]  # "20" can never happen: digits are cut apart first
TOKENS = [*SPECIAL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
TOKENS += [f"<unused{i}>" for i in range(VOCAB - len(TOKENS))]


def small_weights(tied=True, bias=False, seed=0):
    """Random weights in GGUF's names and in GGUF's order of rows, float32."""
    draw = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{layer}.{norm}.weight"] = (HIDDEN,)
        for name, shape in LINEAR.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
            if bias and name.startswith("attn"):
                shapes[f"blk.{layer}.{name}.bias"] = shape[:1]
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(file, weights, kind="F32", **changed):
    """A GGUF file; matrices are stored as ``kind``, vectors as F32; ``changed`` metadata is written last."""
    writer = gguf.GGUFWriter(file, changed.pop("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model(changed.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changed.pop("split", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (VOCAB - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if "rope_scaling" in changed:
        writer.add_rope_scaling_type(gguf.RopeScalingType(changed.pop("rope_scaling")))
        writer.add_rope_scaling_factor(2.0)
    assert not changed
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, weight in weights.items():
        if weight.ndim == 2 and kind != "F32":
            writer.add_tensor(name, quantize(weight, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
