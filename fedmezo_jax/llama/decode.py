"""The decoder of ``model.py`` over a key/value cache: each token's keys and values are computed once.

Its modules have the same names as those of ``model.py``, so it uses the same base and LoRA pytrees. Every sequence of a
batch has its own position: slot t of its cache holds its token t. Sequences of unequal length can therefore share a
batch, and no padding is attended to. Letters are as in ``model.py``; T is the number of slots.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedmezo_jax.llama.attention import layer_rope, layer_window, rotary_table, rotate, visible
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import spread
from fedmezo_jax.llama.model import Llama, Lora, Mlp, Projections, RMSNorm
from fedmezo_jax.llama.precision import Products


class Cache(NamedTuple):
    """Keys and values of all layers.

    Attributes:
        keys: [L, B, T, K, h] float32, with rotary positions applied.
        values: [L, B, T, K, h] float32.
    """

    keys: jax.Array
    values: jax.Array


def empty_cache(config: LlamaConfig, rows: int, slots: int) -> Cache:
    """Returns an empty cache with room for ``slots`` tokens in each of ``rows`` sequences."""
    shape = (config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim)
    return Cache(jnp.zeros(shape), jnp.zeros(shape))


class _Attention(Projections):
    @nn.compact
    def __call__(self, x, lora: Lora, layer, cache: Cache, positions, rope):
        c = self.config
        rope = layer_rope(c, rope, layer)
        query = _rotate_rows(self.heads("q_proj", c.num_attention_heads, x, lora), rope)
        key = _rotate_rows(self.heads("k_proj", c.num_key_value_heads, x, lora), rope)
        value = self.heads("v_proj", c.num_key_value_heads, x, lora)
        slot = (layer, jnp.arange(x.shape[0])[:, None], positions)
        cache = Cache(cache.keys.at[slot].set(key), cache.values.at[slot].set(value))
        window = layer_window(c, layer, cache.keys.shape[2])
        mixed = attend(query, cache.keys[layer], cache.values[layer], positions, window).reshape(*x.shape[:2], -1)
        return self.project("o_proj", c.hidden_size, mixed, lora), cache


class _Block(nn.Module):
    config: LlamaConfig
    lora_scale: float
    products: Products

    @nn.compact
    def __call__(self, carry, lora: Lora, layer, positions, rope):
        x, cache = carry
        c = self.config
        attention = _Attention(c, self.lora_scale, self.products, name="self_attn")
        mlp = Mlp(c, self.lora_scale, self.products, name="mlp")
        normed = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        mixed, cache = attention(normed, lora, layer, cache, positions, rope)
        x = x + mixed
        x = x + mlp(RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x), lora)
        return (x, cache), None


class Decoder(Llama):
    """``model.Llama`` applied to successive parts of a sequence; same attributes, without precision ``paired``."""

    block: ClassVar[type[nn.Module]] = _Block

    def __call__(
        self, tokens: jax.Array, lora: Lora, cache: Cache, start: jax.Array, last: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Returns the logits of one token of each sequence, and the cache with ``tokens`` added.

        Args:
            tokens: [B, S] int32; those of sequence b have positions start[b], start[b] + 1, …
            lora: θ, or ``{}`` for the base alone.
            cache: the cache with all earlier tokens of each sequence. Later slots are ignored.
            start: [B] int32, position of the first token.
            last: [B] int32, index of the token whose logits are returned. Tokens after it may be padding: no earlier
                token attends to them, and later calls overwrite them.

        Returns:
            Logits, [B, V] float32, and the cache.
        """
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        rope = tuple(table[positions] for table in rotary_table(self.config, cache.keys.shape[2], sequence=0))
        x = self.embed_tokens(tokens).astype(jnp.float32)
        lora = spread(lora, self.trained_layers, self.config.num_hidden_layers)
        (x, cache), _ = self.layers((x, cache), lora, jnp.arange(self.config.num_hidden_layers), positions, rope)
        return self.logits(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]), cache


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """Returns softmax(q·kᵀ/√h)·v over the slots up to each query's position, in float32.

    Args:
        query: [B, S, N, h].
        keys: [B, T, K, h].
        values: [B, T, K, h].
        positions: [B, S] int32.
        window: a query attends to this many slots; None for all.

    Returns:
        [B, S, N, h].
    """
    batch, length, heads, width = query.shape
    groups = query.reshape(batch, length, keys.shape[2], -1, width)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bskgh,btkh->bkgst", groups, keys, precision=highest) * width**-0.5
    seen = visible(jnp.arange(keys.shape[1]), positions[:, :, None], window)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgst,btkh->bskgh", weights, values, precision=highest).reshape(batch, length, heads, width)


def _rotate_rows(x: jax.Array, rope) -> jax.Array:
    """``attention.rotate`` of [B, S, heads, h] with tables [B, S, h/2], with positions per sequence."""
    return jax.vmap(lambda sequence, cos, sin: rotate(sequence[None], (cos, sin))[0])(x, *rope)
