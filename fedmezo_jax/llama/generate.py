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
"""Prompts are padded to a multiple of this, so that batches of similar length share a compiled program."""


def generate(
    model: Llama,
    base: Base,
    lora: Lora,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    ends: Sequence[int] | None = None,
    name: str = "the model",
) -> list[list[int]]:
    """Continues each prompt with the most likely next token, greedily.

    A text ends with the first token of ``ends``, which is included, or after ``max_new_tokens``. Padding is not
    attended to, so each prompt gets the same tokens as it would alone.

    Args:
        model: the decoder; precision ``paired`` becomes ``bfloat16``.
        base: its frozen weights.
        lora: θ, or ``{}`` for the base alone.
        prompts: token ids, at least one per prompt.
        max_new_tokens: most tokens in a result.
        ends: token ids that end a text; by default the config's ``eos_token_id``.
        name: what error messages call the model.

    Returns:
        The new tokens of each prompt.

    Raises:
        UserError: there is no prompt; a prompt is empty, has a token beyond the vocabulary, or is too long for the
            model together with the new tokens; or the logits are not finite.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    limit = model.config.max_position_embeddings
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    if not lengths.size or not lengths.min():
        raise UserError("a prompt is empty: give at least one token to go on from")
    if lengths.max() + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones are more than the model's {limit}: "
            "shorten it, or lower --max-new-tokens"
        )
    check_ids(max(map(max, prompts)), model.config, name)
    width = -(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE
    tokens = np.zeros((len(prompts), width), np.int32)
    for ids, prompt in zip(tokens, prompts, strict=True):
        ids[: len(prompt)] = prompt
    ends = model.config.eos_token_id if ends is None else ends
    if model.precision == "paired":
        model = model.clone(precision="bfloat16")
    generated, counts, finite = jax.device_get(
        _greedy(model, max_new_tokens, base, lora, tokens, lengths, np.array(ends, np.int32))
    )
    check_finite(bool(finite), "logits", model.config, base, lora, name)
    return [ids[:count].tolist() for ids, count in zip(generated, counts, strict=True)]


@partial(jax.jit, static_argnums=(0, 1))
def _greedy(model: Llama, max_new_tokens: int, base: Base, lora: Lora, prompts, lengths, ends) -> tuple[jax.Array, ...]:
    """Returns tokens [B, max_new_tokens], how many of them are valid [B], and whether all their logits were finite.

    Prompts [B, P] are padded on the right; their lengths are [B].
    """
    decoder = Decoder(model.config, model.lora_scale, model.precision, trained=model.trained)
    batch, width = prompts.shape
    cache = empty_cache(model.config, batch, width + max_new_tokens)
    start = jnp.zeros(batch, jnp.int32)

    def next_token(tokens, cache, start, last):
        logits, cache = decoder.apply({"params": base}, tokens, lora, cache, start, last)  # pyright: ignore
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.isfinite(logits).all(axis=-1), cache

    def step(state):
        i, token, is_finite, all_finite, generated, counts, cache = state
        is_running = counts == i
        all_finite &= jnp.all(is_finite | ~is_running)
        generated = generated.at[:, i].set(jnp.where(is_running, token, 0))
        counts = counts + is_running
        has_ended = jnp.any(token[:, None] == ends, axis=-1)
        # A text that has ended continues in its own slots, but its tokens are not read and its count stays.
        token, is_finite, cache = next_token(token[:, None], cache, lengths + i, jnp.zeros(batch, jnp.int32))
        counts = jnp.where(is_running & has_ended, -counts, counts)
        return i + 1, token, is_finite, all_finite, generated, counts, cache

    def unfinished(state):
        i, *_, counts, _ = state
        return (i < max_new_tokens) & jnp.any(counts == i)

    token, is_finite, cache = next_token(prompts, cache, start, lengths - 1)
    counts = jnp.zeros(batch, jnp.int32)
    state = (
        jnp.int32(0),
        token,
        is_finite,
        jnp.bool_(True),
        jnp.zeros((batch, max_new_tokens), jnp.int32),
        counts,
        cache,
    )
    *_, all_finite, generated, counts, _ = jax.lax.while_loop(unfinished, step, state)
    return generated, jnp.abs(counts), all_finite
