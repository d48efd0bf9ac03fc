import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_jax.data import batches
from fedmezo_jax.data.batches import round_batches
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.data.partition import iid


def table(n):
    """Rows that can be told apart in every leaf: entry i holds i."""
    number = np.arange(n, dtype=np.int32)[:, None]
    return TokenBatch(
        np.tile(number, (1, 5)),
        np.tile(number, (1, 3)),
        np.tile(number, (1, 3)),
        np.tile(number, (1, 3)).astype(np.float32),
    )


@given(
    n=st.integers(1, 150),
    local_steps=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    client=st.integers(0, 1),
)
def test_a_client_meets_each_of_its_rows_once_an_epoch(n, local_steps, batch_size, seed, client):
    parts = [np.arange(n), np.arange(n, 2 * n)]
    epochs = 3
    rounds = -(-epochs * n // (local_steps * batch_size))
    met = np.concatenate(
        [
            round_batches(
                table(2 * n), parts, [client], t, seed=seed, local_steps=local_steps, batch_size=batch_size
            ).tokens[..., 0].ravel()
            for t in range(rounds)
        ]
    )  # fmt: skip
    for epoch in range(epochs):
        assert sorted(met[epoch * n : (epoch + 1) * n]) == parts[client].tolist()


def test_leaves_have_the_axes_client_step_batch_and_belong_together():
    rows, parts = table(40), iid(40, 4, 0)
    drawn = round_batches(rows, parts, [3, 1], 2, seed=0, local_steps=5, batch_size=2)
    assert [leaf.shape for leaf in drawn] == [(2, 5, 2, 5), (2, 5, 2, 3), (2, 5, 2, 3), (2, 5, 2, 3)]
    assert [leaf.dtype for leaf in drawn] == [np.int32, np.int32, np.int32, np.float32]
    for leaf in drawn:
        assert (leaf == drawn.tokens[..., :1]).all()
    for i, client in enumerate([3, 1]):
        assert set(drawn.tokens[i].ravel()) <= set(parts[client])


def test_a_client_draws_the_same_whoever_else_takes_part_and_whatever_ran_before():
    rows, parts = table(60), iid(60, 6, 0)

    def draw(participants, t):
        return round_batches(rows, parts, participants, t, seed=9, local_steps=4, batch_size=3).tokens

    in_turn = [draw(range(6), t) for t in range(8)]
    batches._walk.cache_clear()
    for t in reversed(range(8)):
        assert (draw([4], t)[0] == in_turn[t][4]).all()
        assert (draw(np.array([5, 2]), t) == in_turn[t][[5, 2]]).all()


def test_epochs_clients_and_seeds_have_orders_of_their_own():
    rows, parts = table(400), [np.arange(100), np.arange(100), np.arange(100, 400)]

    def order(client, t, seed=0):
        return tuple(
            round_batches(rows, parts, [client], t, seed=seed, local_steps=50, batch_size=2).tokens[..., 0].ravel()
        )

    orders = {order(0, 0), order(0, 1), order(0, 2), order(1, 0), order(0, 0, seed=1)}
    assert len(orders) == 5
    small = [np.arange(4)]  # many epochs share one generator
    drawn = round_batches(rows, small, [0], 0, seed=0, local_steps=64, batch_size=1).tokens[..., 0].reshape(16, 4)
    assert len({tuple(epoch) for epoch in drawn}) > 8


def test_a_thousand_clients_take_little_time():
    rows, parts = TokenBatch(*(np.zeros((3000, width), np.int32) for width in (160, 32, 32, 32))), iid(3000, 1000, 0)

    def seconds(t):
        start = time.perf_counter()
        round_batches(rows, parts, range(1000), t, seed=0, local_steps=10, batch_size=2)
        return time.perf_counter() - start

    seconds(0)
    assert min(seconds(t) for t in (0, 1, 2)) < 0.05
