"""How much noise an (ε, δ) takes, and what ε has been spent: all by the library ``dp-accounting``.

In each round that a client takes part in, its numbers pass through one Gaussian mechanism: they change what is released
by at most C in norm, and the noise has standard deviation σ·C in every entry. Nothing is gained from the sampling of
participants, since a ledger names them: ε is that of the client that has taken part most often, and it holds whoever
knows who took part.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

_DISCRETISATION = 1e-3
"""Of privacy losses; rounded up, so that ε is an upper bound (by less than 1e-4 here)."""


def _accountant() -> Any:
    from dp_accounting import pld  # a second, which only private runs spend

    return pld.PLDAccountant(value_discretization_interval=_DISCRETISATION)


@lru_cache
def noise_multiplier(epsilon: float, delta: float, participations: int) -> float:
    """The least σ with which a client may take part so often at (ε, δ)."""
    import dp_accounting as dp

    def event(sigma: float) -> Any:
        return dp.SelfComposedDpEvent(dp.GaussianDpEvent(sigma), participations)

    return float(dp.calibrate_dp_mechanism(_accountant, event, epsilon, delta, tol=1e-5))


@lru_cache(maxsize=4096)
def spent(noise: float, delta: float, participations: int) -> float:
    """ε after so many rounds with a client; 0 after none."""
    from dp_accounting import GaussianDpEvent

    if not participations:
        return 0.0
    accountant = _accountant().compose(GaussianDpEvent(noise), participations)
    return float(accountant.get_epsilon(delta))


def most_participations(rounds: Iterable[np.ndarray], clients: int) -> int:
    """How often the client takes part that does so most often; ``rounds`` are the ids of each round's clients."""
    counts = np.zeros(clients, np.int64)
    for ids in rounds:
        counts[ids] += 1
    return int(np.max(counts, initial=0))
