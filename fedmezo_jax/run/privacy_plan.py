"""What ``--dp-epsilon`` means for a run: norm, noise, and how often a client may take part."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fedmezo_jax.core.aggregation import sample_participants
from fedmezo_jax.errors import UserError
from fedmezo_jax.privacy import accountant
from fedmezo_jax.run.config import RunConfig


class PrivacyPlan(NamedTuple):
    """The Gaussian mechanism of a run's rounds.

    Attributes:
        norm: C, to which a client's H·n projected gradients are clipped.
        noise: σ; the noise has standard deviation σ·C.
        delta: δ.
        participations: rounds in which a client may take part; that of the planned rounds which has most.
    """

    norm: float
    noise: float
    delta: float
    participations: int

    def spent(self, participations: np.ndarray) -> float:
        """ε of the client that took part most often, by ``[N]`` numbers of rounds."""
        return accountant.spent(self.noise, self.delta, int(np.max(participations)))


@lru_cache(maxsize=8)
def plan_of(config: RunConfig) -> PrivacyPlan | None:
    """The plan of a run; None where it is not private."""
    if config.dp_epsilon is None:
        return None
    planned = (sample_participants(config.seed, t, config.clients, config.participants) for t in range(config.rounds))
    most = accountant.most_participations(planned, config.clients)
    noise = accountant.noise_multiplier(config.dp_epsilon, config.dp_delta, most)
    norm = config.dp_clip * (config.local_steps * config.directions) ** 0.5
    return PrivacyPlan(norm, noise, config.dp_delta, most)


def describe(plan: PrivacyPlan, config: RunConfig) -> str:
    """The guarantee in one line, for the start of a run and the header of its ledger."""
    where = "the sum of a round" if config.directions_shared else "what each client sends"
    return (
        f"({config.dp_epsilon:g}, {plan.delta:g})-differential privacy of each client, all of whose examples are "
        f"replaced by none: norm {plan.norm:.3g}, noise {plan.noise:.4g} times that on {where}, at most "
        f"{plan.participations} rounds a client. The noise is drawn from the seed: a simulation, which protects nobody"
    )


def check_budget(plan: PrivacyPlan | None, participations: np.ndarray, t: int) -> None:
    """Refuses a round that would spend more than the plan.

    Raises:
        UserError: a client would take part more often than planned, because a round was tried again with others.
    """
    if plan and np.max(participations) > plan.participations:
        raise UserError(
            f"round {t + 1}: a client would take part more than {plan.participations} times, which --dp-epsilon does "
            "not cover: the run ends here; experiments.replay makes the adapter of the rounds before from its ledger"
        )
