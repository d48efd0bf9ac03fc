"""The tangents of a layer one after the other: exact, the same for any number of clients, and in less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from llama_cases import load, random_lora, random_rows

from fedmezo_jax.core import mezo
from fedmezo_jax.core.estimators import BackwardGradient, ForwardGradient
from fedmezo_jax.data.packing import pack
from fedmezo_jax.llama import tangents
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import init_lora
from fedmezo_jax.llama.loss import loss_of, point_loss_of
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.precision import least_rows
from fedmezo_jax.llama.registry import TINY

CASE, KEY = "2 key/value heads, untied", jax.random.key(5, impl="threefry2x32")
ESTIMATOR = ForwardGradient(mezo.MezoConfig(directions=3, distribution="rademacher"))


@pytest.fixture
def in_a_loop(monkeypatch):
    monkeypatch.setattr(tangents, "LEAST_ROWS", 1)


def estimates(model, base, lora, rows, keys):
    """Losses ``[P]`` and slopes ``[P, n]`` of P clients."""
    one = partial(ESTIMATOR.estimate, point_loss_of(model, base), lora)
    found = jax.jit(jax.vmap(one))(rows, keys)
    return np.asarray(found.loss), np.asarray(found.projected_gradients)


def by_back_propagation(model, base, lora, rows, keys):
    """⟨∇L, z⟩ with z from the update, ``[P, n]``, and the sizes of the gradients, ``[P]``."""
    gradients = jax.jit(jax.vmap(jax.grad(loss_of(model, base)), (None, 0)))(lora, rows)
    zeros = jax.tree.map(np.zeros_like, lora)

    def flat(tree):
        return np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(tree)])

    own = [flat(jax.tree.map(lambda leaf, i=i: leaf[i], gradients)) for i in range(len(keys))]
    slopes = [
        [gradient @ flat(ESTIMATOR.apply(zeros, key, -each, 0.0)) for each in np.eye(3, dtype=np.float32)]
        for gradient, key in zip(own, keys, strict=True)
    ]
    return np.array(slopes), np.linalg.norm(own, axis=1)


@pytest.mark.parametrize(
    ("case", "trained"),
    [(CASE, None), (CASE, (1,)), ("mistral, window", (0, 2)), ("smollm3", None), ("qwen3", (1, 2))],
)
@pytest.mark.parametrize("packed", [False, True])
def test_slopes_are_those_of_back_propagation(in_a_loop, case, trained, packed):
    """To 1e-5 of the gradient's size, for two clients with directions of their own; layers without adapters between."""
    config, base = load(case)
    model, rows = Llama(config, 1.75, trained=trained), random_rows(2, 3)
    lora = random_lora(config, ("q_proj", "o_proj", "down_proj"))
    lora = lora if trained is None else jax.tree.map(lambda leaf: leaf[np.array(trained)], lora)
    if packed:
        order = np.sort(rows.label_positions, axis=-1)
        rows = rows._replace(label_positions=np.where(rows.label_weights > 0, order, 0).astype(np.int32))
        each = [pack(jax.tree.map(lambda leaf, i=i: leaf[i], rows), (56, 32)) for i in range(2)]
        rows = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    keys = jax.random.split(KEY, 2)
    expected, sizes = by_back_propagation(model, base, lora, rows, keys)
    _, found = estimates(model, base, lora, rows, keys)
    assert np.all(np.abs(found - expected) < 1e-5 * sizes[:, None])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_of_eight_bit_products_they_are_those_of_all_at_once_and_of_a_gradient(kind, monkeypatch):
    config = LlamaConfig.from_json(TINY)
    base = load_base(TINY, config, "float32", kind)
    model, rows = Llama(config, eight_bit=True), random_rows(2, 3)
    lora = jax.tree.map(lambda leaf: leaf + 0.01, init_lora(KEY, config, 4, ("up_proj",)))
    keys = jax.random.split(KEY, 2)
    losses, expected = estimates(model, base, lora, rows, keys)
    monkeypatch.setattr(tangents, "LEAST_ROWS", 1)
    again, found = estimates(model, base, lora, rows, keys)
    np.testing.assert_allclose(again, losses, rtol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    backward = partial(BackwardGradient(ESTIMATOR.config).estimate, loss_of(model, base), lora)
    by_gradient = jax.jit(jax.vmap(backward))(rows, keys).projected_gradients
    np.testing.assert_allclose(by_gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_client_alone_has_the_numbers_that_it_has_among_others():
    """Bit for bit, with two examples of 256 tokens."""
    config = LlamaConfig.from_json(TINY)
    base, rows = load_base(TINY, config, "float32"), random_rows(4, 2, length=256)
    lora, keys = init_lora(KEY, config, 4, ("up_proj", "down_proj")), jax.random.split(KEY, 4)

    def some(ids):
        model = Llama(config, least_rows=least_rows("float32", len(ids)))
        return estimates(model, base, lora, jax.tree.map(lambda leaf: leaf[ids], rows), keys[ids])

    among = some(np.arange(4))
    for ids in (np.array([2]), np.array([0, 3])):
        for alone, whole in zip(some(ids), among, strict=True):
            np.testing.assert_array_equal(alone, whole[ids])


def test_they_take_less_memory_where_examples_are_long(monkeypatch):
    """From 512 rows on. The tangents that exist at once are then no wider than the residual stream."""
    config = LlamaConfig.from_json(TINY)
    base, lora = load_base(TINY, config, "float32"), init_lora(KEY, config, 4, ("up_proj", "down_proj"))

    def temporary(rows):
        one = partial(ESTIMATOR.estimate, point_loss_of(Llama(config), base), lora)
        return jax.jit(one).lower(rows, KEY).compile().memory_analysis().temp_size_in_bytes

    short, long = random_rows(1, length=511), random_rows(1, length=512)
    assert temporary(long) < 0.75 * temporary(short)
    monkeypatch.setattr(tangents, "LEAST_ROWS", 10**6)
    assert temporary(long) > temporary(short)


def products_by_loop(jaxpr, shape, loops=0):
    """How many loops are around each product with a matrix of this shape."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and shape in [operand.aval.shape for operand in equation.invars]:
            yield loops
        for inner in jaxprs_in_params(equation.params):
            yield from products_by_loop(inner, shape, loops + (equation.primitive.name == "scan"))


@pytest.mark.parametrize(("least_rows", "of_tangents"), [(1, 2), (10**6, 1)], ids=["in a loop", "all at once"])
def test_a_layer_s_own_products_are_computed_once_for_all_directions(least_rows, of_tangents, monkeypatch):
    """Two of them are of the residual stream with an MLP's kernel: gate and up.

    The first layer has them alone: its tangents begin at the adapter of up. In the others, which a loop runs, there are
    the same two for each tangent, in one more loop or for all of them at once.
    """
    monkeypatch.setattr(tangents, "LEAST_ROWS", least_rows)
    config = LlamaConfig.from_json(TINY)
    base, lora = load_base(TINY, config, "float32"), init_lora(KEY, config, 4, ("up_proj", "down_proj"))
    one = partial(ESTIMATOR.estimate, point_loss_of(Llama(config), base), lora)
    program = jax.make_jaxpr(one)(jax.tree.map(jnp.asarray, random_rows(2)), KEY)
    kernel = (config.hidden_size, config.intermediate_size)
    assert sorted(products_by_loop(program.jaxpr, kernel)) == [0, 0, 1, 1, of_tangents, of_tangents]
