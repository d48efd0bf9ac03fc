"""What a round comes to, as the server sends it, and how a client follows: from the message to the next θ.

A client moves its θ with the programs that the server moved its own with, so that both have the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from fedmezo_jax.core import federated
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import messages, rounds
from fedmezo_jax.run.automatic_rate import STEPS
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.ledger import Entry
from fedmezo_jax.run.messages import Outcome
from fedmezo_jax.run.rounds import Progress


class Mean(NamedTuple):
    """A round's result along shared directions, see :func:`messages.pack_mean`.

    Attributes:
        round: number of the round, from 0.
        coefficients: how far the directions move θ, float32.
        step: how much of the update the server took.
    """

    round: int
    coefficients: np.ndarray
    step: float


def result_of(
    config: RunConfig,
    round: federated.Round,
    state: federated.FederatedState,
    entry: Entry,
    report: federated.RoundReport,
) -> Outcome | Mean | None:
    """What a round came to.

    Args:
        config: the run's, whose clients send projected gradients.
        round: the algorithm's.
        state: before the round.
        entry: what the round was.
        report: of the entry (:func:`rounds.report_of`).

    Returns:
        The clients' numbers, or with shared directions their mean; None of a round that is not taken.
    """
    if entry.rolled_back or not entry.step:
        return None
    if config.directions_shared:
        return Mean(entry.round, rounds.combined(round, state, entry, report), entry.step)
    counted = entry.weights > 0
    gradients = np.asarray(report.projected_gradients)[counted].reshape(int(counted.sum()), -1)
    weights = entry.weights[counted] if config.weighting == "samples" else None
    return Outcome(entry.round, entry.ids[counted], weights, entry.learning_rates[counted], gradients, entry.step)


def pack_result(result: Outcome | Mean | None, clients: int, recipient: int | None = None) -> bytes | None:
    """A result as a message for one of ``clients`` clients, or for any that took no part; None where there is none."""
    if result is None:
        return None
    return (
        messages.pack_mean(*result) if isinstance(result, Mean) else messages.pack_outcome(result, clients, recipient)
    )


def follow(
    config: RunConfig,
    round: federated.Round,
    progress: Progress,
    message: bytes | None,
    key: jax.Array,
    client: int,
    own: np.ndarray | None,
) -> Progress:
    """A client's progress after a round.

    Args:
        config: the run's.
        round: the algorithm's.
        progress: before the round.
        message: of :func:`pack_result` for this client.
        key: the run's.
        client: its id.
        own: ``[H, n]`` projected gradients that it sent in this round; None if it sent none.

    Raises:
        UserError: the message is malformed, of another round, or one that this run cannot have.
    """
    state, t = progress.state, int(progress.state.round)
    if message is None:
        entry, moved = _entry(t, np.arange(0), rolled_back=config.on_divergence == "rollback", step=0.0), None
    elif config.directions_shared:
        told, coefficients, step = messages.unpack_mean(message)
        _check(config, told == t and coefficients.size == config.local_steps * config.directions, step, t)
        entry, shape = _entry(t, np.arange(0), step=step), (config.local_steps, config.directions)
        moved = jax.block_until_ready(round.apply_combined(state, coefficients.reshape(shape), key))
    else:
        outcome = messages.unpack_outcome(message, client, own)
        known, size = int(outcome.ids[-1]) < config.clients, config.local_steps * config.directions
        _check(config, outcome.round == t and known and outcome.projected_gradients.shape[1] == size, outcome.step, t)
        gradients = outcome.projected_gradients.reshape(-1, config.local_steps, config.directions)
        nothing = np.zeros(config.local_steps, np.float32)
        updates = [messages.pack_update(messages.Update(t, 0, 0, each, nothing)) for each in gradients]
        entry = _entry(t, outcome.ids, outcome.weights, outcome.learning_rates, updates, step=outcome.step)
        moved = rounds.move(config, round, progress, entry, None, key)
    return rounds.advance(config, progress, entry, moved)


def _check(config: RunConfig, fits: bool, step: float, t: int) -> None:
    if not fits or step not in (STEPS if config.learning_rate == "auto" else (1.0,)):
        raise UserError(f"the server's result of round {t + 1} is not one that this run can have")


def _entry(
    t: int,
    ids: np.ndarray,
    weights: np.ndarray | None = None,
    rates: np.ndarray | None = None,
    updates: list[bytes | None] | list[bytes] | None = None,
    rolled_back: bool = False,
    step: float = 1.0,
) -> Entry:
    """As much of the round's entry as moving θ takes."""
    weights = np.ones(len(ids), np.float32) if weights is None else weights
    rates = np.zeros(len(ids), np.float32) if rates is None else rates
    return Entry(t, 0, ids.astype(np.int32), weights, rates, [*(updates or [])], [], rolled_back=rolled_back, step=step)
