"""What ``--dp-epsilon`` means with ``--dp-unit example``: every local step of a client is a Gaussian mechanism.

A client finds its noise alone, from how often its own examples are used: nobody else has to be trusted, and what is
made of its numbers later spends nothing. An example that a round uses m times is counted as if all of them were in one
step, whose sum it moves by up to m·C: as much as m² steps that it moves by C.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fedmezo_jax.core.aggregation import sample_participants
from fedmezo_jax.core.per_example import NoisyBatch
from fedmezo_jax.data.batches import uses_in_round
from fedmezo_jax.privacy import accountant, mechanism
from fedmezo_jax.run.config import RunConfig


def norm_of(config: RunConfig) -> float:
    """C, to which the n projected gradients of an example in a step are clipped."""
    return config.dp_clip * config.directions**0.5


class ExampleBudget(NamedTuple):
    """The budget of a run that protects examples.

    Attributes:
        config: the run's.
        example_counts: how many examples each of the N clients has.
        uses: for each client the squared uses of each of its examples, summed over rounds.
    """

    config: RunConfig
    example_counts: tuple[int, ...]
    uses: tuple[np.ndarray, ...]

    @property
    def epsilon(self) -> float:
        """ε of the example that is used most, by the noise of its client."""
        spent = {(_planned(self.config, i, n), int(np.max(self.uses[i]))) for i, n in enumerate(self.example_counts)}
        return max(_epsilon(self.config, planned, used) for planned, used in spent)

    @property
    def exceeded(self) -> str | None:
        """See :class:`privacy_plan.Budget`; a round that is tried again with other clients can lead there."""
        for i, count in enumerate(self.example_counts):
            most = int(np.max(self.uses[i]))
            if most and most > _planned(self.config, i, count):
                return f"an example of client {i} is used more often than planned"
        return None

    def after(self, t: int, ids: np.ndarray) -> ExampleBudget:
        """See :class:`privacy_plan.Budget`."""
        uses = list(self.uses)
        for i in map(int, ids):
            uses[i] = uses[i] + _squared_uses(self.config, i, self.example_counts[i], t)
        return self._replace(uses=tuple(uses))


def open_budget(config: RunConfig, example_counts: np.ndarray) -> ExampleBudget:
    """The budget before the first round, by the ``[N]`` numbers of the clients' examples."""
    counts = tuple(int(count) for count in example_counts)
    return ExampleBudget(config, counts, tuple(np.zeros(count, np.int64) for count in counts))


def add_noise(
    config: RunConfig,
    batches: Any,
    ids: np.ndarray,
    example_counts: np.ndarray,
    t: int,
    attempt: int,
    noise: mechanism.Noise,
) -> NoisyBatch:
    """The batches of a round's clients with the noise of their steps.

    Args:
        config: the run's.
        batches: pytree with leading axes ``[P, H]``.
        ids: ``[P]``, whose batches they are.
        example_counts: ``[P]``, how many examples each of these clients has.
        t: number of the round.
        attempt: of the attempt at it.
        noise: where it comes from.
    """
    shape, norm = (config.local_steps, config.directions), norm_of(config)
    drawn = [
        noise_multiplier(config, i, int(count)) * norm * noise(t, attempt, i).standard_normal(shape)
        for i, count in zip(map(int, ids), example_counts, strict=True)
    ]
    return NoisyBatch(batches, np.stack(drawn).astype(np.float32))


def noise_multiplier(config: RunConfig, client: int, count: int) -> float:
    """σ of a client that has so many examples; a step's noise has standard deviation σ·C."""
    assert config.dp_epsilon is not None
    return accountant.noise_multiplier(config.dp_epsilon, config.dp_delta, max(1, _planned(config, client, count)))


def _epsilon(config: RunConfig, planned: int, used: int) -> float:
    assert config.dp_epsilon is not None
    noise = accountant.noise_multiplier(config.dp_epsilon, config.dp_delta, max(1, planned))
    return accountant.spent(noise, config.dp_delta, used)


@lru_cache(maxsize=65536)
def _planned(config: RunConfig, client: int, count: int) -> int:
    """Squared uses of the example of a client that the planned rounds use most."""
    uses = np.zeros(count, np.int64)
    for t in _planned_rounds(config)[client]:
        uses += _squared_uses(config, client, count, t)
    return int(np.max(uses))


@lru_cache(maxsize=8)
def _planned_rounds(config: RunConfig) -> list[list[int]]:
    """For each client the rounds that it takes part in if none is tried again."""
    rounds: list[list[int]] = [[] for _ in range(config.clients)]
    for t in range(config.rounds):
        for i in sample_participants(config.seed, t, config.clients, config.participants):
            rounds[i].append(t)
    return rounds


def _squared_uses(config: RunConfig, client: int, count: int, t: int) -> np.ndarray:
    return uses_in_round(config.seed, client, count, t, config.local_steps * config.batch_size) ** 2
