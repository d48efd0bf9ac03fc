"""The shape and constants of a LLaMA, read from Hugging Face's ``config.json``.

Reading is strict: a field that is neither read nor known to be harmless is an error, because a model that silently
ignores such a field still gives plausible logits.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.folder import read_json_object, shorten


@dataclass(frozen=True)
class LinearRope:
    """Rotary frequencies divided by ``factor`` (positional interpolation, arXiv 2306.15595).

    Attributes:
        factor: the divisor.
    """

    factor: float


@dataclass(frozen=True)
class Llama3Rope:
    """Rotary frequencies of LLaMA 3.1: low frequencies are divided by ``factor``, high ones kept, with a ramp between.

    With old = original_max_position_embeddings, the frequency f of a wavelength above old/low_freq_factor is divided,
    and that of a wavelength below old/high_freq_factor is kept. Between them it is (1-s)·f/factor + s·f, with
    s = (old/wavelength - low)/(high - low).

    Attributes:
        factor: divisor of low frequencies.
        low_freq_factor: low.
        high_freq_factor: high, above low.
        original_max_position_embeddings: context length before the scaling.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """A LLaMA decoder's sizes, constants and special tokens; hashable, so it can be static under ``jit``.

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
        attention_bias: whether q, k, v and o have biases.
        mlp_bias: whether gate, up and down have biases.
        max_position_embeddings: longest sequence that the model was trained for.
        bos_token_id: begins a text if the tokenizer adds it.
        eos_token_id: each of these ends a text; may be empty.

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
    rope_scaling: LinearRope | Llama3Rope | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)

    def __post_init__(self):
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // max(self.num_attention_heads, 1))
        problems = _mismatches(self)
        if problems:
            raise UserError("; ".join(problems))

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
    if values.keys() >= {name for name, default in _SIZES.items() if default is None}:
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
    raw = asdict(config)
    eos = config.eos_token_id
    raw["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    if config.rope_scaling is not None:
        kind = next(kind for kind, cls in _ROPE_KINDS.items() if isinstance(config.rope_scaling, cls))
        raw["rope_scaling"] = {"rope_type": kind, **asdict(config.rope_scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": dtype,
        **raw,
    }


_ROPE_KINDS = {"linear": LinearRope, "llama3": Llama3Rope}

# Fields that are read, with transformers' default, or None if the field is required.
_SIZES = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": 0,
    "head_dim": 0,
    "max_position_embeddings": 2048,
}
_LARGEST = 2**31 - 1  # the largest 32-bit index
_MOST_LAYERS = 10_000  # a layer has at least nine tensors, which are all listed before a file is opened
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_READ = {
    *_SIZES,
    *_FLAGS,
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
}

# Fields that affect the computation, with the values that change nothing. Null is always accepted.
_NEUTRAL: dict[str, tuple] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"],),
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
    if config.hidden_size % config.num_attention_heads:
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
    problems = []
    for field, default in _SIZES.items():
        value, most = raw.get(field), _MOST_LAYERS if field == "num_hidden_layers" else _LARGEST
        if value is None and default is None:
            problems.append(f"{field} is missing")
        elif value is None or _is_int(value, 1, most):
            values[field] = default if value is None else value
        else:
            problems.append(f"{field} must be a whole number from 1 to {most}, not {_shown(value)}")
    for field in _FLAGS:
        value = raw.get(field)
        if value is None or isinstance(value, bool):
            values[field] = bool(value)
        else:
            problems.append(f"{field} must be true or false, not {_shown(value)}")
    eps = raw.get("rms_norm_eps")
    if eps is not None and not _is_positive(eps):
        problems.append(f"rms_norm_eps must be a positive number, not {_shown(eps)}")
    elif eps is not None:
        values["rms_norm_eps"] = float(eps)
    values["bos_token_id"] = raw.get("bos_token_id", 1)
    if not (values["bos_token_id"] is None or _is_int(values["bos_token_id"], 0, _LARGEST)):
        problems.append(f"bos_token_id must be a token id, not {_shown(values['bos_token_id'])}")
    eos = raw.get("eos_token_id", 2)
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(_is_int(token, 0, _LARGEST) for token in eos):
        problems.append(f"eos_token_id must be a token id or a list of them, not {_shown(raw['eos_token_id'])}")
    values["eos_token_id"] = tuple(eos)
    values["rope_theta"], values["rope_scaling"] = _read_rope(raw, problems)
    for field, accepted in _NEUTRAL.items():
        if raw.get(field) is not None and raw[field] not in accepted:
            needed = " or ".join(json.dumps(value) for value in accepted) or "null"
            problems.append(f"{field} is {shorten(json.dumps(raw[field]))}, only {needed} is supported")
    for field in sorted(raw.keys() - _READ - _NEUTRAL.keys() - _HARMLESS):
        if raw[field] is not None:
            problems.append(f"{shorten(field)} is not a field of LLaMA known here; if it changes nothing, remove it")
    return values, problems


def _read_rope(raw: Mapping[str, Any], problems: list[str]) -> tuple[float, LinearRope | Llama3Rope | None]:
    """The rotary base and scaling from ``rope_scaling`` (transformers 4) or ``rope_parameters`` (transformers 5)."""
    rope_fields = [field for field in ("rope_scaling", "rope_parameters") if raw.get(field)]
    readings = {_read_rope_field(field, raw[field], raw, problems) for field in rope_fields}
    if len(readings) > 1:
        problems.append("rope_scaling and rope_parameters disagree")
    return readings.pop() if readings else _read_rope_field("rope_parameters", {}, raw, problems)


def _read_rope_field(
    field: str, rope: Any, raw: Mapping[str, Any], problems: list[str]
) -> tuple[float, LinearRope | Llama3Rope | None]:
    """One rope object; a base inside it takes precedence over one at the top level, as in transformers."""
    if not isinstance(rope, dict):
        problems.append(f"{field} must be an object, not {_shown(rope)}")
        return 10000.0, None
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", raw.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if not _is_positive(theta):
        problems.append(f"rope_theta must be a positive number, not {_shown(theta)}")
        theta = 10000.0
    legacy = rope.pop("type", "default")
    kind = rope.pop("rope_type", legacy)
    if rope.pop("partial_rotary_factor", 1) != 1:
        problems.append(f"{field}.partial_rotary_factor other than 1 is not supported")
    if not isinstance(kind, str) or kind not in ("default", *_ROPE_KINDS):
        problems.append(f"{field} of type {_shown(kind)} is not supported, only default, linear and llama3")
        return float(theta), None
    required = dict(_ROPE_KINDS[kind].__annotations__) if kind in _ROPE_KINDS else {}
    if "original_max_position_embeddings" in required:
        rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings", 2048))
    faults = [f"{field}.{key} is missing" for key in required if key not in rope]
    faults += [f"{field}.{shorten(key)} is not understood for type {kind!r}" for key in rope if key not in required]
    faults += [
        f"{field}.{key} must be a positive number, not {_shown(rope[key])}"
        for key in required
        if key in rope and not _is_positive(rope[key])
    ]
    if not faults and kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        faults = [f"{field}.high_freq_factor must exceed low_freq_factor"]
    problems += faults
    if faults or kind == "default":
        return float(theta), None
    return float(theta), _ROPE_KINDS[kind](**{key: as_type(rope[key]) for key, as_type in required.items()})


def _is_int(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _shown(value: Any) -> str:
    return shorten(repr(value))
