"""Length buckets: the widths, the loss at them, and what they do to a round's batches."""

from itertools import combinations, pairwise

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import Partial
from token_data import table

from fedmezo_jax.core import client, federated, mezo, personalization
from fedmezo_jax.data.batches import round_batches
from fedmezo_jax.data.buckets import Width, bucketed_loss, computed_tokens, lengths, widths
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import init_lora
from fedmezo_jax.llama.loss import pair_loss_of
from fedmezo_jax.llama.model import Llama


def least(given, widest, count):
    """The fewest tokens of all ways to choose `count` widths, by trying them."""
    offered = range(8, widest, 8)
    return min(
        sum(min(width for width in (*chosen, widest) if width >= length) for length in given)
        for chosen in combinations(offered, count - 1)
    )


@given(st.lists(st.integers(2, 64), min_size=1, max_size=30), st.integers(1, 4))
def test_widths_leave_the_least_padding_and_each_is_worth_its_program(given, buckets):
    rows = table(given)
    chosen = widths(rows, buckets)
    sizes = [width.tokens for width in chosen]
    widest = rows.tokens.shape[1]
    assert chosen[-1] == rows.tokens.shape[1:] + rows.labels.shape[1:]
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= buckets
    assert all(size % 8 == 0 for size in sizes)
    spent = sum(min(size for size in sizes if size >= length) for length in given)
    assert spent == least(given, widest, len(sizes))
    costs = [least(given, widest, count) for count in range(1, min(buckets, widest // 8) + 1)]
    worth = 1
    while worth < len(costs) and costs[worth] <= 0.95 * costs[worth - 1]:
        worth += 1
    assert len(sizes) == (worth if costs[worth - 1] <= 0.8 * costs[0] else 1)
    for width in chosen:  # labels of every row of a bucket fit
        assert max(max(1, length // 3) for length in given if length <= width.tokens) <= width.labels
    assert lengths(rows).tolist() == given


def test_a_label_may_be_that_of_the_token_behind_a_row():
    rows = table([8] * 20 + [64])
    cut = rows._replace(tokens=rows.tokens[:, :63])
    assert [width.tokens for width in widths(cut, 2)] == [8, 63]


def value(weights, rows):
    """A loss that hangs on every token up to the last label of a row, and on nothing after it."""
    seen = jnp.cumsum(weights[rows.tokens], axis=-1)
    at_labels = jnp.take_along_axis(seen, rows.label_positions, axis=-1)
    return jnp.sum(rows.label_weights * jnp.sin(at_labels) * weights[rows.labels]) / jnp.sum(rows.label_weights)


GIVEN = [5, 9, 12, 16, 20, 33, 38, 40, 50, 63] * 3
WEIGHTS = jnp.asarray(np.random.default_rng(1).standard_normal(50), jnp.float32)


def one(rows, i):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[i : i + 1]), rows)


def test_the_loss_and_its_gradient_are_the_same_at_every_width():
    rows = table(GIVEN)
    among = widths(rows, 4)
    assert len(among) > 2
    narrow = bucketed_loss(value, among)
    for i in range(10):
        both = [jax.value_and_grad(loss)(WEIGHTS, one(rows, i)) for loss in (narrow, value)]
        chex.assert_trees_all_close(*both, rtol=1e-6)
    assert bucketed_loss(value, among[-1:]) is value


@pytest.mark.parametrize("length", [7, 8, 9, 10])
def test_a_row_goes_to_the_first_width_that_holds_its_tokens_and_labels(length):
    rows = table([length, 16])
    narrow = bucketed_loss(value, (Width(8, 2), Width(16, 8)))  # up to 8 tokens there are 2 labels, from 9 on 3
    chex.assert_trees_all_close(narrow(WEIGHTS, one(rows, 0)), value(WEIGHTS, one(rows, 0)), rtol=1e-6)


def equations(jaxpr):
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("function", [value, jax.grad(value)], ids=["loss", "gradient"])
def test_clients_under_vmap_share_one_branch_wide_enough_for_all(function):
    rows = table(GIVEN)
    among = widths(rows, 4)
    narrow = bucketed_loss(value, among)
    work = jax.grad(narrow) if function is not value else narrow
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:9]).reshape(3, 3, -1), rows)
    batched = jax.vmap(work, in_axes=(None, 0))
    chex.assert_trees_all_close(
        batched(WEIGHTS, batch), jax.vmap(function, in_axes=(None, 0))(WEIGHTS, batch), rtol=1e-5
    )
    found = list(equations(jax.make_jaxpr(batched)(WEIGHTS, batch).jaxpr))
    branches = [equation for equation in found if equation.primitive.name == "cond"]
    assert [len(equation.params["branches"]) for equation in branches] == [len(among)]
    assert branches[0].invars[0].aval.shape == ()
    for branch, width in zip(branches[0].params["branches"], among, strict=True):
        sums = [each.outvars[0].aval.shape for each in equations(branch.jaxpr) if each.primitive.name == "cumsum"]
        assert sums
        assert {shape[-1] for shape in sums} == {width.tokens}


def test_a_llamas_losses_are_the_same_at_every_width():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = Llama(config)
    base = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), {})["params"]
    lora = jax.tree.map(lambda leaf: leaf + 0.1, init_lora(jax.random.key(1), config, 2, ("q_proj", "v_proj")))
    rows = table(GIVEN)
    among = widths(rows, 2)
    assert len(among) == 2
    perturbation = mezo.Perturbation(jax.random.key(2), 1e-3)

    @jax.jit
    def everything(row):
        loss = pair_loss_of(model, base)
        return [each(lora, row, perturbation) for each in (loss, bucketed_loss(loss, among))]

    for i in (0, 9):
        chex.assert_trees_all_close(*everything(one(rows, i)), rtol=1e-6)


SETTINGS = {"seed": 3, "local_steps": 5, "batch_size": 2}


@pytest.mark.parametrize("algorithm", ["fedmezo", "fedavg"])
def test_a_run_compiles_once_whatever_the_widths_of_its_rounds(algorithm):
    rows = table(GIVEN)
    parts = [np.arange(0, 30, 2), np.arange(1, 30, 2)]
    among = widths(rows, 4)
    if algorithm == "fedmezo":
        work, loss = client.mezo_client(mezo.MezoConfig(1e-3)), bucketed_loss(mezo.pair_loss_of(value), among)
    else:
        import optax

        work, loss = client.sgd_client(optax.sgd), bucketed_loss(value, among)
    init, step = federated.federated(work, personalization.RateConfig(1e-2))
    chex.clear_trace_counter()
    work = jax.jit(chex.assert_max_traces(lambda *given: step.work(*given), n=1))
    state = init(WEIGHTS, 2)
    key = jax.random.key(0, impl="threefry2x32")
    met = set()
    for t in range(4):
        batches = round_batches(rows, parts, [0, 1], t, **SETTINGS, by_length=True)
        met.add(tuple(lengths(batches).max(axis=(0, 2)).tolist()))
        cohort = federated.Cohort(np.array([0, 1]), np.ones(2, np.float32), batches)
        report = work(state, Partial(loss), cohort, key)
    assert len(met) > 2
    assert np.isfinite(report.losses).all()


@given(st.integers(0, 2**32), st.integers(0, 5), st.integers(1, 6), st.integers(1, 3))
def test_a_client_meets_the_same_rows_in_a_round_sorted_or_not_and_like_ones_together(seed, t, local_steps, batch_size):
    rows = table(list(range(2, 62)))
    parts = [np.arange(0, 60, 3), np.arange(1, 60, 3), np.arange(2, 60, 3)]
    settings = {"seed": seed, "local_steps": local_steps, "batch_size": batch_size}
    plain = lengths(round_batches(rows, parts, [0, 1, 2], t, **settings))
    dealt = lengths(round_batches(rows, parts, [0, 1, 2], t, **settings, by_length=True))
    order = None
    for i in range(3):
        assert sorted(plain[i].ravel()) == sorted(dealt[i].ravel())
        ends = sorted(map(tuple, np.sort(dealt[i])))
        assert all(first[-1] <= second[0] for first, second in pairwise(ends))  # steps do not overlap
        if len(set(plain[i].ravel())) == plain[i].size:
            ranks = np.argsort(dealt[i].min(axis=1)).tolist()
            assert order in (None, ranks)  # all clients are at their short rows at the same time
            order = ranks
    alone = round_batches(rows, parts, [1], t, **settings, by_length=True)
    assert np.array_equal(lengths(alone)[0], dealt[1])


def test_steps_do_not_always_run_from_short_to_long():
    rows = table(list(range(2, 62)))
    settings = {"seed": 0, "local_steps": 6, "batch_size": 2}
    orders = {
        tuple(lengths(round_batches(rows, [np.arange(60)], [0], t, **settings, by_length=True))[0, :, 0].argsort())
        for t in range(20)
    }
    assert len(orders) > 15


def test_computed_tokens_by_hand():
    # Two clients, two steps of one row each: step 0 needs 16 for both, step 1 only 8.
    rows = table([5, 9, 10, 3])
    picks = np.array([[[1], [0]], [[2], [3]]])
    assert computed_tokens(rows, picks, (Width(8, 8), Width(16, 8))) == (27, 48)
    assert computed_tokens(rows, picks, (Width(16, 8),)) == (27, 64)
