"""Causal attention with rotary positions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.precision import product, unfused
from fedmezo_jax.llama.rope import DynamicRope, LinearRope, Llama3Rope, YarnRope

_LEAST_STRIP, _QUERY_BLOCK = 32, 128  # queries, see causal_attention


def rotary_table(config: LlamaConfig, length: int, sequence: int | None = None) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position × frequency, each ``[S, h/2]`` float32 (RoPE, arXiv 2104.09864).

    Args:
        config: the model's config.
        length: S.
        sequence: tokens of the whole sequence, by default S; dynamic scaling depends on it.
    """
    frequency = rotary_frequencies(config, length if sequence is None else sequence)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if isinstance(config.rope_scaling, YarnRope):
        cos, sin = (table * np.float32(config.rope_scaling.attention_factor) for table in (cos, sin))
    return cos, sin


def rotary_frequencies(config: LlamaConfig, sequence: int = 0) -> np.ndarray:
    """Radians a position, ``[h/2]`` float32, in a sequence of so many tokens.

    Rounded step by step as PyTorch does for Hugging Face, and on the host: a last bit is 3e-5 radians at position 600.
    """
    scaling, base = config.rope_scaling, config.rope_theta
    context = config.max_position_embeddings
    if isinstance(scaling, DynamicRope) and sequence > context:
        growth = scaling.factor * sequence / context - (scaling.factor - 1)
        base *= growth ** (config.head_dim / (config.head_dim - 2))
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    wavelength_over_turn = (base ** exponent.astype(np.float64)).astype(np.float32)
    frequency = np.float32(1) / wavelength_over_turn
    if isinstance(scaling, LinearRope):
        frequency = frequency / np.float32(scaling.factor)
    elif isinstance(scaling, Llama3Rope):
        wavelength = 1 / frequency * np.float32(2 * math.pi)
        turns = 1 / wavelength * np.float32(scaling.original_max_position_embeddings)
        kept = (turns - np.float32(scaling.low_freq_factor)) / np.float32(
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        kept = np.clip(kept, 0, 1)
        frequency = (1 - kept) * frequency / np.float32(scaling.factor) + kept * frequency
    elif isinstance(scaling, YarnRope):
        divided = np.float32(1) / (np.float32(scaling.factor) * wavelength_over_turn)
        kept = _yarn_kept(scaling, base, config.head_dim)
        frequency = divided * (1 - kept) + frequency * kept
    return frequency


def _yarn_kept(scaling: YarnRope, theta: float, head_dim: int) -> np.ndarray:
    """The share of each frequency that YaRN keeps, ``[h/2]`` float32: a linear ramp over the frequencies' indices."""

    def index(turns):
        """Of the frequency that turns so often within the original context; not rounded."""
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    return 1 - np.clip(ramp, np.float32(0), np.float32(1))


def layer_rope(
    config: LlamaConfig, rope: tuple[jax.Array, jax.Array], layer: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """A layer's share of :func:`rotary_table`: angles of 0 where the layer has no rotary positions."""
    if not config.layers_without_rope:
        return rope
    rotated = ~_is_among(config.layers_without_rope, config.num_hidden_layers)[layer]
    return jnp.where(rotated, rope[0], 1), jnp.where(rotated, rope[1], 0)


def layer_window(config: LlamaConfig, layer: jax.Array | int, length: int) -> jax.Array | int | None:
    """How many tokens a token of this layer attends to, itself and those before it; None where all ``length`` are."""
    window = config.sliding_window
    if window is None or window >= length:
        return None
    if len(config.layers_with_window) == config.num_hidden_layers:
        return window
    return jnp.where(_is_among(config.layers_with_window, config.num_hidden_layers)[layer], window, length)


def _is_among(layers: tuple[int, ...], count: int) -> jax.Array:
    """A flag for each of ``count`` layers."""
    return jnp.array(np.isin(np.arange(count), layers))


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (x_i, x_{i+h/2}) of ``[B, S, heads, h]`` by their position's angles (Hugging Face's layout)."""
    cos, sin = (table[:, None, :] for table in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(scores: jax.Array) -> jax.Array:
    """exp(s_j)/Σ_k exp(s_k) over the last axis, of which at least one entry is finite; see :func:`unfused`."""
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    raised = jnp.exp(scores - largest)
    return raised * unfused(1 / jnp.sum(raised, axis=-1, keepdims=True))


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, window: jax.Array | int | None = None
) -> jax.Array:
    """softmax(q·kᵀ/√h)·v over earlier positions: ``[B, S, N, h]`` from N query and K key/value heads, in float32.

    With a window, over the last ``window`` positions up to the query's alone.

    Queries go in four strips, each over the keys up to its end, so that little of what causality hides is computed;
    and in blocks within a strip, so that memory grows with S and not with S².
    """
    length = query.shape[1]
    strip = max(_LEAST_STRIP, -(-length // 4))
    strips = [
        _attend(query[:, start : start + strip], key[:, : start + strip], value[:, : start + strip], start, window)
        for start in range(0, length, strip)
    ]
    return jnp.concatenate(strips, axis=1)


def visible(key_positions: jax.Array, query_positions: jax.Array, window: jax.Array | int | None) -> jax.Array:
    """Whether queries attend to keys at these positions, which broadcast against each other."""
    seen = key_positions <= query_positions
    return seen if window is None else seen & (key_positions > query_positions - window)


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, start: int, window: jax.Array | int | None
) -> jax.Array:
    """Attention of queries at positions from ``start`` on, ``[B, Q, N, h]``, to keys ``[B, T, K, h]`` from 0 on."""
    batch, rows, heads, width = query.shape
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)  # [B, K, h, T], [B, K, T, h]
    groups = (query * width**-0.5).reshape(batch, rows, key.shape[1], -1, width).transpose(0, 2, 3, 1, 4)

    def mix(first, groups):
        """``[B, K, G, Q, h]`` for queries from position ``first`` on."""
        flat = groups.reshape(batch, key.shape[1], -1, width)  # one product for the queries that share a key
        scores = product(flat, key).reshape(*groups.shape[:-1], -1)
        seen = visible(jnp.arange(key.shape[-1]), first + jnp.arange(groups.shape[-2])[:, None], window)
        weights = softmax(jnp.where(seen, scores, -jnp.inf))
        return product(weights.reshape(*flat.shape[:-1], -1), value).reshape(groups.shape)

    if rows <= _QUERY_BLOCK:
        mixed = mix(start, groups)
    else:
        blocks = -(-rows // _QUERY_BLOCK)
        padded = jnp.pad(groups, [(0, 0)] * 3 + [(0, blocks * _QUERY_BLOCK - rows), (0, 0)])
        split = jnp.moveaxis(padded.reshape(*groups.shape[:3], blocks, _QUERY_BLOCK, width), 3, 0)
        firsts = start + _QUERY_BLOCK * jnp.arange(blocks)
        # Back-propagation too would otherwise keep all weights.
        blocks_mixed = jax.lax.map(lambda block: jax.checkpoint(mix)(*block), (firsts, split))
        mixed = jnp.moveaxis(blocks_mixed, 0, 3).reshape(padded.shape)[..., :rows, :]
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, rows, heads, width)
