"""LLaMA configs: what transformers writes is read exactly, what would change the computation is refused."""

import dataclasses
import json
import math

import jax
import pytest
import transformers
from llama_files import SMALL

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import base_shapes
from fedmezo_jax.llama.config import LlamaConfig, to_json
from fedmezo_jax.llama.lora import lora_shapes
from fedmezo_jax.llama.rope import DynamicRope, LinearRope, Llama3Rope, YarnRope
from fedmezo_jax.llama.shapes import SHAPES

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def test_a_published_config_is_read_field_by_field():
    assert LlamaConfig.from_json(LLAMA_3_2_1B) == LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192),
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_id=(128001, 128008, 128009),
    )


def test_the_oldest_layout_takes_transformers_defaults():
    """open_llama's file has no key/value heads, head width, base of the rotary positions or biases."""
    old = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 3200,
        "initializer_range": 0.02,
        "intermediate_size": 8640,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 26,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    }
    theirs = transformers.LlamaConfig(**old)
    ours = LlamaConfig.from_json(old)
    assert ours == SHAPES["llama-3b"]
    assert (ours.num_key_value_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (32, 100)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    bare = {name: SMALL[name] for name in SMALL if name.startswith(("vocab", "hidden", "inter", "num_hid", "num_att"))}
    theirs, ours = transformers.LlamaConfig(**bare), LlamaConfig.from_json(bare)
    for field in (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    ):
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, (theirs.eos_token_id,))


ROPES = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 2}, LinearRope(2.0)),
    "linear, old name": ({"type": "linear", "factor": 2.0}, LinearRope(2.0)),
    "llama3": (LLAMA_3_2_1B["rope_scaling"], Llama3Rope(32.0, 1.0, 4.0, 8192)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, DynamicRope(2.0)),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25000},
        YarnRope(4.0, 25000, 0.1 * math.log(4.0) + 1),
    ),
    "yarn, every field": (
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.5}
        | {"truncate": False},
        YarnRope(4.0, 100000, (0.1 * math.log(4.0) + 1) / (0.05 * math.log(4.0) + 1), 16.0, 2.0, False),
    ),
}


@pytest.mark.parametrize(("rope", "expected"), ROPES.values(), ids=ROPES)
def test_both_layouts_of_rotary_positions_mean_the_same(rope, expected):
    changed = SMALL | {"max_position_embeddings": 100000}
    del changed["rope_theta"]
    old = LlamaConfig.from_json(changed | {"rope_theta": 123.0, "rope_scaling": rope})
    new = LlamaConfig.from_json(changed | {"rope_parameters": {"rope_theta": 123.0, **rope}})
    both = LlamaConfig.from_json(changed | {"rope_theta": 123.0, "rope_scaling": rope, "rope_parameters": rope})
    inner = LlamaConfig.from_json(changed | {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 123.0, **rope}})
    assert old == new == both == inner
    assert (old.rope_theta, old.rope_scaling) == (123.0, expected)


@pytest.mark.parametrize("rope", ROPES)
def test_transformers_reads_what_is_written(rope):
    ours = LlamaConfig.from_json(
        LLAMA_3_2_1B | {"rope_scaling": ROPES[rope][0], "attention_bias": True, "mlp_bias": True}
    )
    theirs = transformers.LlamaConfig(**to_json(ours))
    assert LlamaConfig.from_json(theirs.to_dict()) == ours
    assert LlamaConfig.from_json(to_json(ours)) == ours
    assert theirs.eos_token_id == [128001, 128008, 128009]


def test_a_config_may_be_a_static_argument():
    config = LlamaConfig.from_json(LLAMA_3_2_1B)
    assert hash(config) == hash(LlamaConfig.from_json(dict(LLAMA_3_2_1B)))


@pytest.mark.parametrize(
    ("changed", "named"),
    {
        "unknown field": ({"attention_sinks": 4}, "attention_sinks"),
        "model type": ({"model_type": "gemma3"}, 'model_type is "gemma3", only "llama" or "mistral" or'),
        "architecture": ({"architectures": ["MistralForCausalLM"]}, "architectures"),
        "activation": ({"hidden_act": "gelu"}, "hidden_act"),
        "tensor parallel": ({"pretraining_tp": 2}, "pretraining_tp"),
        "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
        "sliding window": ({"sliding_window": 128}, "sliding_window"),
        "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        "partial rotary, inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        "interleaved": ({"rope_interleaved": True}, "rope_interleaved"),
        "longrope": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        "yarn without factor": ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor is missing"),
        "yarn scale": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": "a"}}, "mscale"),
        "yarn base": ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_theta must exceed 1"),
        "yarn flag": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "rope_scaling.truncate"),
        "factor missing": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        "factor extra": ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "rope_scaling.beta"),
        "factor with default": ({"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor"),
        "factor negative": ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor"),
        "rope not an object": ({"rope_scaling": "linear"}, "rope_scaling"),
        "rope ramp": ({"rope_scaling": ROPES["llama3"][0] | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        "ropes disagree": (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 3}},
            "disagree",
        ),
        "theta": ({"rope_theta": 0}, "rope_theta"),
        "missing": ({"hidden_size": None}, "hidden_size is missing"),
        "not a number": ({"vocab_size": "11"}, "vocab_size"),
        "not whole": ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        "true is no number": ({"num_hidden_layers": True}, "num_hidden_layers"),
        "layers without end": (
            {"num_hidden_layers": 2**63},
            "num_hidden_layers must be a whole number from 1 to 10000",
        ),
        "layers beyond memory": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        "no 32-bit index": ({"vocab_size": 2**31}, "vocab_size must be a whole number from 1 to 2147483647"),
        "no double": ({"rope_theta": 10**400}, "rope_theta must be a positive number, not 1000"),
        "rope of no type": ({"rope_scaling": {"type": ["linear"]}}, "rope_scaling of type ['linear']"),
        "epsilon": ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        "flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        "end token": ({"eos_token_id": "</s>"}, "eos_token_id"),
        "begin token": ({"bos_token_id": -1}, "bos_token_id"),
        "heads": ({"num_attention_heads": 3, "num_key_value_heads": 1}, "hidden_size 8 is not a multiple of 3"),
        "key/value heads": ({"num_key_value_heads": 3}, "key/value"),
        "odd head": ({"head_dim": 3}, "head_dim 3"),
    }.values(),
)
def test_what_would_change_the_computation_is_refused_by_name(changed, named):
    LlamaConfig.from_json(SMALL)
    with pytest.raises(UserError) as caught:
        LlamaConfig.from_json(SMALL | changed)
    assert named in str(caught.value)


def test_all_faults_are_told_at_once_with_the_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL | {"hidden_act": "gelu", "zoo": 1, "num_key_value_heads": 3, "vocab_size": 0}))
    with pytest.raises(UserError) as caught:
        LlamaConfig.from_json(file)
    for named in (str(file), "hidden_act", "zoo", "vocab_size"):
        assert named in str(caught.value)
    file.write_text(json.dumps(SMALL | {"zoo": 1, "num_key_value_heads": 3}))
    with pytest.raises(UserError, match=r"zoo.*key/value"):
        LlamaConfig.from_json(tmp_path)


@pytest.mark.parametrize(
    "content", [None, "", "{", "[1]", '"llama"', b"\xff\xfe"], ids=["absent", "empty", "cut", "list", "text", "bytes"]
)
def test_a_file_that_is_no_json_object_is_one_clear_error(tmp_path, content):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        LlamaConfig.from_json(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_that_change_nothing_and_nulls_are_accepted():
    config = LlamaConfig.from_json(SMALL)
    harmless = {
        "initializer_range": 0.1,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "_name_or_path": "x",
        "new": None,
    }
    assert LlamaConfig.from_json(SMALL | harmless) == config
    assert LlamaConfig.from_json(SMALL | {"head_dim": None, "rope_scaling": None, "hidden_act": None}).head_dim == 2


# Published parameter counts of the models (weights of model.safetensors, tied heads counted once).
COUNTS = {
    "llama-3b": 3_426_473_600,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "smollm3-3b": 3_075_098_624,
    "smollm2-135m": 134_515_008,
}


def test_llama_3_2_s_shape_is_its_published_config():
    assert dataclasses.replace(SHAPES["llama3.2-1b"], eos_token_id=(128001, 128008, 128009)) == LlamaConfig.from_json(
        LLAMA_3_2_1B
    )


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_parameter_counts(name):
    leaves = jax.tree.leaves(base_shapes(SHAPES[name]), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert sum(map(math.prod, leaves)) == COUNTS[name]


def test_lora_of_the_paper_has_the_paper_s_parameter_count():
    """App. F.1: rank 128 on q and v of LLaMA-3B is 42,598,400 parameters."""
    shapes = lora_shapes(SHAPES["llama-3b"], 128, ("q_proj", "v_proj"))
    assert sum(math.prod(shape) for halves in shapes.values() for shape in halves.values()) == 42_598_400
