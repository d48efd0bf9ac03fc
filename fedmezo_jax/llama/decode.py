"""The decoder of ``model.py`` over a key/value cache: each token's keys and values are computed once.

It has the same modules under the same names, so that it takes the same base and LoRA trees. Every row keeps its own
position: slot t of a row's cache holds its token t, whatever the other rows' lengths are. So rows of unequal length go
together without padding that anything sees. Letters as in ``model.py``; T is the number of slots.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import spread
from fedmezo_jax.llama.model import Dense, Llama, Lora, Mlp, RMSNorm, rotary_table, rotate
from fedmezo_jax.llama.precision import Precision


class Cache(NamedTuple):
    """Rotated keys and values of all layers."""

    keys: jax.Array  # [L, B, T, K, h] float32
    values: jax.Array  # [L, B, T, K, h] float32


def empty_cache(config: LlamaConfig, rows: int, slots: int) -> Cache:
    """A cache with room for ``slots`` tokens in each of ``rows`` rows."""
    shape = (config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim)
    return Cache(jnp.zeros(shape), jnp.zeros(shape))


class _Attention(nn.Module):
    config: LlamaConfig
    lora_scale: float
    precision: Precision
    least_rows: int = 1

    @nn.compact
    def __call__(self, x, lora: Lora, layer, cache: Cache, positions, rope):
        c = self.config

        def project(name, heads):
            dense = Dense(
                heads * c.head_dim, c.attention_bias, self.lora_scale, self.precision, self.least_rows, name=name
            )
            return dense(x, lora.get(name)).reshape(*x.shape[:2], heads, c.head_dim)

        query = _rotate_rows(project("q_proj", c.num_attention_heads), rope)
        key = _rotate_rows(project("k_proj", c.num_key_value_heads), rope)
        value = project("v_proj", c.num_key_value_heads)
        place = (layer, jnp.arange(x.shape[0])[:, None], positions)
        cache = Cache(cache.keys.at[place].set(key), cache.values.at[place].set(value))
        mixed = attend(query, cache.keys[layer], cache.values[layer], positions).reshape(*x.shape[:2], -1)
        output = Dense(c.hidden_size, c.attention_bias, self.lora_scale, self.precision, self.least_rows, name="o_proj")
        return output(mixed, lora.get("o_proj")), cache


class _Block(nn.Module):
    config: LlamaConfig
    lora_scale: float
    precision: Precision
    least_rows: int = 1

    @nn.compact
    def __call__(self, carry, lora: Lora, layer, positions, rope):
        x, cache = carry
        c = self.config
        attention = _Attention(c, self.lora_scale, self.precision, self.least_rows, name="self_attn")
        mlp = Mlp(c, self.lora_scale, self.precision, self.least_rows, name="mlp")
        normed = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        mixed, cache = attention(normed, lora, layer, cache, positions, rope)
        x = x + mixed
        x = x + mlp(RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x), lora)
        return (x, cache), None


class Decoder(Llama):
    """``model.Llama`` one stretch of tokens after another; attributes as there, but for ``paired``."""

    block: ClassVar[type[nn.Module]] = _Block

    def __call__(
        self, tokens: jax.Array, lora: Lora, cache: Cache, start: jax.Array, last: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Logits of one token of each row, and the cache with all of ``tokens`` in it.

        Args:
            tokens: [B, S] int32; row b's lie at positions start[b], start[b] + 1, …
            lora: θ, ``{}`` for the base alone.
            cache: with all earlier tokens of each row. What is in later slots is not seen.
            start: [B] int32.
            last: [B] int32, which of the S tokens the logits are of. Those after it are seen by nothing earlier, so
                they may be padding that later calls write over.

        Returns:
            [B, V] float32 and the cache.
        """
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        rope = tuple(table[positions] for table in rotary_table(self.config, cache.keys.shape[2]))
        x = self.embed_tokens(tokens).astype(jnp.float32)
        lora = spread(lora, self.trained_layers, self.config.num_hidden_layers)
        (x, cache), _ = self.layers((x, cache), lora, jnp.arange(self.config.num_hidden_layers), positions, rope)
        return self.logits(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]), cache


def attend(query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
    """softmax(q·kᵀ/√h)·v over the slots up to each query's position, in float32.

    Args:
        query: [B, S, N, h].
        keys: [B, T, K, h].
        values: [B, T, K, h].
        positions: [B, S] int32.

    Returns:
        [B, S, N, h].
    """
    batch, length, heads, width = query.shape
    groups = query.reshape(batch, length, keys.shape[2], -1, width)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bskgh,btkh->bkgst", groups, keys, precision=exact) * width**-0.5
    seen = jnp.arange(keys.shape[1]) <= positions[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgst,btkh->bskgh", weights, values, precision=exact).reshape(batch, length, heads, width)


def _rotate_rows(x: jax.Array, rope) -> jax.Array:
    """``model.rotate`` of [B, S, heads, h] with tables [B, S, h/2], a position for each row."""
    return jax.vmap(lambda row, cos, sin: rotate(row[None], (cos, sin))[0])(x, *rope)
