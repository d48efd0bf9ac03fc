"""Adapters on some of the layers: which ones, what they compute, and what lies below them."""

import jax
import numpy as np
import pytest
from llama_cases import load, random_lora, random_rows

from fedmezo_jax.core import mezo
from fedmezo_jax.data.examples import HiddenBatch
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.lora import init_lora, lora_shapes, parse_layers, spread
from fedmezo_jax.llama.loss import loss_of, pair_loss_of, point_loss_of
from fedmezo_jax.llama.model import Llama

CASE, KEY = "2 key/value heads, untied", jax.random.key(5, impl="threefry2x32")


def model_of(config, trained=None):
    return Llama(config, 1.75, trained=trained)


def some_layers(count):
    """Every kind of set: all, the last, the first, one in the middle, and two that are apart."""
    return sorted({tuple(range(count)), (count - 1,), (0,), (count // 2,), (0, count - 1)})


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("all", 3, (0, 1, 2)),
        ("last:2", 5, (3, 4)),
        ("last:40%", 5, (3, 4)),
        ("last:40%", 30, tuple(range(18, 30))),
        ("last:1%", 5, (4,)),
        ("first:100%", 2, (0, 1)),
        ("first:2", 5, (0, 1)),
        ("1-3", 5, (1, 2, 3)),
        ("4", 5, (4,)),
        ("every:2", 5, (0, 2, 4)),
        ("every:3", 8, (1, 4, 7)),
        ("first:1, last:1", 5, (0, 4)),
        ("2-3,3,last:1", 5, (2, 3, 4)),
    ],
)
def test_what_the_option_means(layers, count, expected):
    assert parse_layers(layers, count) == expected


@pytest.mark.parametrize(
    "layers",
    [
        "",
        "last",
        "last:0",
        "last:6",
        "5",
        "3-2",
        "-1",
        "every:x",
        "1-",
        "all:2",
        "last:0%",
        "last:101%",
        "every:10%",
        "9" * 30,
    ],
)
def test_what_it_cannot_mean(layers):
    with pytest.raises(UserError, match="--layers"):
        parse_layers(layers, 5)


def test_frozen_layers_have_no_parameters():
    config, _ = load(CASE)
    trained = (config.num_hidden_layers - 1,)
    lora = init_lora(KEY, config, 4, ("q_proj", "up_proj"), trained)
    assert jax.tree.map(np.shape, lora) == lora_shapes(config, 4, ("q_proj", "up_proj"), trained)
    assert lora["q_proj"]["A"].shape == (1, config.hidden_size, 4)


@pytest.mark.parametrize("index", range(5))
def test_some_layers_equal_all_layers_with_zeros_elsewhere(index):
    """Loss and pair loss, of which the model of all layers is checked against Hugging Face."""
    config, base = load(CASE)
    sets = some_layers(config.num_hidden_layers)
    trained = sets[index % len(sets)]
    rows, every = random_rows(3), random_lora(config, ("q_proj", "v_proj", "down_proj"))
    lora = jax.tree.map(lambda leaf: leaf[np.array(trained)], every)
    whole = spread(lora, trained, config.num_hidden_layers)
    for name, halves in every.items():
        frozen = np.setdiff1d(np.arange(config.num_hidden_layers), trained)
        np.testing.assert_array_equal(whole[name]["A"][np.array(trained)], halves["A"][np.array(trained)])
        assert not np.any(np.asarray(whole[name]["B"])[frozen])
    model = model_of(config, trained)
    expected = jax.jit(loss_of(model_of(config), base))(whole, rows)
    np.testing.assert_allclose(jax.jit(loss_of(model, base))(lora, rows), expected, rtol=1e-6)
    direction = mezo.Perturbation(KEY, 1e-2)
    plus, minus = jax.jit(pair_loss_of(model, base))(lora, rows, direction)
    for found, moved in ((plus, mezo.shift(lora, direction)), (minus, mezo.shift(lora, -direction))):
        there = spread(moved, trained, config.num_hidden_layers)
        np.testing.assert_allclose(found, jax.jit(loss_of(model_of(config), base))(there, rows), rtol=1e-6)


def test_the_prefix_can_be_computed_once_and_then_left_out():
    """From hidden states, without the embedding and the layers below, the same loss bit for bit."""
    config, base = load(CASE)
    first = config.num_hidden_layers - 1
    model, rows = model_of(config, (first,)), random_rows(3)
    lora = jax.tree.map(lambda leaf: leaf[first:], random_lora(config, ("q_proj",)))
    expected = jax.jit(loss_of(model, base))(lora, rows)
    below = jax.jit(lambda base, tokens: model.apply({"params": base}, tokens, method="prefix"))(base, rows.tokens)
    rest = {name: weights for name, weights in base.items() if name != "embed_tokens"}
    rest["layers"] = jax.tree.map(lambda leaf: leaf[first:], base["layers"])
    assert not config.tie_word_embeddings
    hidden = HiddenBatch(below, *rows[1:])
    np.testing.assert_array_equal(jax.jit(loss_of(model, rest))(lora, hidden), expected)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("trained", [None, (1,)])
def test_tangents_are_the_directional_derivatives_of_back_propagation(trained, distribution):
    """⟨∇L, z⟩ to 1e-5 of the gradient's size, with z from the update; and the loss is that at θ itself."""
    config, base = load(CASE)
    model, rows = model_of(config, trained), random_rows(3)
    lora = random_lora(config, ("q_proj", "o_proj"))
    lora = lora if trained is None else jax.tree.map(lambda leaf: leaf[np.array(trained)], lora)
    point_loss = point_loss_of(model, base)

    def slope(scale):
        return point_loss(lora, rows, mezo.Perturbation(KEY, scale, distribution, tangent=True))

    value, found = jax.jit(lambda: jax.jvp(slope, (0.0,), (1.0,)))()
    expected, gradient = jax.jit(jax.value_and_grad(loss_of(model, base)))(lora, rows)
    zeros = jax.tree.map(np.zeros_like, lora)
    z = mezo.shift(zeros, mezo.Perturbation(KEY, 1.0, distribution))
    inner = sum(
        np.vdot(np.float64(a), np.float64(b)) for a, b in zip(*map(jax.tree.leaves, (gradient, z)), strict=True)
    )
    size = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(gradient)))
    assert abs(found - inner) < 1e-5 * size
    np.testing.assert_allclose(value, expected, rtol=1e-6)
