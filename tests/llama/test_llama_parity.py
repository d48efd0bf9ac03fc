"""Every level equals Hugging Face's over the whole matrix of heads, tying, biases and rotary kinds, and no field of a
config is without effect.

Together with ``test_llama_formats`` (every format gives the same leaves, exactly) this holds for every format.
"""

import dataclasses
import json
from itertools import product

import jax
import numpy as np
import pytest
from llama_files import SMALL
from weight_files import FORMS, LLAMA3, weights_of, write_in

from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.attention import rotary_table, rotate
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.llama.model import Block, Llama, RMSNorm, SelfAttention
from fedmezo_jax.llama.precision import Products
from fedmezo_jax.llama.rope import LinearRope, Llama3Rope

ROPES = {"default": None, "linear": {"rope_type": "linear", "factor": 4.0}, "llama3": LLAMA3}
MATRIX = list(product(ROPES, (1, 2, 4), *3 * [(False, True)]))
LENGTH = 12


def raw_config(rope, heads, tied, attention_bias, mlp_bias):
    return SMALL | {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 20,
        "head_dim": 8,  # of four wavelengths LLAMA3 keeps one, blends one and divides two
        "num_key_value_heads": heads,
        "tie_word_embeddings": tied,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "rope_scaling": ROPES[rope],
    }


def random_weights(raw):
    """As ``weights_of``, of a size at which no part is near linear and none overflows."""
    scaled = {}
    for name, tensor in weights_of(raw).items():
        scaled[name] = tensor * np.float32(1.0 if tensor.ndim == 1 else 1.5 / tensor.shape[1] ** 0.5)
    return scaled


def inputs(raw):
    draw = np.random.default_rng(1)
    tokens = draw.integers(0, raw["vocab_size"], (2, LENGTH)).astype(np.int32)
    stream = draw.normal(size=(1, LENGTH, raw["hidden_size"])).astype(np.float32)
    queries = draw.normal(size=(1, LENGTH, raw["num_attention_heads"], raw["head_dim"])).astype(np.float32)
    return tokens, stream, queries, np.array([5, 8])  # from these positions on, tokens are labels


def hugging_face(raw, tensors):
    """Norm, rotated queries, attention and block of layer 1, logits and loss."""
    import torch
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = LlamaForCausalLM(TheirConfig(**raw, attn_implementation="eager")).eval()
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    model.load_state_dict(state | {"lm_head.weight": state.get("lm_head.weight", state["model.embed_tokens.weight"])})
    tokens, stream, queries, first = (torch.from_numpy(given) for given in inputs(raw))
    labels = torch.where(torch.arange(LENGTH) >= first[:, None], tokens.long(), -100)
    layer = model.model.layers[1]
    with torch.no_grad():
        rope = model.model.rotary_emb(stream, torch.arange(LENGTH)[None])
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
        queries = queries.transpose(1, 2)
        whole = model(tokens.long(), labels=labels)
        return {
            "norm": layer.input_layernorm(stream).numpy(),
            "rotary": apply_rotary_pos_emb(queries, queries, *rope)[0].transpose(1, 2).numpy(),
            "attention": layer.self_attn(stream, position_embeddings=rope, attention_mask=mask)[0].numpy(),
            "block": layer(stream, position_embeddings=rope, attention_mask=mask).numpy(),
            "logits": whole.logits.numpy(),
            "loss": whole.loss.numpy(),
        }


def ours(config, base, raw):
    parts, layer = (config, 1.0, Products("float32")), jax.tree.map(lambda leaf: leaf[1], base["layers"])
    tokens, stream, queries, first = inputs(raw)
    rope, norm, attention = rotary_table(config, LENGTH), RMSNorm(config.rms_norm_eps), SelfAttention(*parts)
    positions = np.broadcast_to(np.arange(LENGTH - 1), (2, LENGTH - 1))
    weights = (positions + 1 >= first[:, None]).astype(np.float32)
    rows = TokenBatch(tokens, positions.astype(np.int32), tokens[:, 1:], weights)
    return {
        "norm": norm.apply({"params": layer["input_layernorm"]}, stream),
        "rotary": rotate(queries, rope),
        "attention": attention.apply({"params": layer["self_attn"]}, stream, {}, rope),
        "block": Block(*parts).apply({"params": layer}, stream, {}, 1, rope, None)[0],
        "logits": Llama(config).apply({"params": base}, tokens, {}),
        "loss": loss_of(Llama(config), base)({}, rows),
    }


@pytest.mark.torch
@pytest.mark.parametrize(("rope", "heads", "tied", "attention_bias", "mlp_bias"), MATRIX)
def test_every_level_equals_hugging_face_s(tmp_path, rope, heads, tied, attention_bias, mlp_bias):
    raw = raw_config(rope, heads, tied, attention_bias, mlp_bias)
    tensors = random_weights(raw)
    expected = hugging_face(raw, tensors)
    config = LlamaConfig.from_json(raw)
    base = load_base(write_in("safetensors", tmp_path, raw, tensors), config)
    with jax.disable_jit():  # one operation after another: 72 programs would take minutes to compile
        found = ours(config, base, raw)
    assert found.keys() == expected.keys()
    for level, value in found.items():
        np.testing.assert_allclose(value, expected[level], rtol=0, atol=1e-5, err_msg=level)
    assert np.abs(expected["logits"]).max() > 0.5


@pytest.mark.torch
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rope", ROPES)
def test_compiled_logits_equal_hugging_face_s_from_every_format(tmp_path, form, rope):
    raw = raw_config(rope, 2, rope != "linear", True, rope != "llama3")
    tensors = random_weights(raw)
    expected = hugging_face(raw, tensors)["logits"]
    folder = write_in(form, tmp_path, raw, tensors)
    config = LlamaConfig.from_json(folder)
    found = jitted_logits(config, load_base(folder, config), inputs(raw)[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_equal_hugging_face_s_far_on(rope):
    """Frequencies are multiplied by the position: at 8192 a last bit of one is 5e-4 radians."""
    import torch
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = raw_config(rope, 2, False, False, False) | {"head_dim": 64, "rope_theta": 500000.0}
    theirs = LlamaRotaryEmbedding(TheirConfig(**raw))(torch.zeros(1), torch.arange(8192)[None])
    ours = jax.jit(rotary_table, static_argnums=(0, 1))(LlamaConfig.from_json(raw), 8192)
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected[0, :, :32].numpy(), rtol=0, atol=2e-6)


# The fields of a config

LOGITS = {  # change -> another model from the same weights
    "rms_norm_eps": {"rms_norm_eps": 0.3},
    "rope_theta": {"rope_theta": 500.0},
    "rope_scaling": {"rope_scaling": ROPES["linear"]},
    "head_dim": {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
}
SHAPES = {  # change -> the weights no longer fit
    "vocab_size": {"vocab_size": 24},
    "hidden_size": {"hidden_size": 20},
    "intermediate_size": {"intermediate_size": 24},
    "num_hidden_layers": {"num_hidden_layers": 3},
    "num_attention_heads": {"num_attention_heads": 2},
    "num_key_value_heads": {"num_key_value_heads": 1},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
}
NEUTRAL = {  # change -> no bit changes
    "max_position_embeddings": {"max_position_embeddings": 77},
    "bos_token_id": {"bos_token_id": 7},
    "eos_token_id": {"eos_token_id": [7, 8]},
}
OF_OTHER_FAMILIES = {"family", "sliding_window", "layers_with_window", "layers_without_rope"}
"""Fields that no LLaMA varies; test_llama_family_fields does."""
ROPE_LOGITS = [
    *(
        LLAMA3 | {field: value}
        for field, value in (("factor", 3.0), ("low_freq_factor", 1.5), ("high_freq_factor", 5.0))
    ),
    LLAMA3 | {"original_max_position_embeddings": 100},
]


def test_no_field_is_left_out():
    fields = {field.name for field in dataclasses.fields(LlamaConfig)}
    assert fields == LOGITS.keys() | SHAPES.keys() | NEUTRAL.keys() | OF_OTHER_FAMILIES
    changed = {key for rope in ROPE_LOGITS for key in rope if rope[key] != LLAMA3[key]}
    assert changed == {field.name for field in dataclasses.fields(Llama3Rope)}
    assert {field.name for field in dataclasses.fields(LinearRope)} == {"factor"}


def jitted_logits(config, base, tokens):
    return jax.jit(lambda base: Llama(config).apply({"params": base}, tokens, {}))(base)


def logits_from_file(folder, raw):
    """All the way from config.json."""
    (folder / "config.json").write_text(json.dumps(raw))
    config = LlamaConfig.from_json(folder)
    return jitted_logits(config, load_base(folder, config), inputs(PLAIN)[0])


PLAIN = raw_config("default", 2, False, False, False)


@pytest.fixture
def plain(tmp_path):
    return write_in("safetensors", tmp_path / "model", PLAIN, random_weights(PLAIN))


@pytest.mark.torch
@pytest.mark.parametrize("field", LOGITS)
def test_a_field_of_the_computation_changes_the_logits(plain, field):
    changed = logits_from_file(plain, PLAIN | LOGITS[field])
    assert np.abs(changed - logits_from_file(plain, PLAIN)).max() > 1e-2
    expected = hugging_face(PLAIN | LOGITS[field], random_weights(PLAIN))["logits"]
    np.testing.assert_allclose(changed, expected, rtol=0, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("rope", ROPE_LOGITS, ids=str)
def test_a_field_of_the_rotary_scaling_changes_the_logits(plain, rope):
    changed, before = (logits_from_file(plain, PLAIN | {"rope_scaling": scaling}) for scaling in (rope, LLAMA3))
    assert np.abs(changed - before).max() > 1e-3
    expected = hugging_face(PLAIN | {"rope_scaling": rope}, random_weights(PLAIN))["logits"]
    np.testing.assert_allclose(changed, expected, rtol=0, atol=1e-5)


def test_the_factor_of_linear_scaling_changes_the_logits(plain):
    ropes = ({"rope_type": "linear", "factor": factor} for factor in (4.0, 3.0))
    changed, before = (logits_from_file(plain, PLAIN | {"rope_scaling": scaling}) for scaling in ropes)
    assert np.abs(changed - before).max() > 1e-2


@pytest.mark.parametrize("field", SHAPES)
def test_a_field_of_the_shapes_is_held_against_the_weights(plain, field):
    with pytest.raises(UserError, match=r"the weights do not fit config.json"):
        logits_from_file(plain, PLAIN | SHAPES[field])


@pytest.mark.parametrize("field", NEUTRAL)
def test_other_fields_change_no_bit(plain, field):
    np.testing.assert_array_equal(logits_from_file(plain, PLAIN | NEUTRAL[field]), logits_from_file(plain, PLAIN))
