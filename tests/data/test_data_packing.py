"""Packed examples: where their tokens and labels stand, and at which shapes packed steps run."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_data import table

from fedmezo_jax.data.buckets import Width, bucketed_loss, computed_tokens, filling_lengths, packed_widths, step_width
from fedmezo_jax.data.examples import HiddenBatch, TokenBatch
from fedmezo_jax.data.packing import pack

ROWS = TokenBatch(
    np.array([[11, 12, 13, 0], [21, 22, 0, 0], [31, 32, 33, 34]], np.int32),
    np.array([[0, 1], [0, 0], [1, 2]], np.int32),
    np.array([[12, 13], [22, 0], [33, 34]], np.int32),
    np.array([[1, 1], [1, 0], [1, 1]], np.float32),
)


def test_packed_examples_by_hand():
    packed = pack(ROWS, (12, 8))
    assert packed.inputs.shape == (1, 12)
    assert packed.inputs[0, :9].tolist() == [11, 12, 13, 21, 22, 31, 32, 33, 34]
    assert packed.layout.example[:9].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert packed.layout.position[:9].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert packed.label_positions.tolist() == [0, 1, 3, 6, 7, 0, 0, 0]
    assert packed.labels[:5].tolist() == [12, 13, 22, 33, 34]
    assert packed.label_weights.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert packed.layout.spread(packed.inputs)[1, :2].tolist() == [21, 22]
    assert packed.layout.spread(packed.inputs)[2].tolist() == [31, 32, 33, 34]


@pytest.mark.parametrize(
    ("given", "spare", "hidden"),
    [([24], 0, False), ([2, 2, 2], 0, False), ([9, 24, 2, 13], 9, False), ([17, 5], 3, True)],
)
def test_each_example_comes_back_and_each_label_keeps_its_token(given, spare, hidden):
    rows = table(given)
    if hidden:
        states = np.random.default_rng(2).standard_normal((*rows.tokens.shape, 3)).astype(np.float32)
        rows = HiddenBatch(states, *rows[1:])
    count = int(rows.label_weights.sum())
    packed = pack(rows, (sum(given) + spare, count + spare))
    for i, length in enumerate(given):
        np.testing.assert_array_equal(packed.layout.spread(packed.inputs)[i, :length], rows[0][i, :length])
    used = rows.label_weights > 0
    np.testing.assert_array_equal(packed.labels[:count], rows.labels[used])
    before_label = np.take_along_axis(rows[0].reshape(*rows[0].shape[:2], -1), rows.label_positions[..., None], 1)
    np.testing.assert_array_equal(
        packed.inputs.reshape(packed.inputs.shape[1], -1)[packed.label_positions[:count]], before_label[used]
    )
    assert packed.label_weights.sum() == count


@given(st.lists(st.integers(2, 64), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 9), st.integers(1, 4))
def test_packed_widths_hold_any_batch(given, batch_size, clients, buckets):
    rows = table(given)
    shapes = packed_widths(rows, batch_size, clients, buckets)
    assert 1 <= len(shapes) <= buckets
    assert list(shapes) == sorted(set(shapes))
    assert all(size % 8 == 0 for shape in shapes for size in shape)
    assert all(one.labels <= other.labels for one, other in pairwise(shapes))
    assert shapes[-1] == (batch_size * rows.tokens.shape[1], batch_size * rows.labels.shape[1])


def test_a_frequent_total_has_a_shape_of_its_own():
    rows = table([10] * 99 + [60])
    assert packed_widths(rows, 4, 1, 2) == (Width(40, 16), Width(256, 96))  # 3 labels in 10 tokens; S = 64, M = 24
    assert packed_widths(rows, 4, 1, 1) == (Width(256, 96),)


SHAPES = (Width(16, 4), Width(24, 8), Width(48, 16))


@pytest.mark.parametrize(
    ("given", "expected"), [([8, 8], 0), ([9, 8], 1), ([12, 2], 1), ([12, 12], 1), ([24, 2], 2), ([24, 24], 2)]
)
def test_a_step_runs_at_the_first_shape_that_holds_its_tokens_and_labels(given, expected):
    rows = table(given)
    rows.label_weights[:] = np.arange(rows.labels.shape[1]) < (4 if given == [12, 2] else 2)
    if given == [12, 2]:  # five labels and 14 tokens
        rows.label_weights[1] = np.arange(rows.labels.shape[1]) < 1
    width_of = bucketed_loss(lambda params, packed: params * packed.inputs.shape[1], SHAPES, packed=True)
    on_device = jax.tree.map(jnp.asarray, rows)
    assert width_of(jnp.float32(1), on_device) == SHAPES[expected].tokens
    picks = np.arange(len(given))[None, None]
    assert step_width(rows, picks, SHAPES, packed=True).tolist() == [[expected]]
    assert computed_tokens(rows, picks, SHAPES, packed=True) == (sum(given), SHAPES[expected].tokens)


@pytest.mark.parametrize("packed", [False, True])
def test_examples_that_fill_a_width_need_it(packed):
    shapes = (Width(18, 4), Width(25, 4), Width(48, 8)) if packed else (Width(8, 4), Width(16, 4), Width(24, 8))
    tokens = np.array([shape.tokens for shape in shapes], np.int32)
    for index, filled in enumerate(filling_lengths(tokens, 2, 24, packed).tolist()):
        rows = table([*filled, 24])
        rows.label_weights[:] = np.arange(rows.labels.shape[1]) < 2
        assert step_width(rows, np.array([[[0, 1]]]), shapes, packed).tolist() == [[index]]


def test_clients_under_vmap_run_at_the_widest_shape_that_any_needs():
    rows = table([8, 8, 24, 24])
    batches = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(2, 2, -1), rows)
    width_of = bucketed_loss(lambda params, packed: params * packed.inputs.shape[1], SHAPES, packed=True)
    assert jax.vmap(width_of, (None, 0))(jnp.float32(1), batches).tolist() == [48, 48]
    picks = np.array([[[0, 1]], [[2, 3]]])
    assert step_width(rows, picks, SHAPES, packed=True).tolist() == [[0], [2]]
    assert computed_tokens(rows, picks, SHAPES, packed=True) == (64, 96)
