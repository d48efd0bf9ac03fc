"""GGUF's quantised blocks against readable dequantisers, one number at a time in the order of llama.cpp's C code."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from weight_files import LLAMA3, random_blocks, rope_factors, shapes_of, weights_of, write_gguf_model

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints import gguf as gguf_module
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.checkpoints.gguf import open_gguf, read_stored
from fedmezo_jax.llama.checkpoints.gguf_config import read_gguf_config
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.rope import Llama3Rope

F = np.float32


def half(block, at):
    return F(block[at : at + 2].view(np.float16)[0])


def plain(dtype):
    def numbers(block):
        return [F(block.view(dtype)[0])]

    return numbers


def bfloat16(block):
    return [np.array([0, 0, block[0], block[1]], np.uint8).view(np.float32)[0]]


def q8_0(block):
    return [half(block, 0) * F(np.int8(q)) for q in block[2:].view(np.int8)]


def q4_0(block):
    low, high = [int(q) & 15 for q in block[2:]], [int(q) >> 4 for q in block[2:]]
    return [half(block, 0) * F(q - 8) for q in low + high]


def q4_1(block):
    low, high = [int(q) & 15 for q in block[4:]], [int(q) >> 4 for q in block[4:]]
    return [half(block, 0) * F(q) + half(block, 2) for q in low + high]


def q4_k(block):
    d, least, packed, quants = (
        half(block, 0),
        half(block, 2),
        [int(b) for b in block[4:16]],
        [int(b) for b in block[16:]],
    )
    found = []
    for j in range(8):
        if j < 4:
            scale, minimum = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
            minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4
        for byte in quants[j // 2 * 32 : j // 2 * 32 + 32]:
            q = byte & 15 if j % 2 == 0 else byte >> 4
            found.append(d * F(scale) * F(q) - least * F(minimum))
    return found


def q6_k(block):
    low, high = [int(b) for b in block[:128]], [int(b) for b in block[128:192]]
    scales, d = block[192:208].view(np.int8), half(block, 208)
    found = [F(0)] * 256
    for part in (0, 1):
        for i in range(32):
            a, b, top = low[64 * part + i], low[64 * part + i + 32], high[32 * part + i]
            four = (
                a & 15 | (top & 3) << 4,
                b & 15 | (top >> 2 & 3) << 4,
                a >> 4 | (top >> 4 & 3) << 4,
                b >> 4 | top >> 6 << 4,
            )
            for k, q in enumerate(four):
                scale = F(int(scales[8 * part + i // 16 + 2 * k]))
                found[128 * part + 32 * k + i] = d * scale * F(q - 32)
    return found


KINDS = {
    Kind.F32: plain(np.float32),
    Kind.F16: plain(np.float16),
    Kind.BF16: bfloat16,
    Kind.Q8_0: q8_0,
    Kind.Q4_0: q4_0,
    Kind.Q4_1: q4_1,
    Kind.Q4_K: q4_k,
    Kind.Q6_K: q6_k,
}


def numbers(kind, row):
    """A row's numbers, by the readable dequantiser."""
    return [number for block in row for number in KINDS[kind](block)]


@pytest.mark.parametrize("chunk", [1, 500, 1 << 22])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_mean_what_the_format_says(tmp_path, monkeypatch, kind, chunk):
    """Whatever number of rows is dequantised at one time."""
    monkeypatch.setattr(gguf_module, "_CHUNK", chunk)
    raw = random_blocks(kind)
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
    writer.add_tensor("before", np.ones(5, np.float32))
    writer.add_tensor("blocks", raw.reshape(len(raw), -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = open_gguf(tmp_path / "file.gguf")
    found = read_stored(opened.file, opened.tensors["blocks"])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [numbers(kind, row) for row in raw])


def test_a_model_of_mixed_quants_is_read_whole(tmp_path):
    """As in the files called Q4_K_M: most matrices Q4_K, some Q6_K, vectors F32."""
    raw = shapes_of(2, True, False, False) | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    tensors, blocks = weights_of(raw), {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            kind = Kind.Q6_K if "v_proj" in name or "embed" in name else Kind.Q4_K
            blocks[name] = (kind, random_blocks(kind, len(tensor), tensor.shape[1] // 256))
    write_gguf_model(tmp_path / "model.gguf", raw, tensors, blocks=blocks)
    base = load_base(tmp_path, LlamaConfig.from_json(raw))
    for name, row, found in (
        ("mlp.gate_proj", 5, base["layers"]["mlp"]["gate_proj"]["kernel"][1, :, 5]),
        ("self_attn.v_proj", 100, base["layers"]["self_attn"]["v_proj"]["kernel"][1, :, 100]),
        # Of q's interleaved pairs the second row of the first comes to lie half a head further on.
        ("self_attn.q_proj", 1, base["layers"]["self_attn"]["q_proj"]["kernel"][1, :, 32]),
        ("self_attn.k_proj", 64 + 2, base["layers"]["self_attn"]["k_proj"]["kernel"][1, :, 64 + 1]),
    ):
        kind, quants = blocks[f"model.layers.1.{name}.weight"]
        np.testing.assert_array_equal(found, numbers(kind, quants[row]))
    np.testing.assert_array_equal(base["norm"]["scale"], tensors["model.norm.weight"])


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    raw = shapes_of(2, True, False, False)
    blocks = {"model.embed_tokens.weight": (Kind.F64, np.ones((11, 8)))}
    write_gguf_model(tmp_path / "model.gguf", raw, weights_of(raw), blocks=blocks)
    with pytest.raises(UserError, match=r"model.embed_tokens.weight in model.gguf is F64"):
        load_base(tmp_path, LlamaConfig.from_json(raw))


# rope_freqs


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_1_s_rotary_scaling_is_read_off_its_tensor(tmp_path, head_dim, factor):
    """LLaMA 3.1 and 3.2: the metadata do not name it."""
    rope = LLAMA3 | {"factor": factor, "original_max_position_embeddings": 8192}
    raw = shapes_of(2, True, False, False) | {"rope_scaling": rope, "rope_theta": 500000.0, "head_dim": head_dim}
    file = write_gguf_model(tmp_path / "model.gguf", raw, weights_of(raw))
    config = read_gguf_config(open_gguf(file))
    assert config.rope_scaling == Llama3Rope(factor, 1.0, 4.0, 8192)
    load_base(tmp_path, config)
    # A config without the scaling, or with another, is not the file's.
    for other in (None, LLAMA3 | {"factor": factor, "original_max_position_embeddings": 4096}):
        with pytest.raises(UserError, match=r"unexpected: rope_freqs.weight in model.gguf"):
            load_base(tmp_path, LlamaConfig.from_json(raw | {"rope_scaling": other}))


@pytest.mark.parametrize("changed", [{"high_freq_factor": 8.0}, {"low_freq_factor": 2.0}, None], ids=str)
def test_another_scaling_than_llama_s_is_refused(tmp_path, changed):
    rope = LLAMA3 | {"original_max_position_embeddings": 8192} | (changed or {})
    raw = shapes_of(2, True, False, False) | {"rope_theta": 500000.0, "head_dim": 64}
    divisors = rope_factors(rope, 500000.0, 64) if changed else np.linspace(1, 8, 32, dtype=np.float32)
    tensors = weights_of(raw)
    file = write_gguf_model(
        tmp_path / "m.gguf", raw, tensors, metadata=lambda writer: writer.add_tensor("rope_freqs.weight", divisors)
    )
    with pytest.raises(UserError, match=r"m.gguf: rope_freqs.weight is not LLaMA 3.1's scaling"):
        read_gguf_config(open_gguf(file))


def test_metadata_that_are_not_known_are_refused_by_name(tmp_path):
    def metadata(writer):
        writer.add_uint32("llama.attention.sliding_window", 4096)
        writer.add_float32("llama.logit_scale", 0.5)
        writer.add_uint16("split.count", 3)

    raw = shapes_of(2, True, False, False)
    file = write_gguf_model(tmp_path / "m.gguf", raw, weights_of(raw), metadata=metadata)
    with pytest.raises(UserError, match=r"sliding_window = 4096; llama.logit_scale = 0.5; one part of 3") as caught:
        read_gguf_config(open_gguf(file))
    assert str(file) in str(caught.value)
