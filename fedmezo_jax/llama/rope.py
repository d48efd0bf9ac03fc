"""The kinds of rotary scaling, and how ``config.json`` writes them."""

import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeAlias

from fedmezo_jax.llama.folder import shorten


@dataclass(frozen=True)
class LinearRope:
    """Rotary frequencies divided by ``factor`` (positional interpolation, arXiv 2306.15595).

    Attributes:
        factor: the divisor.
    """

    factor: float


@dataclass(frozen=True)
class DynamicRope:
    """A larger base of the frequencies for sequences above the model's context ("dynamic NTK").

    A sequence of n tokens, with N = max_position_embeddings and n > N, has the base theta·b^(h/(h−2)), where
    b = factor·n/N − (factor − 1) and h is the width of a head. Up to N tokens nothing changes.

    Attributes:
        factor: how fast the base grows with the sequence.
    """

    factor: float


@dataclass(frozen=True)
class YarnRope:
    """Low rotary frequencies divided by ``factor``, high ones kept, and longer queries and keys (arXiv 2309.00071).

    Between the frequency that turns ``beta_fast`` times within the original context and the one that turns
    ``beta_slow`` times, the share that is kept falls linearly with the frequency's index.

    Attributes:
        factor: divisor of low frequencies.
        original_max_position_embeddings: context length before the scaling.
        attention_factor: rotated queries and keys are multiplied by it; 0 means 0.1·ln(factor) + 1.
        beta_fast: turns within the original context from which on a frequency is kept.
        beta_slow: turns up to which it is divided.
        truncate: whether the two ends of the ramp are rounded outwards to indices of frequencies.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        if not self.attention_factor:
            object.__setattr__(self, "attention_factor", _attention_factor(self.factor, 1.0))


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


RopeScaling: TypeAlias = LinearRope | DynamicRope | YarnRope | Llama3Rope
ROPE_KINDS: dict[str, type[Any]] = {
    "linear": LinearRope,
    "dynamic": DynamicRope,
    "yarn": YarnRope,
    "llama3": Llama3Rope,
}


def rope_to_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Returns the object that ``config.json`` has for a scaling."""
    if scaling is None:
        return None
    kind = next(kind for kind, cls in ROPE_KINDS.items() if isinstance(scaling, cls))
    return {"rope_type": kind, **asdict(scaling)}


def read_rope(
    raw: Mapping[str, Any], context: int, theta: float, problems: list[str]
) -> tuple[float, RopeScaling | None]:
    """Reads the rotary base and scaling from ``rope_scaling`` (transformers 4) or ``rope_parameters`` (transformers 5).

    Args:
        raw: the object of ``config.json``.
        context: its ``max_position_embeddings``.
        theta: the base if it gives none.
        problems: what is wrong is added here.
    """
    rope_fields = [name for name in ("rope_scaling", "rope_parameters") if raw.get(name)]
    top = raw.get("rope_theta")
    top = theta if top is None else top
    readings = {_read_field(name, raw[name], context, top, problems) for name in rope_fields}
    if len(readings) > 1:
        problems.append("rope_scaling and rope_parameters disagree")
    return readings.pop() if readings else _read_field("rope_parameters", {}, context, top, problems)


def _read_field(
    name: str, rope: Any, context: int, theta: Any, problems: list[str]
) -> tuple[float, RopeScaling | None]:
    """One rope object; a base inside it takes precedence over one at the top level, as in transformers."""
    if not isinstance(rope, dict):
        problems.append(f"{name} must be an object, not {_shown(rope)}")
        return 10000.0, None
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", theta)
    if not is_positive(theta):
        problems.append(f"rope_theta must be a positive number, not {_shown(theta)}")
        theta = 10000.0
    legacy = rope.pop("type", "default")
    kind = rope.pop("rope_type", legacy)
    if rope.pop("partial_rotary_factor", 1) != 1:
        problems.append(f"{name}.partial_rotary_factor other than 1 is not supported")
    if not isinstance(kind, str) or kind not in ("default", *ROPE_KINDS):
        known = ", ".join(ROPE_KINDS)
        problems.append(f"{name} of type {_shown(kind)} is not supported, only default, {known}")
        return float(theta), None
    known_fields = {} if kind == "default" else {entry.name: entry for entry in fields(ROPE_KINDS[kind])}
    types: dict[str, Any] = {key: entry.type for key, entry in known_fields.items()}
    if "original_max_position_embeddings" in known_fields:
        rope.setdefault("original_max_position_embeddings", context)
    faults = []
    if kind == "yarn":
        _join_scales(name, rope, faults)
    faults += [
        f"{name}.{key} is missing"
        for key, entry in known_fields.items()
        if entry.default is MISSING and key not in rope
    ]
    faults += [f"{name}.{shorten(key)} is not understood for type {kind!r}" for key in rope if key not in known_fields]
    for key in known_fields.keys() & rope.keys():
        if types[key] is bool and not isinstance(rope[key], bool):
            faults.append(f"{name}.{key} must be true or false, not {_shown(rope[key])}")
        elif types[key] is not bool and not is_positive(rope[key]):
            faults.append(f"{name}.{key} must be a positive number, not {_shown(rope[key])}")
    if not faults and kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        faults = [f"{name}.high_freq_factor must exceed low_freq_factor"]
    if kind == "yarn" and theta <= 1:
        faults.append("rope_theta must exceed 1 for type 'yarn'")
    problems += faults
    if faults or kind == "default":
        return float(theta), None
    return float(theta), ROPE_KINDS[kind](**{key: types[key](value) for key, value in rope.items()})


def _join_scales(name: str, rope: dict[str, Any], faults: list[str]) -> None:
    """Turns YaRN's ``mscale`` and ``mscale_all_dim`` into the attention factor that they stand for."""
    scales = [rope.pop(key, None) for key in ("mscale", "mscale_all_dim")]
    if any(scale is not None and not is_positive(scale) for scale in scales):
        faults.append(f"{name}.mscale and mscale_all_dim must be positive numbers")
    elif None not in scales and is_positive(rope.get("factor")):
        above, below = (_attention_factor(rope["factor"], scale) for scale in scales)
        rope.setdefault("attention_factor", above / below)


def _attention_factor(factor: float, scale: float) -> float:
    """YaRN's factor of rotated queries and keys (arXiv 2309.00071, eq. 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def is_positive(value: Any) -> bool:
    """Whether a value of a JSON file is a positive number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _shown(value: Any) -> str:
    return shorten(repr(value))
