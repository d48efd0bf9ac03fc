"""Causal attention with rotary positions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from fedmezo_jax.llama.config import LinearRope, Llama3Rope, LlamaConfig
from fedmezo_jax.llama.precision import product, unfused

_LEAST_STRIP, _QUERY_BLOCK = 32, 128  # queries, see causal_attention


def rotary_table(config: LlamaConfig, length: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position × frequency, each ``[S, h/2]`` float32 (RoPE, arXiv 2104.09864)."""
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * rotary_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def rotary_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians a position, ``[h/2]`` float32.

    Rounded step by step as PyTorch does for Hugging Face, and on the host: a last bit is 3e-5 radians at position 600.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency = np.float32(1) / (config.rope_theta ** exponent.astype(np.float64)).astype(np.float32)
    scaling = config.rope_scaling
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
    return frequency


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


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(q·kᵀ/√h)·v over earlier positions: ``[B, S, N, h]`` from N query and K key/value heads, in float32.

    Queries go in four strips, each over the keys up to its end, so that little of what causality hides is computed;
    and in blocks within a strip, so that memory grows with S and not with S².
    """
    length = query.shape[1]
    strip = max(_LEAST_STRIP, -(-length // 4))
    strips = [
        _attend(query[:, start : start + strip], key[:, : start + strip], value[:, : start + strip], start)
        for start in range(0, length, strip)
    ]
    return jnp.concatenate(strips, axis=1)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, start: int) -> jax.Array:
    """Attention of queries at positions from ``start`` on, ``[B, Q, N, h]``, to keys ``[B, T, K, h]`` from 0 on."""
    batch, rows, heads, width = query.shape
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)  # [B, K, h, T], [B, K, T, h]
    groups = (query * width**-0.5).reshape(batch, rows, key.shape[1], -1, width).transpose(0, 2, 3, 1, 4)

    def mix(first, groups):
        """``[B, K, G, Q, h]`` for queries from position ``first`` on."""
        flat = groups.reshape(batch, key.shape[1], -1, width)  # one product for the queries that share a key
        scores = product(flat, key).reshape(*groups.shape[:-1], -1)
        seen = jnp.arange(key.shape[-1]) <= first + jnp.arange(groups.shape[-2])[:, None]
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
