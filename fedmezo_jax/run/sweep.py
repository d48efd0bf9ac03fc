"""Many runs at once: those that differ in seed, learning rate, μ or the scale of personal rates are one program.

A sweep keeps no checkpoints and no ledger; it is for studies, whose runs are many and short. Each of its runs has the
data, start, directions and rates of the run that the main job makes of the same configuration, and its results agree
with that run's up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmezo_jax.core import aggregation, client, federated, mezo, personalization
from fedmezo_jax.core.estimators import ESTIMATORS
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.batches import TOKENS_AT_ONCE, round_batches
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext, back_propagation, build, server_optimizer


class SweepAxes(NamedTuple):
    """What runs of one program may differ in, ``[R]`` float32 each.

    Attributes:
        learning_rate: η₀.
        perturbation_scale: μ.
        personalize_scale: A.
    """

    learning_rate: Any
    perturbation_scale: Any
    personalize_scale: Any


class Curve(NamedTuple):
    """One run's outcome.

    Attributes:
        rounds: the numbers of rounds after which the test loss was measured, 0 first.
        test_loss: at those, nats/token.
        train_loss: mean over clients and steps, of each round.
        seconds_per_round: of the program that ran it, divided by the number of runs in it, compilation left out.
    """

    rounds: list[int]
    test_loss: list[float]
    train_loss: list[float]
    seconds_per_round: float


def shape_of(config: RunConfig) -> RunConfig:
    """The configuration without what runs of one program may differ in: equal for those that can run together."""
    return replace(config, seed=0, learning_rate=1.0, perturbation_scale=1.0, personalize_scale=0.0)


def check_supported(config: RunConfig) -> None:
    """Refuses a configuration of which a sweep would leave something out.

    Raises:
        UserError: with the first option that a sweep cannot follow.
    """
    if config.learning_rate == "auto":
        raise UserError("--learning-rate auto: runs side by side cannot follow it: give a number")
    for option, value, needed in (
        ("dropout", config.dropout, 0.0),
        ("deadline", config.deadline, None),
        ("on_divergence", config.on_divergence, "warn"),
        ("length_buckets", config.length_buckets, 1),
        ("aggregation", config.aggregation, "mean"),
        ("dp_epsilon", config.dp_epsilon, None),
    ):
        if value != needed:
            raise UserError(
                f"--{option.replace('_', '-')} {value}: runs side by side cannot follow it: use experiments.fedmezo, "
                f"or {needed}"
            )


def runs_at_once(config: RunConfig) -> int:
    """How many runs are one program: as many as keep its batches within ``TOKENS_AT_ONCE``, and at least one."""
    return max(1, TOKENS_AT_ONCE // (config.participants * config.batch_size * config.max_length))


def sweep(
    setups: Sequence[RunContext], eval_every: int, on_round: Callable[[int], None] = lambda t: None
) -> list[Curve]:
    """Runs all of ``setups`` side by side.

    Args:
        setups: runs of one :func:`shape_of`.
        eval_every: rounds between measurements of the test loss; the last round always gets one.
        on_round: called with the number of rounds done.

    Raises:
        UserError: a run asks for what a sweep cannot do, or the loss of its base is not finite.
    """
    configs = [setup.config for setup in setups]
    config = configs[0]
    check_supported(config)
    assert len({shape_of(other) for other in configs}) == 1, "these runs are of several shapes"
    clients, count = config.participants, len(setups)
    _, loss = build(setups[0])
    axes = SweepAxes(*(jnp.array([getattr(run, name) for run in configs], jnp.float32) for name in SweepAxes._fields))
    start = [personalization.init_signals(config.clients) for _ in setups]
    params = _stack([setup.params for setup in setups])
    optimizer = jax.vmap(_optimizer(config).init)(params)
    states = federated.FederatedState(params, optimizer, _stack(start), jnp.zeros(count, jnp.int32))
    keys = jnp.stack([run_key(run.seed) for run in configs])

    def evaluate() -> list[float]:
        all_params = [jax.tree.map(lambda leaf, i=i: leaf[i], states.params) for i in range(count)]
        return [setup.task.evaluate(params) for setup, params in zip(setups, all_params, strict=True)]

    def cohort(t: int) -> federated.Cohort:
        steps, size = config.local_steps, config.batch_size
        cohorts = []
        for setup in setups:
            ids = aggregation.sample_participants(setup.config.seed, t, config.clients, clients)
            sizes = np.array([len(setup.task.parts[i]) for i in ids], np.float32)
            weights = sizes if config.weighting == "samples" else np.ones(clients, np.float32)
            batches = round_batches(
                setup.task.train, setup.task.parts, ids, t, seed=setup.config.seed, local_steps=steps, batch_size=size
            )
            cohorts.append(federated.Cohort(ids, weights, batches))
        padded = _padded([cohort.batches for cohort in cohorts])
        return jax.device_put(
            _stack(cohort._replace(batches=batches) for cohort, batches in zip(cohorts, padded, strict=True))
        )

    rounds, test_losses, train_losses = [0], [[setup.task.loss_before(setup.params) for setup in setups]], []
    seconds = []
    for t in range(config.rounds):
        begun = time.perf_counter()
        states, losses = _round(shape_of(config), axes, states, loss, cohort(t), keys)
        train_losses.append(np.asarray(losses))
        seconds.append((time.perf_counter() - begun) / count)
        if t + 1 == config.rounds or (t + 1) % eval_every == 0:
            rounds.append(t + 1)
            test_losses.append(evaluate())
        on_round(t + 1)
    pace = float(np.median(seconds[1:] or seconds))
    return [
        Curve(rounds, [float(row[i]) for row in test_losses], [float(row[i]) for row in train_losses], pace)
        for i in range(count)
    ]


def _optimizer(config: RunConfig) -> optax.GradientTransformation:
    return server_optimizer(config.server_optimizer, config.server_learning_rate)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _round(config: RunConfig, axes: SweepAxes, states, loss, cohorts: federated.Cohort, keys: jax.Array):
    """A round of R runs; states, cohorts, axes and keys have a leading axis R. Also the mean losses ``[R]``."""
    optimizer = _optimizer(config)

    def one(axes: SweepAxes, state: federated.FederatedState, cohort: federated.Cohort, key: jax.Array):
        ids = jnp.asarray(cohort.ids)
        if config.algorithm == "fedmezo":
            settings = (axes.perturbation_scale, config.directions, config.distribution, config.weight_decay)
            work = client.estimator_client(ESTIMATORS[config.estimator].make(mezo.MezoConfig(*settings)))
        else:
            work = back_propagation(config.local_optimizer, config.weight_decay)
        rates = personalization.RateConfig(axes.learning_rate, config.personalize, axes.personalize_scale)
        rate = federated.cohort_rates(rates, state, ids, key)
        shared = config.directions_shared
        done = federated.local_work(work, state, loss, ids, rate, cohort.batches, key, shared)
        deltas = jax.tree.map(jnp.subtract, done.params, state.params)
        share = cohort.weights / jnp.sum(cohort.weights)
        mean = jax.tree.map(lambda leaf: jnp.tensordot(share, leaf, 1, precision=jax.lax.Precision.HIGHEST), deltas)
        params, moved = aggregation.apply_mean_update(optimizer, state.params, mean, state.optimizer)
        drift = aggregation.client_drift(deltas)
        losses = jnp.mean(done.losses, axis=1)
        signals = personalization.observe(state.signals, ids, losses, drift)
        return federated.FederatedState(params, moved, signals, state.round + 1), jnp.mean(losses)

    return jax.vmap(one)(axes, states, cohorts, keys)


def _stack(trees: Iterable[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _padded(batches: Sequence[Any]) -> list[Any]:
    """The batches padded to one width: their examples were cut from unlike texts."""
    shapes = jax.tree.map(lambda *leaves: np.max([leaf.shape for leaf in leaves], axis=0), *batches)

    def pad(leaf, shape):
        return np.pad(leaf, [(0, most - size) for most, size in zip(shape, leaf.shape, strict=True)])

    return [jax.tree.map(pad, batch, shapes) for batch in batches]
