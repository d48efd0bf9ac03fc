"""Clients that fail: simulated ones, which are away or too slow, and real ones, whose messages are of no use."""

from __future__ import annotations

import numpy as np

from fedmezo_jax.data.seeding import generator

DROPPED, LATE, NOT_FINITE = "dropped out", "came too late", "returned NaN or infinite numbers"
TOO_LARGE = "returned numbers too large to be real"
MALFORMED = "sent a malformed message"
MISMATCHED = "sent a message for another round, client or number of rows"
UNSIGNED = "sent a message without its own signature"
TOO_FEW = "was one of too few for a secure sum"
NO_MESSAGE = (DROPPED, MALFORMED, MISMATCHED, UNSIGNED)
"""Failures of which nothing is kept but the reason."""
UNUSABLE = (NOT_FINITE, TOO_LARGE)
"""Failures of clients whose local steps have diverged, or who say so."""
REASONS = (*NO_MESSAGE, *UNUSABLE, LATE, TOO_FEW)
SPREAD = 0.5
"""Standard deviation of the logarithm of a client's time for a round; the median is one."""


def absent(
    seed: int, round_index: int, attempt: int, clients: int, dropout: float, deadline: float | None
) -> dict[int, str]:
    """Which of all N clients would fail in this attempt at a round, and why: a function of the arguments alone.

    Args:
        seed: the run's.
        round_index: number of the round.
        attempt: how often it was tried before.
        clients: N.
        dropout: probability that a client drops out.
        deadline: when the server stops waiting, in the median client's time for a round; None means never.
    """
    draw = generator(seed, "faults", round_index, attempt)
    dropped = draw.random(clients) < dropout
    late = np.exp(SPREAD * draw.standard_normal(clients)) > (np.inf if deadline is None else deadline)
    return {id: DROPPED if dropped[id] else LATE for id in map(int, np.flatnonzero(dropped | late))}
