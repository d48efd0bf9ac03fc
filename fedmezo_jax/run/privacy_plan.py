"""What ``--dp-epsilon`` means for a run that protects clients: norm, noise, who adds it, and how often a client may
take part. :mod:`example_privacy` has the same for single examples.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from fedmezo_jax.core.aggregation import sample_participants
from fedmezo_jax.privacy import accountant
from fedmezo_jax.run import example_privacy
from fedmezo_jax.run.config import RunConfig


class Budget(Protocol):
    """What has been spent of a run's privacy, and whether that is more than was planned."""

    @property
    def epsilon(self) -> float:
        """ε that is spent."""
        ...

    @property
    def exceeded(self) -> str | None:
        """Which part of the plan is exceeded, or None."""
        ...

    def after(self, t: int, ids: np.ndarray) -> Budget:
        """The budget after clients have taken part in round ``t``, counted from 0."""
        ...


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


class ClientBudget(NamedTuple):
    """The budget of a run that protects clients.

    Attributes:
        plan: the run's.
        participations: ``[N]`` rounds that each client has taken part in.
    """

    plan: PrivacyPlan
    participations: np.ndarray

    @property
    def epsilon(self) -> float:
        """ε of the client that took part most often."""
        return accountant.spent(self.plan.noise, self.plan.delta, int(np.max(self.participations)))

    @property
    def exceeded(self) -> str | None:
        """See :class:`Budget`; a round that is tried again with other clients can lead there."""
        over = np.max(self.participations) > self.plan.participations
        return f"a client takes part in more than {self.plan.participations} rounds" if over else None

    def after(self, t: int, ids: np.ndarray) -> ClientBudget:
        """See :class:`Budget`."""
        participations = self.participations.copy()
        participations[ids] += 1
        return self._replace(participations=participations)


@lru_cache(maxsize=8)
def plan_of(config: RunConfig) -> PrivacyPlan | None:
    """The plan of a run that protects clients; None of another."""
    if config.dp_epsilon is None or config.dp_unit != "client":
        return None
    planned = (sample_participants(config.seed, t, config.clients, config.participants) for t in range(config.rounds))
    most = accountant.most_participations(planned, config.clients)
    noise = accountant.noise_multiplier(config.dp_epsilon, config.dp_delta, most)
    norm = config.dp_clip * (config.local_steps * config.directions) ** 0.5
    client_noise = 0.0 if config.directions_shared else noise
    if config.secure_sum:
        client_noise = noise / config.threshold**0.5  # so many add up to σ, and more to more
    return PrivacyPlan(norm, noise, client_noise, config.dp_delta, most)


def open_budget(config: RunConfig, example_counts: np.ndarray) -> Budget | None:
    """The budget before the first round, by the ``[N]`` numbers of the clients' examples; None where none is set."""
    if plan := plan_of(config):
        return ClientBudget(plan, np.zeros(config.clients, np.int64))
    return example_privacy.open_budget(config, example_counts) if config.protects_examples else None


def describe(config: RunConfig, seeded_noise: bool) -> str:
    """What is guaranteed, for the start of a run and the header of its ledger; empty where nothing is."""
    return ". ".join(filter(None, (_describe_sum(config), _describe_noise(config, seeded_noise))))


def _describe_sum(config: RunConfig) -> str:
    if not config.secure_sum:
        return ""
    return (
        f"the server learns the sum of a round's clients and no single client's numbers, where at least "
        f"{config.threshold} of {config.participants} stay. A simulation makes the same sum in the clear"
    )


def _describe_noise(config: RunConfig, seeded: bool) -> str:
    if not config.private:
        return ""
    if plan := plan_of(config):
        where = "the sum of a round" if config.directions_shared else "what each client sends"
        if config.secure_sum:
            where += ", of which each client adds a share"
        protects = (
            f"each client, all of whose examples are replaced by none: norm {plan.norm:.3g}, noise {plan.noise:.4g} "
            f"times that on {where}, at most {plan.participations} rounds a client"
        )
    else:
        protects = "each example of a client, replaced by none: each client adds noise in every local step"
    source = "the seed: a simulation, which protects nobody" if seeded else "the operating system"
    return (
        f"({config.dp_epsilon:g}, {config.dp_delta:g})-differential privacy of {protects}. The noise is drawn from "
        f"{source}"
    )
