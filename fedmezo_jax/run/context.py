"""What a run works with, and its federated algorithm, whatever the model is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial

from fedmezo_jax.core import aggregation, client, federated, mezo, personalization
from fedmezo_jax.core.estimators import ESTIMATORS, Estimator
from fedmezo_jax.core.per_example import PerExample
from fedmezo_jax.core.random import init_key
from fedmezo_jax.core.task import Task
from fedmezo_jax.data.batches import round_picks
from fedmezo_jax.data.partition import heterogeneity
from fedmezo_jax.errors import UserError
from fedmezo_jax.parallel import sharding
from fedmezo_jax.run import example_privacy
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.config_parts import LocalConfig

AnyTask = TypeVar("AnyTask", bound=Task)


class RunContext(NamedTuple, Generic[AnyTask]):
    """What a run works with, loaded and checked.

    Attributes:
        config: the run's, settled.
        task: model and data.
        params: θ at the start.
        mesh: the devices it is spread over; None for one.
        categories: category of each training example, or what stands for it where the partition goes by something else.
        skipped: examples left out because they are longer than ``max_length``.
        truncated: examples that lost their end for it.
        seeded_noise: whether the noise of a private run comes from its seed, as in every simulation, or from the
            operating system.
    """

    config: RunConfig
    task: AnyTask
    params: mezo.Params
    mesh: Mesh | None
    categories: list[str]
    skipped: int = 0
    truncated: int = 0
    seeded_noise: bool = True

    @property
    def heterogeneity(self) -> float:
        """Mean total-variation distance between a client's categories and all examples' categories."""
        return heterogeneity(list(self.task.parts), self.categories)

    @property
    def example_counts(self) -> np.ndarray:
        """``[N]`` float32, how many examples each client has."""
        return np.array([len(part) for part in self.task.parts], np.float32)


def round_examples(config: RunConfig, task: Task, t: int, attempt: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A round's clients, ``[P]`` int32, and the training examples that they work on, ``[P, H, batch]`` int64."""
    ids = aggregation.sample_participants(config.seed, t, config.clients, config.participants, attempt)
    settings = {"seed": config.seed, "local_steps": config.local_steps, "batch_size": config.batch_size}
    return ids, round_picks(task.train, task.parts, ids, t, **settings, by_length=task.by_length)


def task_name(task: Task) -> str:
    """What stands for model and data in the configuration of a task's run."""
    return f"task:{type(task).__name__}"


def context_of(task: Task, config: RunConfig, mesh: Mesh | None = None) -> RunContext[Task]:
    """The same for a task that is given and not made from the configuration.

    Raises:
        UserError: the clients are not those of the task, or one of them has no examples.
    """
    if len(task.parts) != config.clients:
        raise UserError(f"clients={config.clients}: the task has parts for {len(task.parts)}")
    if empty := [i for i, part in enumerate(task.parts) if not len(part)]:
        raise UserError(f"client {empty[0]} has no examples: leave it out of the task's parts")
    params = sharding.replicate(mesh, task.init_params(init_key(config.seed)))
    return RunContext(config, task, params, mesh, [""] * sum(map(len, task.parts)))


def build(setup: RunContext) -> tuple[federated.Federated, Any]:
    """The run's ``(init, round)`` and the loss that its rounds take."""
    config, task = setup.config, setup.task
    loss = task.loss if config.algorithm == "fedavg" else getattr(task, ESTIMATORS[config.estimator].loss)
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    return algorithm(config, task.block_size, setup.mesh, task.least_width), loss


def algorithm(
    config: RunConfig, block_size: int | None = None, mesh: Mesh | None = None, least_width: int = 1
) -> federated.Federated:
    """The run's ``(init, round)``; its server's half needs neither model nor data."""
    if config.algorithm == "fedmezo":
        estimator = estimator_of(config)
        if config.protects_examples:
            estimator = PerExample(estimator, example_privacy.norm_of(config))
        work = _shared(client.estimator_client, estimator)
    else:
        work = _shared(back_propagation, config.local_optimizer, config.weight_decay)
    rate = 1.0 if config.learning_rate == "auto" else config.learning_rate
    return federated.federated(
        work,
        personalization.RateConfig(rate, config.personalize, config.personalize_scale),
        _shared(server_optimizer, config.server_optimizer, config.server_learning_rate),
        block_size,
        config.directions_shared,
        mesh,
        least_width,
        aggregation.aggregator_of(config.aggregation, config.byzantine_share),
        bound_norms=config.aggregation == "norm-clip",
    )


@lru_cache(maxsize=32)
def _shared(make: Callable[..., Any], *settings: Hashable) -> Any:
    """``make(*settings)``, the same object for equal settings, so that like runs of a process share their programs."""
    return make(*settings)


def estimator_of(config: LocalConfig) -> Estimator:
    """The estimator of the local steps of fedmezo."""
    settings = (config.perturbation_scale, config.directions, config.distribution, config.weight_decay)
    return ESTIMATORS[config.estimator].make(mezo.MezoConfig(*settings))


def back_propagation(optimizer: str, weight_decay: float) -> client.LocalWork:
    """The local steps of fedavg by an optimizer of that name."""
    if optimizer == "adam":
        return client.sgd_client(partial(optax.adamw, weight_decay=weight_decay))
    return client.sgd_client(lambda rate: optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate)))


def server_optimizer(optimizer: str, learning_rate: float) -> optax.GradientTransformation:
    """The server's, fed with the pseudo-gradient."""
    if optimizer == "adam":
        return optax.adam(learning_rate)
    return optax.sgd(learning_rate, 0.9 if optimizer == "momentum" else None)
