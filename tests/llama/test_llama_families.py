"""The configs of the LLaMA families, as published, are read as transformers reads them."""

import pytest
import transformers
from test_llama_config import LLAMA_3_2_1B

from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.rope import Llama3Rope

_COMMON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True}
_OF_32000 = _COMMON | {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02}
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
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_transformers_reads_it(family):
    ours = LlamaConfig.from_json(FAMILIES[family])
    theirs = transformers.LlamaConfig(**FAMILIES[family])
    for field in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias"),
        *("max_position_embeddings", "bos_token_id"),
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    rope = dict(theirs.rope_parameters)
    assert ours.rope_theta == rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    assert ours.rope_scaling == (Llama3Rope(**rope) if kind == "llama3" else None)
    ends = theirs.eos_token_id
    assert ours.eos_token_id == tuple(ends if isinstance(ends, list) else [ends])
