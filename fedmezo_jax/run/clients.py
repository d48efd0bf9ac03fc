"""The clients' side of a run, as its loop sees it. :class:`SimulatedClients` are on this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedmezo_jax.core import federated, transforms
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.batches import take
from fedmezo_jax.parallel import sharding
from fedmezo_jax.privacy import fixed_point
from fedmezo_jax.run import example_privacy, rounds, signatures
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext, build, round_examples
from fedmezo_jax.run.ledger import Entry


class Clients(Protocol):
    """Whoever does the local work: simulated clients, or those that a message reaches."""

    def first_report(self, state: federated.FederatedState) -> federated.RoundReport:
        """What the first round's clients report at learning rate 0, on the host; with a secure sum their mean."""
        ...

    def work(self, progress: rounds.Progress, t: int, signing: signatures.Signing | None) -> rounds.Work:
        """Round ``t`` from the progress before it."""
        ...

    def finish_round(self, progress: rounds.Progress, entry: Entry) -> None:
        """Hears what a round was, when that is in the ledger; ``progress`` is from before it."""
        ...


class SimulatedClients:
    """All clients, with their examples, on the devices of this process."""

    def __init__(self, setup: RunContext):
        """Nothing is computed yet.

        Args:
            setup: the run's.
        """
        config = setup.config
        (_, self._round), self._loss = build(setup)
        self._config, self._key = config, run_key(config.seed)
        self._sizes = setup.example_counts
        self._cohort = _cohorts(setup)
        self._private_keys = signatures.simulated_keys(config).clients if config.signed else ()

    def first_report(self, state: federated.FederatedState) -> federated.RoundReport:
        """See :class:`Clients`."""
        work = self._round.work(state, self._loss, self._cohort(0, 0), self._key, None, jnp.float32(0))
        report: federated.RoundReport = jax.device_get(work)
        if not self._config.secure_sum:
            return report
        gradients = np.asarray(report.projected_gradients)
        mean = fixed_point.total(list(gradients), len(gradients)) / len(gradients)
        return report._replace(projected_gradients=mean[None])

    def work(self, progress: rounds.Progress, t: int, signing: signatures.Signing | None) -> rounds.Work:
        """See :class:`Clients`."""
        config, state = self._config, progress.state

        def work(attempt: int, limit: float) -> rounds.Answers:
            cohort = self._cohort(t, attempt)
            transform = transforms.clip(np.float32(limit)) if config.on_divergence == "clip" else None
            report = self._round.work(state, self._loss, cohort, self._key, transform, damping(config, progress))
            if t + 1 < config.rounds:
                self._cohort(t + 1, 0)  # while the device works
            ids, report = np.asarray(cohort.ids), jax.device_get(report)
            context = signing and signing.context
            told = (self._sizes, ids, report, self._key, attempt, context, self._private_keys)
            return rounds.simulated_answers(config, self._round, state, *told)

        return work

    def finish_round(self, progress: rounds.Progress, entry: Entry) -> None:
        """They have nothing to follow: each round starts from the server's own θ."""


def damping(config: RunConfig, progress: rounds.Progress) -> jax.Array | None:
    """What a round's learning rates are multiplied by; None where nothing can change them."""
    adapts = config.learning_rate == "auto" or config.on_divergence == "rollback"
    return progress.rate if adapts else None


def _cohorts(setup: RunContext) -> Callable[[int, int], federated.Cohort]:
    """``cohort(t, attempt)``: a round's clients and their batches."""
    config, sizes, task = setup.config, setup.example_counts, setup.task

    @lru_cache(maxsize=2)
    def cohort(t: int, attempt: int) -> federated.Cohort:
        ids, picks = round_examples(config, task, t, attempt)

        def batches_of(at: Any) -> Any:
            batches = take(task.train, picks[at])
            if not config.protects_examples:
                return batches
            noise = rounds.noise_of(config, seeded=True)
            return example_privacy.add_noise(config, batches, ids[at], sizes[ids[at]], t, attempt, noise)

        batches = sharding.shard_clients(setup.mesh, len(ids), batches_of)
        return federated.Cohort(ids, sizes[ids], batches)

    return cohort
