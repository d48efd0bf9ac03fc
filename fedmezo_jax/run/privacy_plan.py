"""What ``--dp-epsilon`` means for a run: norm, noise, who adds it, and how often a client may take part."""

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
        client_noise: the part of σ that each client adds itself; 0 where the server adds all of it.
        delta: δ.
        participations: rounds in which a client may take part; that of the planned rounds which has most.
    """

    norm: float
    noise: float
    client_noise: float
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
    client_noise = 0.0 if config.directions_shared else noise
    if config.secure_sum:
        client_noise = noise / config.threshold**0.5  # so many add up to σ, and more to more
    return PrivacyPlan(norm, noise, client_noise, config.dp_delta, most)


def describe(config: RunConfig) -> str:
    """What is guaranteed, for the start of a run and the header of its ledger; empty where nothing is."""
    return ". ".join(filter(None, (_describe_sum(config), _describe_noise(config))))


def _describe_sum(config: RunConfig) -> str:
    if not config.secure_sum:
        return ""
    return (
        f"the server learns the sum of a round's clients and no single client's numbers, where at least "
        f"{config.threshold} of {config.participants} stay. This is a simulation, which makes the same sum in the clear"
    )


def _describe_noise(config: RunConfig) -> str:
    if (plan := plan_of(config)) is None:
        return ""
    where = "the sum of a round" if config.directions_shared else "what each client sends"
    if config.secure_sum:
        where += ", of which each client adds a share"
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
