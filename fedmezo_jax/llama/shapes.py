"""Shapes of well-known LLaMA models, for planning and ahead-of-time compilation without weights."""

from pathlib import Path

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.config import LlamaConfig

_LLAMA2 = {"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}

SHAPES: dict[str, LlamaConfig] = {
    # open_llama_3b_v2, the paper's LLaMA-3B
    "llama-3b": LlamaConfig(32000, 3200, 8640, 26, 32),
    # LLaMA 2; the paper's study of model size uses the 7B
    "llama-7b": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, **_LLAMA2
    ),
    "llama-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, **_LLAMA2
    ),
    "llama-70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        **_LLAMA2,
    ),
    # LLaMA 3, before the long-context 3.1
    "llama3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        max_position_embeddings=8192,
        bos_token_id=128000,
        eos_token_id=(128001,),
    ),
    # SmolLM2-135M and SmolLM2-135M-Instruct
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=(2,),
    ),
}


def named_shape(name: str) -> LlamaConfig:
    """Returns the shape with this name, or of the ``config.json`` (or its folder) at this path.

    Raises:
        UserError: there is neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    if Path(name).exists():
        return LlamaConfig.from_json(Path(name))
    raise UserError(f"unknown model {name!r}: give {', '.join(SHAPES)} or the path of a config.json")
