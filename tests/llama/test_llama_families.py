"""The configs of the families, as published, are read as transformers reads them."""

import dataclasses

import numpy as np
import pytest
import transformers
from test_llama_config import LLAMA_3_2_1B

from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.rope import Llama3Rope, YarnRope
from fedmezo_jax.llama.shapes import SHAPES

_COMMON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True}
_OF_32000 = _COMMON | {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02}
_MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "use_cache": True}
_MISTRAL |= {"bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096, "initializer_range": 0.02}
_MISTRAL |= {"intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32}
_MISTRAL |= {"num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "tie_word_embeddings": False}
_QWEN = {"attention_dropout": 0.0, "bos_token_id": 151643, "hidden_act": "silu", "initializer_range": 0.02}
_QWEN |= {"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
_QWEN |= {"use_cache": True, "use_sliding_window": False, "vocab_size": 151936}
FAMILIES = {  # as published
    "LLaMA 1": _OF_32000
    | {"hidden_size": 4096, "intermediate_size": 11008, "max_sequence_length": 2048, "num_attention_heads": 32}
    | {"num_hidden_layers": 32, "pad_token_id": 0, "rms_norm_eps": 1e-06, "torch_dtype": "float16"}
    | {"tie_word_embeddings": False, "transformers_version": "4.28.0.dev0"},
    "LLaMA 2": _OF_32000
    | {"_name_or_path": "meta-llama/Llama-2-70b-hf", "hidden_size": 8192, "intermediate_size": 28672}
    | {"max_position_embeddings": 4096, "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8}
    | {"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False},
    "LLaMA 3": _COMMON
    | {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001}
    | {"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192, "num_attention_heads": 32}
    | {"num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05}
    | {"rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256},
    "LLaMA 3.1": LLAMA_3_2_1B
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": None}
    | {"rope_scaling": LLAMA_3_2_1B["rope_scaling"] | {"factor": 8.0}, "tie_word_embeddings": False},
    "LLaMA 3.2": LLAMA_3_2_1B,
    "TinyLlama": _OF_32000
    | {"attention_bias": False, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048}
    | {"num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1}
    | {"rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16"},
    "SmolLM2": _COMMON
    | {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    | {"hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "mlp_bias": False}
    | {"is_llama_config": True, "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30}
    | {"num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False}
    | {"rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152}
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
    "Mistral 7B v0.1": _MISTRAL | {"rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
    "Mistral 7B v0.3": _MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
    "Ministral 8B": _MISTRAL
    | {"head_dim": 128, "intermediate_size": 12288, "num_hidden_layers": 36, "rope_theta": 100000000.0}
    | {"sliding_window": 32768, "vocab_size": 131072},
    "Qwen2.5 0.5B": _QWEN
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "eos_token_id": 151643, "hidden_size": 896}
    | {"intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "sliding_window": 32768, "use_mrope": False},
    "Qwen2.5 7B, long": _QWEN
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "eos_token_id": 151645, "hidden_size": 3584}
    | {"intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "sliding_window": 131072, "vocab_size": 152064}
    | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}
    | {"tie_word_embeddings": False},
    "Qwen3 0.6B": _QWEN
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "eos_token_id": 151645}
    | {"head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960}
    | {"max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8}
    | {"rope_scaling": None, "sliding_window": None},
    "SmolLM3 3B": {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False}
    | {"attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": 128001, "hidden_act": "silu"}
    | {"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 65536}
    | {"layer_types": ["full_attention"] * 36, "max_window_layers": 28, "mlp_bias": False}
    | {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16}
    | {"num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2}
    | {"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None}
    | {"torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 128256},
}
SHAPE_OF = {
    "LLaMA 2": "llama-70b",
    "LLaMA 3": "llama3-8b",
    "LLaMA 3.2": "llama3.2-1b",
    "SmolLM2": "smollm2-135m",
    "Mistral 7B v0.3": "mistral-7b",
    "Qwen2.5 0.5B": "qwen2.5-0.5b",
    "Qwen3 0.6B": "qwen3-0.6b",
    "SmolLM3 3B": "smollm3-3b",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_transformers_reads_it(family):
    ours = LlamaConfig.from_json(FAMILIES[family])
    theirs = transformers.AutoConfig.for_model(**({"model_type": "llama"} | FAMILIES[family]))
    for field in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "bos_token_id"),
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    for field in ("attention_bias", "mlp_bias"):
        assert getattr(ours, field) == getattr(theirs, field, False), field
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    rope = dict(theirs.rope_parameters)
    assert ours.rope_theta == rope.pop("rope_theta")
    kinds = {"default": lambda: None, "llama3": Llama3Rope, "yarn": YarnRope}
    rope.pop("type", None)
    assert ours.rope_scaling == kinds[rope.pop("rope_type")](**rope)
    ends = theirs.eos_token_id
    assert ours.eos_token_id == tuple(ends if isinstance(ends, list) else [ends])
    window = getattr(theirs, "sliding_window", None)
    assert ours.sliding_window == window
    assert ours.layers_with_window == (tuple(range(theirs.num_hidden_layers)) if window else ())
    rotated = getattr(theirs, "no_rope_layers", [1] * theirs.num_hidden_layers)
    assert ours.layers_without_rope == tuple(np.flatnonzero(np.array(rotated) == 0))


@pytest.mark.parametrize("family", SHAPE_OF)
def test_the_shapes_are_the_published_configs(family):
    """But for the tokens, which differ between a base model and its instruction-tuned one."""
    tokens = {"bos_token_id": None, "eos_token_id": ()}
    found, expected = SHAPES[SHAPE_OF[family]], LlamaConfig.from_json(FAMILIES[family])
    assert dataclasses.replace(found, **tokens) == dataclasses.replace(expected, **tokens)
