"""Packed examples: the same losses and slopes as rows of their own, in every family, and none sees another."""

import chex
import jax
import jax.numpy as jnp
import make_goldens
import numpy as np
import pytest
from llama_cases import load, random_lora, random_rows

from fedmezo_jax.core import mezo
from fedmezo_jax.data.examples import HiddenBatch
from fedmezo_jax.data.packing import pack
from fedmezo_jax.llama.loss import label_scores, loss_of, pair_loss_of, point_loss_of
from fedmezo_jax.llama.model import Llama

CASES = [*make_goldens.CASES, *make_goldens.FAMILY_CASES]
SHAPE = (72, 48)  # of five rows of at most 16 tokens: up to 70 tokens and 45 labels


def rows_of(seed=0):
    """Five rows with lengths of their own, and labels that stand before the padding."""
    rows, draw = random_rows(5), np.random.default_rng(seed)
    lengths = draw.integers(4, 15, 5)
    positions = rows.label_positions % (lengths[:, None] - 1)
    return rows._replace(label_positions=np.where(rows.label_weights > 0, positions, 0).astype(np.int32))


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_rows_of_their_own(case):
    config, base = load(case)
    rows, loss = rows_of(), jax.jit(loss_of(Llama(config, 1.75), base))
    lora = random_lora(config)
    np.testing.assert_allclose(loss(lora, pack(rows, SHAPE)), loss(lora, rows), rtol=1e-6)


def test_its_gradient_too():
    config, base = load(CASES[0])
    rows, lora = rows_of(), random_lora(config, ("q_proj", "down_proj"))
    gradient = jax.jit(jax.grad(loss_of(Llama(config, 1.75), base)))
    expected, found = gradient(lora, rows), gradient(lora, pack(rows, SHAPE))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-6 * largest)


def test_the_losses_around_theta_too():
    config, base = load(CASES[0])
    model, lora, rows = Llama(config, 1.75), random_lora(config), rows_of()
    perturbation = mezo.Perturbation(jax.random.key(1), 0.02)
    for loss in (pair_loss_of(model, base), point_loss_of(model, base)):
        expected = jax.jit(loss)(lora, rows, perturbation)
        np.testing.assert_allclose(jax.jit(loss)(lora, pack(rows, SHAPE), perturbation), expected, rtol=1e-6)


def test_hidden_states_are_packed_as_tokens_are():
    config, base = load(CASES[0])
    last = config.num_hidden_layers - 1
    model = Llama(config, 1.75, trained=(last,))
    lora, rows = jax.tree.map(lambda leaf: leaf[-1:], random_lora(config)), rows_of()
    hidden = model.apply({"params": base}, rows.tokens, method="prefix")
    assert isinstance(hidden, jax.Array)
    packed = pack(HiddenBatch(hidden, *rows[1:]), SHAPE)
    loss = jax.jit(loss_of(model, base))
    np.testing.assert_allclose(loss(lora, packed), loss(lora, rows), rtol=1e-6)


def test_no_example_sees_another():
    config, base = load(CASES[0])
    model, lora, rows = Llama(config, 1.75), random_lora(config), rows_of()
    other = rows._replace(tokens=np.concatenate([(rows.tokens[:2] + 7) % 61, rows.tokens[2:]]))
    one, another = (np.asarray(label_scores(model, base, lora, pack(each, SHAPE))[0]) for each in (rows, other))
    changed = int(rows.label_weights[:2].sum())
    used = int(rows.label_weights.sum())
    assert np.all(one[:changed] != another[:changed])
    np.testing.assert_array_equal(one[changed:used], another[changed:used])


def test_padding_shows_in_no_loss():
    config, base = load(CASES[0])
    model, lora, rows = Llama(config, 1.75), random_lora(config), rows_of()
    packed = pack(rows, SHAPE)
    used = int(np.sum(rows.label_positions.max(axis=1) + 2))
    filled = packed._replace(inputs=packed.inputs.at[0, used:].set(60))
    assert jnp.any(filled.inputs != packed.inputs)
    loss = jax.jit(loss_of(model, base))
    assert loss(lora, filled) == loss(lora, packed)
