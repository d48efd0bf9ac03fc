"""GGUF conversion: weights, rotary order of rows, config and tokenizer, and what is refused."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from gguf_files import HEAD, HEADS, HIDDEN, KV_HEADS, TOKENS, small_weights, write_gguf
from llama_files import SMALL
from safetensors.numpy import load_file
from weight_files import FAMILIES, weights_of, write_gguf_model

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.checkpoints.gguf import open_gguf, rows_for_rotate_half
from fedmezo_jax.llama.checkpoints.gguf_config import gguf_weights, read_gguf_config
from fedmezo_jax.llama.checkpoints.gguf_folder import convert_gguf
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.registry import load_tokenizer
from fedmezo_jax.llama.rope import LinearRope


def convert(tmp_path, weights, **options):
    convert_gguf(write_gguf(tmp_path / "model.gguf", weights, **options), tmp_path / "out")
    return tmp_path / "out"


def test_the_config_is_the_metadata(tmp_path):
    assert LlamaConfig.from_json(convert(tmp_path, small_weights())) == LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,  # the file's float32 is 9.999999747378752e-06
        rope_theta=100000.0,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=(2,),
    )


def test_head_biases_and_linear_scaling_are_seen_in_the_file(tmp_path):
    folder = convert(tmp_path, small_weights(tied=False, bias=True), rope_scaling="linear")
    config = LlamaConfig.from_json(folder)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, True, False)
    assert config.rope_scaling == LinearRope(2.0)
    load_base(folder, config)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_weights_are_dequantised_into_their_places(tmp_path, kind):
    weights = small_weights(tied=False)
    stored = load_file(convert(tmp_path, weights, kind=kind) / "model.safetensors")
    assert len(stored) == len(weights)
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }.items():
        quantisation = gguf.GGMLQuantizationType[kind]
        np.testing.assert_array_equal(stored[ours], dequantize(quantize(weights[theirs], quantisation), quantisation))
        assert stored[ours].dtype == np.float32
    np.testing.assert_array_equal(stored["model.norm.weight"], weights["output_norm.weight"])
    for theirs, ours in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
        np.testing.assert_array_equal(stored[f"model.layers.1.{ours}.weight"], weights[f"blk.1.{theirs}.weight"])


def rotate_pairs(x, angles):
    """GGUF's rotary positions: rows 2i and 2i+1 of a head turn together."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def rotate_halves(x, angles):
    """Hugging Face's: rows i and i + head/2."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def test_attention_scores_survive_the_change_of_rotary_order(tmp_path):
    weights = small_weights(bias=True)
    stored = load_file(convert(tmp_path, weights) / "model.safetensors")
    x = np.random.default_rng(1).normal(size=(5, HIDDEN))
    angles = np.arange(5)[:, None, None] * 100000.0 ** (-np.arange(0, HEAD, 2) / HEAD)

    def scores(source, names, rotate):
        q, k = (x @ source[f"{name}.weight"].T + source[f"{name}.bias"] for name in names)
        q = rotate(q.reshape(5, HEADS, HEAD), angles)
        k = np.repeat(rotate(k.reshape(5, KV_HEADS, HEAD), angles), HEADS // KV_HEADS, axis=1)
        return np.einsum("snh,tnh->nst", q, k)

    ours = scores(stored, ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"], rotate_halves)
    theirs = scores(weights, ["blk.1.attn_q", "blk.1.attn_k"], rotate_pairs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    assert not np.allclose(scores(weights, ["blk.1.attn_q", "blk.1.attn_k"], rotate_halves), theirs)


def test_the_row_order_of_one_head():
    rows = np.arange(8)[:, None]
    np.testing.assert_array_equal(rows_for_rotate_half(rows, heads=1)[:, 0], [0, 2, 4, 6, 1, 3, 5, 7])
    np.testing.assert_array_equal(rows_for_rotate_half(rows, heads=2)[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])


@pytest.mark.torch
def test_transformers_reads_the_same_weights_from_the_file(tmp_path):
    from transformers import LlamaForCausalLM

    folder = convert(tmp_path, small_weights(tied=False), kind="Q8_0")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, theirs[name].float().numpy())


@pytest.mark.torch
@pytest.mark.parametrize(("family", "head_dim"), [("qwen2", 2), ("qwen3", 128)])
def test_transformers_reads_the_same_model_from_a_file_of_another_family(tmp_path, family, head_dim):
    """The rows of q and k stay in their order: only LLaMA's and SmolLM3's files have another.

    The widths of heads are those that transformers takes without looking into the file.
    """
    from transformers import AutoModelForCausalLM

    raw = SMALL | FAMILIES[family] | {"head_dim": head_dim}
    tensors = weights_of(raw)
    write_gguf_model(tmp_path / "model.gguf", raw, tensors)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    opened = open_gguf(tmp_path / "model.gguf")
    ours = gguf_weights(opened, read_gguf_config(opened))
    assert ours.keys() == tensors.keys()
    for name, entry in ours.items():
        np.testing.assert_array_equal(entry.read(), theirs[name].float().numpy())


def test_the_tokenizer_is_byte_level_with_single_digits(tmp_path):
    tokenizer = load_tokenizer(convert(tmp_path, small_weights()))
    pieces = ["y", "e", "ll", "Ġ", "2", "0", "Ġth", "<s>", "Ã", "©", "</s>"]
    text = "yell 20 th<s>é</s>"
    assert tokenizer(text).input_ids == [TOKENS.index(piece) for piece in pieces]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "yell 20 thé"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 128


def test_misfits_are_told_at_once_and_nothing_is_written(tmp_path):
    weights = small_weights()
    del weights["blk.1.ffn_up.weight"]
    weights["rope_factors_long.weight"] = np.ones(8, np.float32)
    weights["blk.0.attn_v.weight"] = np.ones((64, 64), np.float32)
    with pytest.raises(UserError) as caught:
        convert(tmp_path, weights)
    for part in (
        "model.gguf",
        "missing: model.layers.1.mlp.up_proj.weight",
        "unexpected: rope_factors_long.weight",
        "model.layers.0.self_attn.v_proj.weight in model.gguf is [64, 64] and not [32, 64]",
    ):
        assert part in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"architecture": "gemma3"}, "architecture 'gemma3', only llama, qwen2, qwen3, smollm3 are supported"),
        ({"rope_scaling": "longrope"}, r"llama.rope.scaling.type = longrope"),
        ({"split": "deepseek-llm"}, "tokenizer .gpt2, deepseek-llm. is not supported"),
        ({"tokenizer": "bert"}, "tokenizer .bert, smollm. is not supported"),
        ({"tokenizer": "llama"}, "tokenizer's metadata lack 'scores'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, options, named):
    with pytest.raises(UserError, match=named):
        convert(tmp_path, small_weights(), **options)
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_one_clear_error(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", small_weights())
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:200], whole[:3], b"", b"PK" + whole):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model.gguf: is no readable GGUF file"):
            convert_gguf(file, tmp_path / "out")
    with pytest.raises(UserError, match=r"nowhere.gguf: cannot be read"):
        convert_gguf(tmp_path / "nowhere.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
