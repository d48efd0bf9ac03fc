"""What clients of the fast recipe are sent suffices to follow the server."""

import math
from dataclasses import replace

import jax
import msgpack
import numpy as np
import pytest

from fedmezo_jax.core.federated import RoundReport
from fedmezo_jax.core.random import run_key
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import messages, rounds
from fedmezo_jax.run.context import algorithm
from fedmezo_jax.run.replay import largest_difference


def test_a_client_that_reads_the_outcomes_follows_the_server(setup, scripted):
    """From the bytes of the outcomes alone, and its own projected gradients; a round that is not taken has none."""
    config, me = setup.config, 1
    init, round = algorithm(config)
    state, key = init(setup.params, 3), run_key(config.seed)
    for entry, record, theirs in zip(scripted.entries, scripted.result.metrics, scripted.thetas, strict=True):
        start_size = len(messages.pack_start(entry.round, 1.0))
        if not entry.step:
            assert record["client_downlink_bytes"] == [start_size] * 3
            state = state._replace(round=state.round + 1)
        else:
            updates = [messages.unpack_update(message) for message in entry.updates]
            sent = np.array([update.projected_gradients.ravel() for update in updates])
            outcome = messages.Outcome(entry.round, entry.ids, None, entry.learning_rates, sent, entry.step)
            message = messages.pack_outcome(outcome, 3, me)
            assert record["client_downlink_bytes"][me] == start_size + len(message)
            got = messages.unpack_outcome(message, me, updates[me].projected_gradients)
            report = RoundReport(
                np.zeros((3, 2), np.float32), got.projected_gradients.reshape(3, 2, 4), got.learning_rates
            )
            moved = round.apply(state, got.ids, np.ones(3, np.float32), report, key)
            state = rounds.take_step(state, moved, got.step)
        assert largest_difference(jax.device_get(state.params), theirs) is None


def test_a_client_that_reads_the_means_follows_the_server(setup, scripted):
    """The scripted run's numbers and steps, along shared directions."""
    config = replace(setup.config, directions_shared=True)
    init, round = algorithm(config)
    progress = rounds.begin(init(setup.params, 3), config, 1e-3)
    state, key = progress.state, run_key(config.seed)
    for entry in scripted.entries:
        whole = rounds.move(config, round, progress, entry, None, key)
        progress = rounds.advance(config, progress, entry, whole)
        combined = round.combine(state, entry.ids, np.ones(3), rounds.report_of(entry, 2, 4))
        message = messages.pack_mean(entry.round, combined, entry.step)
        number, mean, step = messages.unpack_mean(message)
        assert (number, step) == (entry.round, entry.step)
        state = rounds.take_step(state, round.apply_combined(state, mean.reshape(2, 4), key) if step else None, step)
        assert largest_difference(*jax.device_get((state.params, progress.state.params))) is None
    assert largest_difference(*jax.device_get((state.params, setup.params))) > 1e-3


@pytest.mark.parametrize("step", [None, 1, True, b"", "2", []])
def test_a_step_that_is_no_number_is_refused(step):
    outcome = messages.Outcome(9, np.array([0, 2]), None, np.ones(2, np.float32), np.ones((2, 3), np.float32), math.pi)
    for message, unpack in (
        (messages.pack_outcome(outcome, 8), messages.unpack_outcome),
        (messages.pack_mean(9, np.ones((2, 3), np.float32), math.pi), messages.unpack_mean),
    ):
        *fields, last = msgpack.unpackb(message)
        assert last == np.float32(math.pi)
        with pytest.raises(UserError, match="is malformed"):
            unpack(msgpack.packb([*fields, step]))
        with pytest.raises(UserError, match="format version"):
            unpack(msgpack.packb(fields))  # as it was sent when there were no steps
