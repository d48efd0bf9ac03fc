"""Which layers have a sliding window and which have no rotary positions, and how ``config.json`` says so."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fedmezo_jax.llama.families import LLAMA_DEFAULTS, Family
from fedmezo_jax.llama.folder import shorten

_KINDS = {"full_attention": False, "sliding_attention": True}
_INTERVAL, _FIRST_WINDOW = 4, 28  # transformers' no_rope_layer_interval and max_window_layers


class LayerPattern(NamedTuple):
    """The layers that differ from the others; attributes as in :class:`config.LlamaConfig`."""

    sliding_window: int | None
    layers_with_window: tuple[int, ...]
    layers_without_rope: tuple[int, ...]


def read_pattern(raw: Mapping[str, Any], family: Family, layers: int, problems: list[str]) -> LayerPattern:
    """Reads the pattern of a ``config.json``; what is wrong with it is added to ``problems``."""
    unrotated = _unrotated(raw, layers, problems) if family.unrotated else ()
    if family.window == "none":
        return LayerPattern(None, (), unrotated)
    default = (LLAMA_DEFAULTS | dict(family.defaults))["sliding_window"]
    window = raw.get("sliding_window", default)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        problems.append(f"sliding_window must be a whole number of tokens or null, not {shorten(repr(window))}")
        window = None
    switched = family.window in ("upper", "unrotated")
    on = raw.get("use_sliding_window") if switched else True
    if on is not None and not isinstance(on, bool):
        problems.append(f"use_sliding_window must be true or false, not {shorten(repr(on))}")
    if on is not True or window is None:
        window = None
    kinds = raw.get("layer_types") if "layer_types" in family.pattern_fields else None
    if kinds is not None:
        windowed = _listed(kinds, layers, problems)
        if windowed and window is None:
            needed = "use_sliding_window and sliding_window" if switched else "sliding_window"
            problems.append(f"layer_types names sliding_attention, which needs {needed}")
    elif window is None:
        windowed = ()
    elif family.window == "upper":
        first = raw.get("max_window_layers", _FIRST_WINDOW)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            problems.append(f"max_window_layers must be a number of layers, not {shorten(repr(first))}")
            first = layers
        windowed = tuple(range(first, layers))
    else:
        windowed = unrotated if family.window == "unrotated" else tuple(range(layers))
    return LayerPattern(window if windowed else None, windowed, unrotated)


def _unrotated(raw: Mapping[str, Any], layers: int, problems: list[str]) -> tuple[int, ...]:
    """Indices of the layers without rotary positions. In ``no_rope_layers``, 1 stands for a layer that has them."""
    flags, interval = raw.get("no_rope_layers"), raw.get("no_rope_layer_interval", _INTERVAL)
    if flags is None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            problems.append(f"no_rope_layer_interval must be a number of layers, not {shorten(repr(interval))}")
            return ()
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(flags, list) or len(flags) < layers or not all(type(f) is int and f in (0, 1) for f in flags):
        problems.append(f"no_rope_layers must be a list of {layers} flags 0 and 1, not {shorten(repr(flags))}")
        return ()
    return tuple(layer for layer in range(layers) if not flags[layer])


def _listed(kinds: Any, layers: int, problems: list[str]) -> tuple[int, ...]:
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in _KINDS for kind in map(str, kinds)):
        wanted = " and ".join(_KINDS)
        problems.append(f"layer_types must be a list of {layers} entries {wanted}, not {shorten(repr(kinds))}")
        return ()
    return tuple(layer for layer, kind in enumerate(kinds) if _KINDS[kind])


def pattern_to_json(pattern: LayerPattern, family: Family, layers: int) -> dict[str, Any]:
    """Returns the fields of the family's ``config.json`` that say this pattern."""
    windowed, unrotated = pattern.layers_with_window, pattern.layers_without_rope
    fields = {
        "sliding_window": pattern.sliding_window,
        "layer_types": ["sliding_attention" if layer in windowed else "full_attention" for layer in range(layers)],
        "use_sliding_window": bool(windowed),
        "max_window_layers": windowed[0] if windowed else layers,
        "no_rope_layers": [int(layer not in unrotated) for layer in range(layers)],
    }
    return {name: value for name, value in fields.items() if name in family.pattern_fields}
