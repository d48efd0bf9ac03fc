"""Whether a ledger is one that its configuration permits. Nothing of a ledger is used before it is checked here.

The checksums of a ledger say that it is as it was written; anybody can write one. These checks say that the rounds are
all there in their order, that in each the right clients took part, and that every number is one that a run of this
configuration can have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedmezo_jax.core.aggregation import sample_participants
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import client_failures, ledger
from fedmezo_jax.run.acceptance import LARGEST, Expected, Message, receive
from fedmezo_jax.run.automatic_rate import STEPS, next_rate
from fedmezo_jax.run.config import RunConfig, config_from
from fedmezo_jax.run.ledger import Entry
from fedmezo_jax.run.privacy_plan import Budget, open_budget

MOST_CLIENTS, MOST_GRADIENTS, MOST_EXAMPLES = 10**7, 2**28, 10**8
"""Largest N, P·H·n, and number of private examples, of a ledger that is read: what a replay holds in memory grows with
them."""
_ROUNDING = 1e-5


def run_config(header: Mapping[str, Any], file: Path) -> RunConfig:
    """The configuration in a ledger's header.

    Raises:
        UserError: it is not one that a run with a ledger can have, or is too large to be real.
    """
    config = config_from(header["config"], str(file))
    refusal = f"{file}: its configuration is not one of a ledger"
    if config.algorithm != "fedmezo":
        raise UserError(f"{refusal}: runs of {config.algorithm} have no ledger")
    if config.clients > MOST_CLIENTS:
        raise UserError(f"{refusal}: {config.clients} clients are more than {MOST_CLIENTS}")
    if config.participants * config.local_steps * config.directions > MOST_GRADIENTS:
        raise UserError(f"{refusal}: a round of it has more than {MOST_GRADIENTS} projected gradients")
    if config.protects_examples:
        counts = ledger.example_counts(header)
        if not np.all(counts) or np.sum(counts) > MOST_EXAMPLES:
            raise UserError(f"{refusal}: its clients cannot have {np.min(counts)} to {np.max(counts)} examples")
    return config


def entries(file: Path, config: RunConfig, first: int = 0) -> Iterator[Entry]:
    """The rounds of a ledger from round ``first`` (counted from 0) on, each verified and checked, one by one.

    Raises:
        UserError: a record is damaged, or an entry is not one that the configuration permits; names the round.
    """
    header = ledger.read_header(file)
    rate, budget = float(header["first_rate"]), open_budget(config, ledger.example_counts(header))
    for index, entry in enumerate(ledger.entries(file)):
        wrong = _fault(entry, index, config, rate)
        if not wrong:
            budget = budget and budget.after(index, entry.ids)
            wrong = _privacy_fault(entry, budget)
        if wrong:
            raise UserError(
                f"{file}: the record of round {index + 1} does not fit the run: {wrong}: give the ledger as the run "
                "wrote it"
            )
        rate = (
            float(next_rate(np.float32(rate), entry.step))
            if config.learning_rate == "auto"
            else rate / (1 + entry.rolled_back)
        )
        if index >= first:
            yield entry


def _fault(entry: Entry, index: int, config: RunConfig, rate: float) -> str | None:
    """What is wrong with an entry, or None."""
    if entry.round != index or index >= config.rounds:
        return f"it is of round {entry.round + 1} of {config.rounds}"
    if entry.attempt >= config.attempts:
        return f"it is of attempt {entry.attempt + 1} of {config.attempts}"
    if not np.array_equal(entry.ids, _participants(entry, entry.attempt, config)):
        return "its clients are not those that its seed draws"
    if entry.rolled_back and config.on_divergence != "rollback":
        return "it is rolled back, and on_divergence is not rollback"
    if entry.step not in (STEPS if config.learning_rate == "auto" else (1.0,)):
        return f"the server took {entry.step:g} of its update"
    if entry.clipped > (config.participants * config.local_steps if config.on_divergence == "clip" else 0):
        return f"it has {entry.clipped} clipped steps"
    return _failed_fault(entry, config) or _number_fault(entry, config, rate)


def _privacy_fault(entry: Entry, budget: Budget | None) -> str | None:
    """What is wrong with the ε of an entry, by what is spent after it."""
    if budget and budget.exceeded:
        return budget.exceeded
    expected = budget.epsilon if budget else 0.0
    if not math.isclose(entry.epsilon, expected, rel_tol=1e-6):
        return f"it says that ε = {entry.epsilon:g} is spent, and {expected:g} is"
    return None


def _participants(entry: Entry, attempt: int, config: RunConfig) -> np.ndarray:
    return sample_participants(config.seed, entry.round, config.clients, config.participants, attempt)


def _failed_fault(entry: Entry, config: RunConfig) -> str | None:
    """What is wrong with who failed: in earlier attempts everyone did, in the last those whose weight is 0."""
    if len(entry.failed) != entry.attempt * len(entry.ids) + np.sum(entry.weights == 0):
        return f"{len(entry.failed)} failures do not go with attempt {entry.attempt + 1} and its weights"
    events = {(attempt, id): why for attempt, id, why in entry.failed}
    expected = {
        (attempt, int(id)) for attempt in range(entry.attempt) for id in _participants(entry, attempt, config)
    } | {(entry.attempt, int(id)) for id in entry.ids[entry.weights == 0]}
    if events.keys() != expected:
        return "the clients that failed are not those whose weight is 0, or not all of an earlier attempt"
    if unknown := set(events.values()) - set(client_failures.REASONS):
        return f"{min(unknown)!r:.60} is no reason to fail"
    for id, update in zip(entry.ids, entry.updates, strict=True):
        why = events.get((entry.attempt, int(id)))
        if config.keeps_mean:
            if update is not None:
                return f"it has the update of client {id} and not the mean alone"
            continue
        if update is None and why not in (*client_failures.NO_MESSAGE, client_failures.LATE):
            return f"client {id} has no update"
        if update is not None and why in client_failures.NO_MESSAGE:
            return f"client {id} {why} and has an update"
    return None


def _number_fault(entry: Entry, config: RunConfig, middle: float) -> str | None:
    """What is wrong with weights, learning rates and updates."""
    if not np.all(np.isfinite(entry.weights)) or np.any(entry.weights < 0):
        return "a weight is negative or not finite"
    if not entry.rolled_back and entry.step and not np.any(entry.weights > 0):
        return "no client has a weight"
    spread = 0 if config.personalize == "frozen" else config.personalize_scale
    slack = _ROUNDING * middle + np.finfo(np.float32).tiny
    if not np.all(np.abs(np.asarray(entry.learning_rates, np.float64) - middle) <= spread * middle + slack):
        return f"a learning rate is not within {spread:g} of {middle:g}"
    if bool(entry.seal) != config.signed or bool(entry.signatures) != config.signed:
        return "it has signatures" if not config.signed else "it is not signed"
    if (entry.mean is not None) != config.keeps_mean:
        return "it has a mean" if entry.mean is not None else "it has no mean"
    if entry.mean is not None:
        if entry.mean.size != config.local_steps * config.directions or not np.all(np.abs(entry.mean) <= LARGEST):
            return "its mean is not one of projected gradients"
        if not np.all(np.isin(entry.weights, (0, 1))):
            return "a weight is neither 0 nor 1"
        if config.secure_sum and 0 < np.sum(entry.weights) < config.threshold:
            return f"{np.sum(entry.weights):g} clients are too few for a secure sum"
    limit = math.inf if config.on_divergence == "clip" else None
    for id, weight, rate, message in zip(
        map(int, entry.ids), entry.weights, entry.learning_rates, entry.updates, strict=True
    ):
        if message is None:
            continue
        expected = Expected(entry.round, id, None, config.local_steps, config.directions, rate, limit)
        update, _, why = receive(Message(message), expected, {})
        if update is None or (weight and why):
            return f"client {id} {why}"
        if weight and weight != (np.float32(update.samples) if config.weighting == "samples" else 1):
            return f"client {id} has weight {weight:g} and {update.samples} rows"
    return None
