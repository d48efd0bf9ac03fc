"""Messages: what goes in comes out bit for bit, and their sizes are what is promised."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_jax.run import messages

DRAW = np.random.RandomState(0)


def numbers(*shape):
    """Any float32, NaN and infinities among them."""
    return DRAW.randint(0, 2**32, shape, dtype=np.uint64).astype(np.uint32).view(np.float32)


@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 3))
def test_an_update_comes_back_bit_for_bit(round_index, client, steps, directions):
    sent = messages.Update(round_index, client, 7, numbers(steps, directions), numbers(steps))
    got = messages.unpack_update(messages.pack_update(sent))
    assert got[:3] == sent[:3]
    for a, b in zip(got[3:], sent[3:], strict=True):
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


@given(st.data(), st.sampled_from([1, 3, 30, 2000]), st.booleans(), st.booleans())
def test_an_outcome_comes_back_with_the_recipients_own_numbers(data, clients, weighted, alike):
    count = data.draw(st.integers(1, min(clients, 40)))
    ids = np.sort(DRAW.choice(clients, count, replace=False))
    gradients = numbers(count, 4)
    rates = np.full(count, 0.1, np.float32) if alike else numbers(count)
    sent = messages.Outcome(9, ids, numbers(count) if weighted else None, rates, gradients, 0.25)
    for recipient in (None, int(ids[-1]), clients + 1):
        message = messages.pack_outcome(sent, clients, recipient)
        own = gradients[-1].reshape(2, 2) if recipient == ids[-1] else None
        got = messages.unpack_outcome(message, recipient, own)
        np.testing.assert_array_equal(got.ids, ids)
        assert got.projected_gradients.tobytes() == gradients.tobytes()
        assert got.learning_rates.tobytes() == rates.tobytes()
        assert got.step == 0.25
        assert (got.weights is None) == (not weighted)
        assert not weighted or got.weights.tobytes() == sent.weights.tobytes()


@pytest.mark.parametrize(("round_index", "client", "samples"), [(0, 0, 1), (499, 29, 52_000), (65_535, 65_535, 65_535)])
def test_thirty_steps_go_up_in_256_bytes(round_index, client, samples):
    message = messages.pack_update(messages.Update(round_index, client, samples, numbers(30, 1), numbers(30)))
    assert 2 * 30 * 4 < len(message) <= 256


def test_thirty_clients_of_thirty_steps_come_down_in_3600_bytes():
    outcome = messages.Outcome(499, np.arange(30), None, np.full(30, 1e-5, np.float32), numbers(30, 30), 1.0)
    for recipient in range(30):
        sent = len(messages.pack_start(499, 1e-5)) + len(messages.pack_outcome(outcome, 30, recipient))
        assert 29 * 30 * 4 < sent <= 3600


def test_shared_directions_come_down_in_256_bytes_however_many_the_clients_are():
    message = messages.pack_mean(499, numbers(30, 1), 2.0)
    assert 30 * 4 < len(messages.pack_start(499, 1e-5)) + len(message) <= 256
    assert messages.unpack_mean(message)[::2] == (499, 2.0)


def test_a_lora_comes_back_bit_for_bit():
    lora = {"q_proj": {"A": numbers(2, 3, 4), "B": jnp.zeros((2, 4, 5))}}
    update = messages.Update(3, 1, 10, numbers(2, 1), numbers(2))
    _, got = messages.unpack_lora_update(messages.pack_lora_update(update, lora), lora)
    assert got["q_proj"]["A"].tobytes() == lora["q_proj"]["A"].tobytes()
    assert len(messages.pack_lora_update(update, lora)) > 4 * (2 * 3 * 4 + 2 * 4 * 5)
