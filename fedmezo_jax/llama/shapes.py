"""Shapes of well-known models, for planning and ahead-of-time compilation without weights."""

from pathlib import Path

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.rope import Llama3Rope

_LLAMA2 = {"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}

_LLAMA3 = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 128000}
_LLAMA32 = _LLAMA3 | {
    "rope_scaling": Llama3Rope(32.0, 1.0, 4.0, 8192),
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "eos_token_id": (128001,),
}


def _qwen(family: str, sizes: tuple[int, ...], tied: bool, context: int, vocab_size: int = 151936) -> LlamaConfig:
    """Sizes as in :class:`LlamaConfig`, from ``hidden_size`` to ``head_dim``."""
    return LlamaConfig(
        vocab_size,
        *sizes,
        rope_theta=1000000.0,
        tie_word_embeddings=tied,
        max_position_embeddings=context,
        bos_token_id=151643,
        eos_token_id=(151643 if family == "qwen2" else 151645,),
        family=family,
    )


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
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        eos_token_id=(128001,),
        **_LLAMA3,
    ),
    "llama3.2-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        **_LLAMA32,
    ),
    "llama3.2-3b": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        **_LLAMA32,
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
    # v0.3, which has no window
    "mistral-7b": LlamaConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        max_position_embeddings=32768,
        family="mistral",
    ),
    "qwen2.5-0.5b": _qwen("qwen2", (896, 4864, 24, 14, 2, 64), True, 32768),
    "qwen2.5-1.5b": _qwen("qwen2", (1536, 8960, 28, 12, 2, 128), True, 131072),
    "qwen2.5-3b": _qwen("qwen2", (2048, 11008, 36, 16, 2, 128), True, 32768),
    "qwen2.5-7b": _qwen("qwen2", (3584, 18944, 28, 28, 4, 128), False, 131072, vocab_size=152064),
    "qwen3-0.6b": _qwen("qwen3", (1024, 3072, 28, 16, 8, 128), True, 40960),
    "qwen3-1.7b": _qwen("qwen3", (2048, 6144, 28, 16, 8, 128), True, 40960),
    "qwen3-4b": _qwen("qwen3", (2560, 9728, 36, 32, 8, 128), True, 40960),
    "qwen3-8b": _qwen("qwen3", (4096, 12288, 36, 32, 8, 128), False, 40960),
    "qwen3-14b": _qwen("qwen3", (5120, 17408, 40, 40, 8, 128), False, 40960),
    "qwen3-32b": _qwen("qwen3", (5120, 25600, 64, 64, 8, 128), False, 40960),
    "smollm3-3b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        rope_theta=5000000.0,
        tie_word_embeddings=True,
        max_position_embeddings=65536,
        bos_token_id=128000,
        eos_token_id=(128001,),
        family="smollm3",
        layers_without_rope=tuple(range(3, 36, 4)),
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
