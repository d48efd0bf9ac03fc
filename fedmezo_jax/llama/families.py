"""The model families that share the decoder, and what sets each apart from LLaMA.

A family is named by ``model_type`` in ``config.json``. Its differences are absent from the other families' programs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """What a family's decoder and its ``config.json`` have that LLaMA's have not, and the other way round.

    Attributes:
        architecture: transformers' class, named in ``architectures``.
        models: well-known models of the family, for documents.
        flags: those of ``attention_bias`` and ``mlp_bias`` that its ``config.json`` has. In other families both are
            false.
        qkv_bias: whether q, k and v have biases although o has none.
        qk_norm: whether each head of q and k is normalised by RMSNorm before the rotation.
        window: which layers have the sliding window of ``config.json``: none; all; those that ``layer_types`` names,
            or else all; or, with ``use_sliding_window`` alone, those that ``layer_types`` names, or else the layers
            from ``max_window_layers`` on, or else those without rotary positions.
        unrotated: whether ``no_rope_layers`` or ``no_rope_layer_interval`` leave layers without rotary positions.
        defaults: what transformers takes for an absent field, where this differs from LLaMA.
        ignored: further fields of its ``config.json`` that have no effect.
    """

    architecture: str
    models: str
    flags: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["none", "all", "listed", "upper", "unrotated"] = "none"
    unrotated: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def pattern_fields(self) -> tuple[str, ...]:
        """The fields of ``config.json`` that say which layers have a window and which have rotary positions."""
        window_fields = {
            "none": (),
            "all": ("sliding_window",),
            "listed": ("sliding_window", "layer_types"),
            "upper": ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers"),
            "unrotated": ("sliding_window", "layer_types", "use_sliding_window"),
        }
        rotary_fields = ("no_rope_layers", "no_rope_layer_interval") if self.unrotated else ()
        return window_fields[self.window] + rotary_fields


LLAMA_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 0,
    "head_dim": 0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": None,
}
"""What transformers' ``LlamaConfig`` takes for an absent field; 0 stands for a size that follows from others."""

_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4096,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", "LLaMA 1 to 3.2, TinyLlama, SmolLM2, open_llama", flags=("attention_bias", "mlp_bias")
    ),
    "mistral": Family(
        "MistralForCausalLM", "Mistral 7B v0.1 to v0.3, Mistral NeMo, Ministral 8B", window="all", defaults=_MISTRAL
    ),
    "ministral": Family(
        "MinistralForCausalLM", "Ministral 8B with a window in some layers", window="listed", defaults=_MISTRAL
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
        qkv_bias=True,
        window="upper",
        defaults=_QWEN,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3, dense: 0.6B to 32B",
        flags=("attention_bias",),
        qk_norm=True,
        window="upper",
        defaults=_QWEN | {"head_dim": 128},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "SmolLM3-3B",
        flags=("attention_bias", "mlp_bias"),
        window="unrotated",
        unrotated=True,
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "rope_theta": 2000000.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        ignored=("max_window_layers", "pretraining_tp"),
    ),
}
"""The families by their ``model_type``."""
