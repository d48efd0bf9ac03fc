"""Attention in strips and blocks against the definition, written with loops; its memory grows with length alone."""

import jax
import numpy as np
import pytest

from fedmezo_jax.llama import attention as attention_module
from fedmezo_jax.llama.attention import causal_attention


def heads(length, seed=0):
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(2, length, count, 8)).astype(np.float32) for count in (6, 3, 3))


def by_definition(query, key, value):
    """softmax over the keys up to each query's position, one query after another, in float64."""
    query, key, value = (np.float64(given) for given in (query, key, value))
    mixed = np.empty_like(query)
    for row, position, head in np.ndindex(query.shape[:3]):
        past, shared = slice(0, position + 1), head // (query.shape[2] // key.shape[2])
        scores = key[row, past, shared] @ query[row, position, head] / np.sqrt(query.shape[3])
        weights = np.exp(scores - scores.max())
        mixed[row, position, head] = weights @ value[row, past, shared] / weights.sum()
    return mixed


@pytest.mark.parametrize("length", [1, 32, 33, 50, 128, 131])
def test_attention_is_what_it_is_defined_to_be(length, monkeypatch):
    monkeypatch.setattr(attention_module, "_QUERY_BLOCK", 12)  # strips of 32 and 33 queries: whole and ragged blocks
    found = jax.jit(causal_attention)(*heads(length))
    np.testing.assert_allclose(found, by_definition(*heads(length)), rtol=0, atol=1e-5)


def test_blocks_change_no_gradient(monkeypatch):
    def gradients():
        function = jax.grad(lambda *given: (causal_attention(*given) ** 2).sum(), argnums=(0, 1, 2))
        return jax.jit(function)(*heads(40))

    whole = gradients()
    monkeypatch.setattr(attention_module, "_QUERY_BLOCK", 7)
    for found, expected in zip(gradients(), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_memory_is_linear_in_length():
    def temporary(length):
        given = [jax.ShapeDtypeStruct((1, length, count, 8), np.float32) for count in (4, 4, 4)]
        return jax.jit(causal_attention).lower(*given).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.2 * temporary(2048)
