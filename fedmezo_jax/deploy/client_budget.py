"""What a client lets a server ask of it: no more noisy answers than its privacy covers.

A client that adds its noise itself need not trust the server, and so counts for itself. An answer that is asked for
again with another ticket, such as by a server that was restarted, has new noise and counts again.
"""

from __future__ import annotations

import numpy as np

from fedmezo_jax.core.aggregation import sample_participants
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.privacy_plan import Budget, open_budget, plan_of


def budget_before(config: RunConfig, client: int, examples: int, t: int) -> Budget | None:
    """A client's budget before round ``t`` if it has answered once in each round that it takes part in.

    A client that was restarted begins with it, since it does not remember what it has answered.

    Args:
        config: the run's.
        client: its id.
        examples: how many it has.
        t: number of the round, from 0.

    Returns:
        The budget, of which only this client's part is meant; None where the client adds no noise itself.
    """
    plan = plan_of(config)
    if not config.protects_examples and not (plan and plan.client_noise):
        return None
    budget = open_budget(config, np.full(config.clients, examples))
    for earlier in range(t):
        if budget and client in sample_participants(config.seed, earlier, config.clients, config.participants):
            budget = budget.after(earlier, np.array([client]))
    return budget
