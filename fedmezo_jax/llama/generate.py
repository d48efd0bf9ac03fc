"""Greedy generation, batched and under one ``jit``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checks import check_finite, check_ids
from fedmezo_jax.llama.decode import Decoder, empty_cache
from fedmezo_jax.llama.model import Base, Llama, Lora

_MULTIPLE = 16
"""Prompts are padded up to this, so that batches of like lengths share a compiled program."""


def generate(
    model: Llama,
    base: Base,
    lora: Lora,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    ends: Sequence[int] | None = None,
    name: str = "the model",
) -> list[list[int]]:
    """The likeliest next token, again and again, after each prompt.

    A row ends with the first of ``ends``, which is part of the result, or after ``max_new_tokens``. Rows of unequal
    length do not see one another's padding, so a row's tokens are those that it would get alone.

    Args:
        model: the decoder; ``paired`` counts as ``bfloat16`` here.
        base: its frozen weights.
        lora: θ, ``{}`` for the base alone.
        prompts: token ids, at least one in each.
        max_new_tokens: most tokens in a result.
        ends: token ids that end a text; the config's ``eos_token_id`` unless given.
        name: what error messages call the model.

    Returns:
        The new tokens of each prompt.

    Raises:
        UserError: no prompt, an empty one, one with a token beyond the vocabulary, or one too long for the model with
            the new tokens; or logits that are not finite.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    room = model.config.max_position_embeddings
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    if not lengths.size or not lengths.min():
        raise UserError("a prompt is empty: give at least one token to go on from")
    if lengths.max() + max_new_tokens > room:
        raise UserError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones are more than the model's {room}: "
            "shorten it, or lower --max-new-tokens"
        )
    check_ids(max(map(max, prompts)), model.config, name)
    width = -(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    ends = model.config.eos_token_id if ends is None else ends
    if model.precision == "paired":
        model = model.clone(precision="bfloat16")
    found, counts, finite = jax.device_get(
        _greedy(model, max_new_tokens, base, lora, tokens, lengths, np.array(ends, np.int32))
    )
    check_finite(bool(finite), "logits", model.config, base, lora, name)
    return [row[:count].tolist() for row, count in zip(found, counts, strict=True)]


@partial(jax.jit, static_argnums=(0, 1))
def _greedy(model: Llama, new: int, base: Base, lora: Lora, prompts, lengths, ends) -> tuple[jax.Array, ...]:
    """Tokens [B, new], how many of them count [B], and whether all logits that chose one were finite, a scalar.

    Prompts [B, P] are padded on the right, lengths [B].
    """
    decoder = Decoder(model.config, model.lora_scale, model.precision, trained=model.trained)
    rows, width = prompts.shape
    cache = empty_cache(model.config, rows, width + new)
    start = jnp.zeros(rows, jnp.int32)

    def following(tokens, cache, start, last):
        logits, cache = decoder.apply({"params": base}, tokens, lora, cache, start, last)  # pyright: ignore
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.isfinite(logits).all(axis=-1), cache

    def step(state):
        i, token, is_finite, all_finite, found, counts, cache = state
        running = counts == i
        all_finite &= jnp.all(is_finite | ~running)
        found = found.at[:, i].set(jnp.where(running, token, 0))
        counts = counts + running
        ended = jnp.any(token[:, None] == ends, axis=-1)
        # A row that has ended goes on over its own slots; nothing reads what it finds. Its count no longer moves.
        token, is_finite, cache = following(token[:, None], cache, lengths + i, jnp.zeros(rows, jnp.int32))
        counts = jnp.where(running & ended, -counts, counts)
        return i + 1, token, is_finite, all_finite, found, counts, cache

    def unfinished(state):
        i, *_, counts, _ = state
        return (i < new) & jnp.any(counts == i)

    token, is_finite, cache = following(prompts, cache, start, lengths - 1)
    counts = jnp.zeros(rows, jnp.int32)
    state = (jnp.int32(0), token, is_finite, jnp.bool_(True), jnp.zeros((rows, new), jnp.int32), counts, cache)
    *_, all_finite, found, counts, _ = jax.lax.while_loop(unfinished, step, state)
    return found, jnp.abs(counts), all_finite
