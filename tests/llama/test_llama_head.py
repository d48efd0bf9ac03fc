"""The head's losses and their tangents against a plain cross-entropy's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fedmezo_jax.llama import head

R, D, V = 5, 8, 61
DRAW = np.random.default_rng(0)
X, TABLE = DRAW.standard_normal((R, D)).astype(np.float32), DRAW.standard_normal((V, D)).astype(np.float32)
LABELS = DRAW.integers(0, V, R).astype(np.int32)
TANGENTS = DRAW.standard_normal((7, R, D)).astype(np.float32)
BLOCKS = (61, 23, 8, 1)  # one block, blocks that overlap, single tokens


def plain(x, table):
    logits = jnp.matmul(x, table.T, precision="highest")
    return jax.nn.logsumexp(logits, axis=-1) - logits[jnp.arange(R), LABELS]


def losses(tied, x, table, precision="float32"):
    return head.label_losses(x, table if tied else table.T, LABELS, tied, precision)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("width", BLOCKS)
def test_tangents_are_those_of_a_plain_cross_entropy(tied, width, monkeypatch):
    monkeypatch.setattr(head, "_BLOCK", width)

    def along(function):
        return jax.vmap(lambda t: jax.jvp(lambda x: function(x, TABLE), (X,), (t,)), out_axes=(None, 0))(TANGENTS)

    for found, expected in zip(along(partial(losses, tied)), along(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("argnums", [0, 1, (0, 1)], ids=["hidden states", "base", "both"])
def test_gradients_are_those_of_a_plain_cross_entropy(tied, argnums, monkeypatch):
    monkeypatch.setattr(head, "_BLOCK", 23)
    weights = np.linspace(1, 2, R)
    found, expected = (
        jax.grad(lambda x, table, each=each: jnp.sum(weights * each(x, table)), argnums)(X, TABLE)
        for each in (partial(losses, tied), plain)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, expected)


def test_second_derivatives_are_right(monkeypatch):
    monkeypatch.setattr(head, "_BLOCK", 23)
    check_grads(lambda x: losses(True, x, TABLE), (X,), order=2, modes=["fwd", "rev"], atol=0.05, rtol=0.05)

    def curvature(function):
        slope = jax.grad(lambda x: jnp.sum(function(x, TABLE)))
        return jax.jvp(slope, (X,), (TANGENTS[0],))[1]

    np.testing.assert_allclose(curvature(partial(losses, True)), curvature(plain), rtol=1e-4, atol=1e-4)


def test_tangents_in_bfloat16_are_near():
    def slopes(function):
        return np.asarray(jax.vmap(lambda t: jax.jvp(lambda x: function(x, TABLE), (X,), (t,))[1])(TANGENTS))

    error = slopes(partial(losses, True, precision="bfloat16")) - slopes(plain)
    assert 0 < np.linalg.norm(error) < 0.02 * np.linalg.norm(slopes(plain))


def test_no_tangent_has_logits_of_its_own(monkeypatch):
    monkeypatch.setattr(head, "_BLOCK", 23)

    def along(tangents):
        return jax.vmap(lambda t: jax.jvp(lambda x: losses(True, x, TABLE), (X,), (t,))[1])(tangents)

    text = str(jax.make_jaxpr(along)(TANGENTS))
    width = -(-V // 3)
    assert f"f32[{R},{width}]" in text
    assert f"f32[7,{R},{width}]" not in text
