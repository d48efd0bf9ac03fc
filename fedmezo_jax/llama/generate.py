"""Greedy generation, batched and under one ``jit``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checks import check_finite, check_ids
from fedmezo_jax.llama.decode import Cache, Decoder, empty_cache
from fedmezo_jax.llama.model import Base, Llama, Lora

_MULTIPLE = 16
"""Prompts are padded to a multiple of this, so that batches of similar length share a compiled program."""
_ASKED_EVERY = 16
"""Tokens between two calls of ``is_complete``."""


class _State(NamedTuple):
    """Texts of which some tokens are generated.

    Attributes:
        step: int32 scalar, tokens generated so far.
        token: int32 [B], the next token of each text.
        is_finite: bool [B], whether the logits of ``token`` were finite.
        all_finite: bool scalar, whether all logits of the generated tokens were finite.
        generated: int32 [B, max_new_tokens], the tokens so far.
        counts: int32 [B], how many of them belong to the text; negative once the text has ended.
        cache: keys and values of all tokens before ``token``.
    """

    step: jax.Array
    token: jax.Array
    is_finite: jax.Array
    all_finite: jax.Array
    generated: jax.Array
    counts: jax.Array
    cache: Cache


def generate(
    model: Llama,
    base: Base,
    lora: Lora,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    ends: Sequence[int] | None = None,
    name: str = "the model",
    is_complete: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continues each prompt with the most likely next token, greedily.

    A text ends with the first token of ``ends``, which is included, after ``max_new_tokens``, or where ``is_complete``
    says so. Padding is not attended to, so each prompt gets the same tokens as it would alone.

    Args:
        model: the decoder; precision ``paired`` becomes ``bfloat16``.
        base: its frozen weights.
        lora: θ, or ``{}`` for the base alone.
        prompts: token ids, at least one per prompt.
        max_new_tokens: most tokens in a result.
        ends: token ids that end a text; by default the config's ``eos_token_id``.
        name: what error messages call the model.
        is_complete: says of the new tokens of a text whether it needs no more, as where they contain a stop sequence.
            It is asked every few tokens, so a text may go on beyond that place.

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
    state = _prompted(model, max_new_tokens, base, lora, tokens, lengths)
    stops = [] if is_complete is None else range(_ASKED_EVERY, max_new_tokens, _ASKED_EVERY)
    for stop in (*stops, max_new_tokens):
        state = _greedy(model, base, lora, state, lengths, np.array(ends, np.int32), stop)
        generated, counts = jax.device_get((state.generated, state.counts))
        if is_complete is not None:
            counts = [
                -count if count > 0 and is_complete(ids[:count].tolist()) else count
                for ids, count in zip(generated, counts, strict=True)
            ]
            state = state._replace(counts=np.array(counts, np.int32))
        if np.max(counts) < 0:
            break
    check_finite(bool(state.all_finite), "logits", model.config, base, lora, name)
    return [ids[: abs(count)].tolist() for ids, count in zip(generated, counts, strict=True)]


@partial(jax.jit, static_argnums=(0, 1))
def _prompted(model: Llama, max_new_tokens: int, base: Base, lora: Lora, prompts, lengths) -> _State:
    """Returns the state before the first new token. Prompts [B, P] are padded on the right; their lengths are [B]."""
    batch, width = prompts.shape
    cache = empty_cache(model.config, batch, width + max_new_tokens)
    start = jnp.zeros(batch, jnp.int32)
    token, is_finite, cache = _next_token(model, base, lora, prompts, cache, start, lengths - 1)
    return _State(
        jnp.int32(0),
        token,
        is_finite,
        jnp.bool_(True),
        jnp.zeros((batch, max_new_tokens), jnp.int32),
        jnp.zeros(batch, jnp.int32),
        cache,
    )


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _greedy(model: Llama, base: Base, lora: Lora, state: _State, lengths, ends, stop) -> _State:
    """Returns the state with ``stop`` tokens generated, or with fewer where all texts have ended."""

    def step(state: _State) -> _State:
        i, token, is_finite, all_finite, generated, counts, cache = state
        is_running = counts == i
        all_finite &= jnp.all(is_finite | ~is_running)
        generated = generated.at[:, i].set(jnp.where(is_running, token, 0))
        counts = counts + is_running
        has_ended = jnp.any(token[:, None] == ends, axis=-1)
        # A text that has ended continues in its own slots, but its tokens are not read and its count stays.
        token, is_finite, cache = _next_token(
            model, base, lora, token[:, None], cache, lengths + i, jnp.zeros_like(lengths)
        )
        counts = jnp.where(is_running & has_ended, -counts, counts)
        return _State(i + 1, token, is_finite, all_finite, generated, counts, cache)

    def unfinished(state: _State):
        return (state.step < stop) & jnp.any(state.counts == state.step)

    return jax.lax.while_loop(unfinished, step, state)


def _next_token(model: Llama, base: Base, lora: Lora, tokens, cache: Cache, start, last):
    """Returns the next token of each text [B], whether its logits were finite [B], and the cache with ``tokens``."""
    decoder = Decoder(model.config, model.lora_scale, model.precision, eight_bit=model.eight_bit, trained=model.trained)
    logits, cache = decoder.apply({"params": base}, tokens, lora, cache, start, last)  # pyright: ignore
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.isfinite(logits).all(axis=-1), cache
