"""The loss against a plain cross-entropy and Hugging Face's, the layer-wise pair against the tree, paired precision."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import make_goldens
import numpy as np
import pytest
from llama_cases import golden, load, random_lora, random_rows

from fedmezo_jax.core import mezo
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.llama import head
from fedmezo_jax.llama.loss import loss_of, loss_sums, pair_loss_of
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.precision import PAIR, Products, frozen_product

CASES = ("2 key/value heads, untied", "1 key/value heads, tied")
SCALE = 1.75


def cross_entropy(logits, rows):
    """The mean of −log softmax over the labels that count, in float64 and with loops."""
    logits, found = np.asarray(logits, np.float64), []
    for row in range(len(rows.tokens)):
        for position, label, weight in zip(*(leaf[row] for leaf in rows[1:]), strict=True):
            if weight:
                scores = logits[row, position]
                found.append(np.log(np.exp(scores).sum()) - scores[label])
    return sum(found) / len(found)


@pytest.mark.parametrize(("case", "width"), [(CASES[0], 61), (CASES[0], 23), (CASES[1], 8), (CASES[1], 1)])
def test_loss_is_the_mean_cross_entropy_of_the_labels(case, width, monkeypatch):
    monkeypatch.setattr(head, "_BLOCK", width)  # 61 tokens: one block, blocks that overlap, single
    config, base = load(case)
    model, lora, rows = Llama(config, SCALE), random_lora(config, ("q_proj", "up_proj")), random_rows(3)
    logits = jax.jit(model.apply)({"params": base}, rows.tokens, lora)
    expected = cross_entropy(logits, rows)
    np.testing.assert_allclose(jax.jit(loss_of(model, base))(lora, rows), expected, rtol=1e-6)


def test_sums_over_parts_of_a_batch_add_up():
    """What the evaluation relies on: a row without weight adds nothing, and rows count by their labels."""
    config, base = load(CASES[0])
    rows, sums = random_rows(4), jax.jit(partial(loss_sums, Llama(config)))
    first = np.array([1, 1, 0, 0], np.float32)[:, None] * rows.label_weights
    parts = [sums(base, {}, rows._replace(label_weights=part)) for part in (first, rows.label_weights - first)]
    whole = sums(base, {}, rows)
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)
    assert whole[1] == rows.label_weights.sum()
    assert sums(base, {}, rows._replace(label_weights=0 * first)) == (0, 0)


def test_full_logits_never_exist(monkeypatch):
    config, base = load(CASES[0])
    monkeypatch.setattr(head, "_BLOCK", 16)
    model, lora, rows = Llama(config), random_lora(config, ("q_proj",)), random_rows(3, labels=5)
    for function in (loss_of(model, base), jax.grad(loss_of(model.clone(checkpointed=True), base))):
        text = str(jax.make_jaxpr(function)(lora, rows))
        assert "f32[15,16]" in text
        assert not re.search(r"f32\[[\d,]*,61\]", text.replace("f32[32,61]", ""))  # the head itself


def labelled_rows(case):
    """The reference's -100 convention as rows: the label at t is predicted at t − 1."""
    given = make_goldens.inputs(case)
    places = [np.flatnonzero(row != -100) for row in given["labels"]]
    width = max(map(len, places))

    def padded(values):
        return np.stack([np.pad(value, (0, width - len(value))) for value in values])

    labels = padded([row[place] for row, place in zip(given["labels"], places, strict=True)])
    weights = padded([np.ones(len(place), np.float32) for place in places])
    positions = padded([place - 1 for place in places])
    return TokenBatch(given["tokens"], positions.astype(np.int32), labels.astype(np.int32), weights)


def test_loss_equals_hugging_face_s():
    """As stored; ``test_llama_model`` compares what is stored with Hugging Face's where PyTorch is there."""
    config, base = load(CASES[1])
    found = jax.jit(loss_of(Llama(config), base))({}, labelled_rows(CASES[1]))
    np.testing.assert_allclose(found, golden(CASES[1])["loss"], rtol=1e-6)


# The pair of losses


def direction(seed=4, scale=0.1, distribution="gaussian"):
    return mezo.Perturbation(jax.random.key(seed, impl="threefry2x32"), jnp.float32(scale), distribution)


def test_layer_wise_pair_equals_the_moved_tree():
    config, base = load(CASES[0])
    model, lora, rows = Llama(config, SCALE), random_lora(config, ("q_proj", "down_proj")), random_rows(3)
    moves = direction(distribution="rademacher")
    found = jax.jit(pair_loss_of(model, base))(lora, rows, moves)
    loss = jax.jit(loss_of(model, base))
    np.testing.assert_allclose(found, mezo.pair_loss_of(loss)(lora, rows, moves), rtol=0, atol=1e-6)
    still = loss(lora, rows)
    assert min(abs(found[0] - found[1]), abs(found[0] - still), abs(found[1] - still)) > 1e-3


def test_each_layer_s_direction_is_its_row_of_the_tree_s():
    """Bit for bit, where the losses above could only show it to rounding."""
    zeros = jax.tree.map(np.zeros_like, random_lora(load(CASES[0])[0], ("q_proj", "down_proj")))
    whole = jax.jit(mezo.shift)(zeros, direction(scale=1.0))
    shift_row = jax.jit(mezo.shift_row)
    for layer in range(2):
        share = jax.tree.map(lambda leaf, layer=layer: leaf[layer], (zeros, whole))
        row = shift_row(share[0], direction(scale=1.0), layer)
        jax.tree.map(np.testing.assert_array_equal, row, share[1])


@pytest.mark.parametrize("precision", ["float32", "paired"])
def test_clients_side_by_side_have_the_losses_of_each_alone(precision):
    config, base = load(CASES[0])
    pair_loss = pair_loss_of(Llama(config, SCALE, precision), base)
    rows, loras = random_rows(4, 3), [random_lora(config, ("v_proj",), seed=seed) for seed in range(4)]
    keys = jnp.stack([direction(seed).key for seed in range(4)])

    def of_one(lora, rows, key):
        return jnp.stack(pair_loss(lora, rows, mezo.Perturbation(key, 0.1)))

    found = jax.jit(jax.vmap(of_one))(jax.tree.map(lambda *leaves: np.stack(leaves), *loras), rows, keys)
    one = jax.jit(of_one)
    alone = [one(lora, TokenBatch(*(leaf[i] for leaf in rows)), keys[i]) for i, lora in enumerate(loras)]
    # Float32 rounding that differs can move an input of a bfloat16 product to the next bfloat16.
    np.testing.assert_allclose(found, np.stack(alone), rtol=0, atol=1e-6 if precision == "float32" else 1e-4)
    assert np.ptp(found[:, 0]) > 1e-2


# Precision


def slopes(precision, scale=3e-4):
    """Projected gradients (L₊ − L₋)/2μ along one and the same 16 directions."""
    config, base = load(CASES[0], "bfloat16")
    lora, rows = random_lora(config, ("v_proj",)), random_rows(3)
    pair_loss = pair_loss_of(Llama(config, SCALE, precision), base)

    def slope(seed):
        plus, minus = pair_loss(lora, rows, mezo.Perturbation(jax.random.key(seed, impl="threefry2x32"), scale))
        return (plus - minus) / (2 * scale)

    return jax.jit(partial(jax.lax.map, slope))(jnp.arange(16))


def test_pairing_removes_most_of_bfloat16_s_error():
    """Measured 142 % and 1.5 %; the rounding of the base's own weights is in all three."""
    exact, plain, paired = (slopes(kind) for kind in ("float32", "bfloat16", "paired"))
    plain, paired = (np.linalg.norm(found - exact) / np.linalg.norm(exact) for found in (plain, paired))
    assert paired < 0.03
    assert plain > 20 * paired


def test_pairing_changes_nothing_where_nothing_is_rounded():
    """Small even numbers: their means, half-differences and products are exact in bfloat16 and float32."""
    draw = np.random.RandomState(0)
    x, kernel = 2.0 * draw.randint(-16, 17, (2, 3, 5, 8)), draw.randint(-8, 9, (8, 6)).astype(np.float64)
    found = jax.vmap(lambda x: frozen_product(x, kernel, Products("paired")), axis_name=PAIR)(jnp.float32(x))
    np.testing.assert_array_equal(found, x @ kernel)
