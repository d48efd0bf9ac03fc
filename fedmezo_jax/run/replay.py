"""A run made again from its ledger: θ after any round, without data and without one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from fedmezo_jax.core import mezo
from fedmezo_jax.core.random import run_key
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import ledger_checks, rounds
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import algorithm


def replay(
    file: Path,
    config: RunConfig,
    lora: mezo.Params,
    until: int | None,
    on_round: Callable[[int], None] = lambda done: None,
) -> tuple[mezo.Params, int]:
    """Rebuilds θ from a ledger, round by round with the programs that the run used.

    On one backend and one version of JAX the result is the run's, bit for bit. On another, Gaussian directions may
    differ in their last place; Rademacher directions along shared seeds leave nothing that could round differently
    except the server's own optimizer.

    Args:
        file: the ledger; every record on the way is verified, and checked against the configuration.
        config: the run's.
        lora: θ at the start.
        until: rounds to make; None means all.
        on_round: called with the number of rounds made.

    Returns:
        θ and the number of rounds made.

    Raises:
        UserError: a record is damaged or does not fit the configuration, or the ledger ends before that round.
    """
    # The rates are in the ledger: what they came from need not be measured again.
    init, round = algorithm(replace(config, personalize="frozen"))
    progress, key = rounds.begin(init(lora, config.clients), config), run_key(config.seed)
    done = 0
    for entry in ledger_checks.entries(file, config):
        if done == until:
            break
        report = rounds.report_of(entry, config.local_steps, config.directions)
        progress = rounds.advance(round, progress, entry, report, key)
        done += 1
        on_round(done)
    if until is not None and done < until:
        raise UserError(f"--round {until}: {file} ends after round {done}")
    return jax.device_get(progress.state.params), done


def largest_difference(one: mezo.Params, other: mezo.Params) -> float | None:
    """The largest absolute difference between two trees on the host; None where they agree bit for bit.

    Infinite where they have other leaves or shapes, or numbers that are not finite.
    """
    if jax.tree.map(np.shape, one) != jax.tree.map(np.shape, other):
        return np.inf
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    if all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs):
        return None
    largest = max(float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))) for a, b in pairs)
    return largest if np.isfinite(largest) else np.inf
