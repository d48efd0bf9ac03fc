"""The shape and constants of a decoder, read from Hugging Face's ``config.json``.

Reading is strict: a field that is neither read nor known to be harmless is an error, because a model that silently
ignores such a field still gives plausible logits.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.families import FAMILIES, LLAMA_DEFAULTS
from fedmezo_jax.llama.folder import read_json_object, shorten
from fedmezo_jax.llama.layer_pattern import LayerPattern, pattern_to_json, read_pattern
from fedmezo_jax.llama.rope import RopeScaling, is_positive, read_rope, rope_to_json


@dataclass(frozen=True)
class LlamaConfig:
    """A decoder's sizes, constants and special tokens; hashable, so it can be static under ``jit``.

    Defaults are those of transformers' ``LlamaConfig``.

    Attributes:
        vocab_size: V, rows of the embedding and columns of the head.
        hidden_size: D, width of the residual stream; a multiple of ``num_attention_heads``.
        intermediate_size: F, width of the SwiGLU MLP.
        num_hidden_layers: L.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key/value heads, a divisor of the query heads; 0 means as many as query heads.
        head_dim: width of a head, even; 0 means hidden_size / num_attention_heads.
        rms_norm_eps: added to the mean square under RMSNorm's root.
        rope_theta: base of the rotary frequencies theta^(-2i/head_dim).
        rope_scaling: scaling of these frequencies, if any.
        tie_word_embeddings: whether the head is the transposed embedding.
        attention_bias: whether q, k, v and o have biases; see :meth:`has_bias`.
        mlp_bias: whether gate, up and down have biases.
        max_position_embeddings: longest sequence that the model was trained for.
        bos_token_id: begins a text if the tokenizer adds it.
        eos_token_id: each of these ends a text; may be empty.
        family: key of :data:`families.FAMILIES`.
        sliding_window: a token of a layer with a window attends to this many tokens, itself and those before it.
        layers_with_window: indices of these layers, ascending.
        layers_without_rope: indices of the layers whose queries and keys are not rotated, ascending.

    Raises:
        UserError: the sizes do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)
    family: str = "llama"
    sliding_window: int | None = None
    layers_with_window: tuple[int, ...] = ()
    layers_without_rope: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // max(self.num_attention_heads, 1))
        problems = _mismatches(self)
        if problems:
            raise UserError("; ".join(problems))

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k is normalised before the rotation."""
        return FAMILIES[self.family].qk_norm

    def has_bias(self, projection: str) -> bool:
        """Whether a projection, such as ``q_proj``, has a bias."""
        if projection in ("gate_proj", "up_proj", "down_proj"):
            return self.mlp_bias
        return self.attention_bias or (FAMILIES[self.family].qkv_bias and projection != "o_proj")

    @classmethod
    def from_json(cls, source: str | PathLike | Mapping[str, Any]) -> "LlamaConfig":
        """Read a ``config.json``, given as its path, its folder, or its parsed object.

        Raises:
            UserError: lists every field that is missing, wrong or unknown.
        """
        config, problems = read_config(source)
        if config is None or problems:
            name = "the model's config" if isinstance(source, Mapping) else str(_config_file(source))
            raise UserError(f"{name}: " + "; ".join(problems))
        return config


def read_config(source: str | PathLike | Mapping[str, Any]) -> tuple[LlamaConfig | None, list[str]]:
    """Returns a config, or None if sizes are missing, and everything that is wrong with it.

    Raises:
        UserError: the file is missing or not a JSON object.
    """
    raw = source if isinstance(source, Mapping) else read_json_object(_config_file(source))
    values, problems = _read(raw)
    if values.keys() >= set(_REQUIRED):
        try:
            return LlamaConfig(**values), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def _config_file(source: str | PathLike) -> Path:
    path = Path(source)
    return path / "config.json" if path.is_dir() else path


def to_json(config: LlamaConfig, dtype: str = "float32") -> dict[str, Any]:
    """Returns the object of a ``config.json`` for transformers 4 and 5; ``dtype`` is the type of the stored weights."""
    family, raw = FAMILIES[config.family], asdict(config)
    eos = config.eos_token_id
    raw["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    raw["rope_scaling"] = rope_to_json(config.rope_scaling)
    pattern = LayerPattern(*(raw.pop(name) for name in LayerPattern._fields))
    del raw["family"]
    for name in {"attention_bias", "mlp_bias"}.difference(family.flags):
        del raw[name]
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        **raw,
        **({} if config.family == "llama" else {"pad_token_id": None}),  # transformers' own may be no token
        **pattern_to_json(pattern, family, config.num_hidden_layers),
    }


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
_LARGEST = 2**31 - 1  # the largest 32-bit index
_MOST_LAYERS = 10_000  # a layer has at least nine tensors, which are all listed before a file is opened
_READ = {
    *_SIZES,
    "model_type",
    "architectures",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
}

# Fields that affect the computation where they are not read, with the values that change nothing. Null always does.
_NEUTRAL: dict[str, tuple] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "quantization_config": (),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "per_layer_config": ({},),
}

# Fields that do not affect the logits: how the model was made, stored, trained, served or labelled. They include
# dropout, which no forward pass here uses (the paper's zeroth-order forward passes switch it off too).
_HARMLESS = frozenset(  # shorter than one line per name
    """
    _name_or_path _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _flash_attn_2_enabled attn_implementation attention_dropout chunk_size_feed_forward dtype finetuning_task id2label
    initializer_range is_decoder is_llama_config label2id max_sequence_length num_labels output_attentions
    output_hidden_states pad_token_id prefix problem_type return_dict sep_token_id task_specific_params
    tf_legacy_loss tie_last_hidden_states tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache decoder_start_token_id
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()  # noqa: SIM905
)


def _mismatches(config: LlamaConfig) -> list[str]:
    """The sizes of a config that do not fit together, as messages."""
    if config.num_attention_heads < 1 or config.num_key_value_heads < 1:
        return ["num_attention_heads and num_key_value_heads must be at least 1"]
    problems = []
    follows = config.family == "llama" or config.head_dim == config.hidden_size // config.num_attention_heads
    if follows and config.hidden_size % config.num_attention_heads:
        problems.append(f"hidden_size {config.hidden_size} is not a multiple of {config.num_attention_heads} heads")
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append(
            f"{config.num_attention_heads} heads cannot share {config.num_key_value_heads} key/value heads evenly"
        )
    if config.head_dim % 2 or config.head_dim < 2:
        problems.append(f"head_dim {config.head_dim} is not a positive even number, as rotary positions need")
    return problems


def _read(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The dataclass's arguments from a config's object, and everything that is wrong with it."""
    values: dict[str, Any] = {}
    model_type = "llama" if raw.get("model_type") is None else raw["model_type"]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        return values, [f"model_type is {_json(model_type)}, only {_any_of(FAMILIES)} is supported"]
    family, problems = FAMILIES[model_type], []
    defaults = LLAMA_DEFAULTS | dict(family.defaults)
    values["family"] = model_type
    for field in _SIZES:
        value, most = raw.get(field, defaults.get(field)), _MOST_LAYERS if field == "num_hidden_layers" else _LARGEST
        if value is None and field in _REQUIRED:
            problems.append(f"{field} is missing")
        elif value is None:
            values[field] = LLAMA_DEFAULTS[field]
        elif (field not in raw and not value) or _is_int(value, 1, most):
            values[field] = value
        else:
            problems.append(f"{field} must be a whole number from 1 to {most}, not {_shown(value)}")
    flags = ("tie_word_embeddings", *family.flags)
    for field in flags:
        value = raw.get(field)
        if value is None or isinstance(value, bool):
            values[field] = defaults.get(field, False) if value is None else value
        else:
            problems.append(f"{field} must be true or false, not {_shown(value)}")
    eps = raw.get("rms_norm_eps")
    if eps is not None and not is_positive(eps):
        problems.append(f"rms_norm_eps must be a positive number, not {_shown(eps)}")
    elif eps is not None:
        values["rms_norm_eps"] = float(eps)
    values["bos_token_id"] = raw.get("bos_token_id", defaults["bos_token_id"])
    if not (values["bos_token_id"] is None or _is_int(values["bos_token_id"], 0, _LARGEST)):
        problems.append(f"bos_token_id must be a token id, not {_shown(values['bos_token_id'])}")
    eos = raw.get("eos_token_id", defaults["eos_token_id"])
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(_is_int(token, 0, _LARGEST) for token in eos):
        problems.append(f"eos_token_id must be a token id or a list of them, not {_shown(raw['eos_token_id'])}")
    values["eos_token_id"] = tuple(eos)
    context = values.get("max_position_embeddings", defaults["max_position_embeddings"])
    values["rope_theta"], values["rope_scaling"] = read_rope(raw, context, defaults["rope_theta"], problems)
    if "num_hidden_layers" in values:
        values |= read_pattern(raw, family, values["num_hidden_layers"], problems)._asdict()
    read = _READ | {*flags, *family.pattern_fields}
    neutral = {field: accepted for field, accepted in _NEUTRAL.items() if field not in {*read, *family.ignored}}
    for field, accepted in ({"architectures": ([family.architecture],)} | neutral).items():
        if raw.get(field) is not None and raw[field] not in accepted:
            problems.append(f"{field} is {_json(raw[field])}, only {_any_of(accepted)} is supported")
    name = family.architecture.removesuffix("ForCausalLM")
    for field in sorted(raw.keys() - read - neutral.keys() - _HARMLESS - {*family.ignored}):
        if raw[field] is not None:
            problems.append(f"{shorten(field)} is not a field of {name} known here; if it changes nothing, remove it")
    return values, problems


def _is_int(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _shown(value: Any) -> str:
    return shorten(repr(value))


def _json(value: Any) -> str:
    return shorten(json.dumps(value))


def _any_of(values: Iterable[Any]) -> str:
    return " or ".join(json.dumps(value) for value in values) or "null"
