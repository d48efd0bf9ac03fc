"""One round of federated fine-tuning: the clients' work under ``vmap``, and the server's move from what they say.

:func:`federated` returns a pair ``(init, round)`` in the manner of optax. A round is two halves: ``round.work`` is what
the clients do, one compiled program; ``round.apply`` is what the server makes of their numbers. The second half needs
neither data nor model, and every step of it is a compiled program of its own: a server that is sent scalars, one that
is sent parameters, and a replay of the run years later execute the very same programs, and so agree bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedmezo_jax.core import aggregation, mezo, personalization, random
from fedmezo_jax.core.blocks import in_blocks, map_blocks, out_of_blocks
from fedmezo_jax.core.client import LocalResult, LocalWork
from fedmezo_jax.core.mezo import Params

CLIENTS = "clients"
"""The mesh axis along which clients are spread."""


class FederatedState(NamedTuple):
    """All that a run carries from one round to the next.

    Attributes:
        params: θ, the global parameters.
        optimizer: state of the server's optimizer.
        signals: what the server remembers of each of the N clients.
        round: int32 scalar, rounds done.
    """

    params: Params
    optimizer: optax.OptState
    signals: personalization.Signals
    round: jax.Array


class Cohort(NamedTuple):
    """The P clients of one round and what they work on.

    Attributes:
        ids: ``[P]`` int32, distinct client ids.
        weights: ``[P]`` float32, weights of the mean; scaled to sum to one within the round.
        batches: pytree with leading axes ``[P, H]``.
    """

    ids: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray
    batches: Any


class RoundReport(NamedTuple):
    """What a round's clients tell.

    Attributes:
        losses: ``[P, H]`` float32, training loss of each local step.
        projected_gradients: ``[P, H, n]`` float32, g (``[P, H, 0]`` for back-propagation).
        learning_rates: ``[P]`` float32, η_i.
        params: the clients' θ_i, leaves ``[P, …]``, where scalars cannot rebuild them (back-propagation), or None.
    """

    losses: jax.Array | np.ndarray
    projected_gradients: jax.Array | np.ndarray
    learning_rates: jax.Array | np.ndarray
    params: Params | None = None


@dataclass(frozen=True)
class Round:
    """A round, ``round(state, loss, cohort, key) -> (state, report)``, and its two halves.

    It has no side effects, and equal arguments give equal results. It runs on the host, though: it calls programs that
    are compiled already, inspects their numbers with NumPy and raises where none are finite, so that it cannot be
    traced (``jit``, ``vmap``, ``grad``) as a whole. ``key`` is the run's, the same in every round.

    Attributes:
        work: ``work(state, loss, cohort, key[, transform, damping]) -> RoundReport``: what the clients do.
            ``transform`` changes projected gradients (:mod:`transforms`); ``damping`` multiplies the learning rates.
        apply: ``apply(state, ids, weights, report, key[, uploads]) -> FederatedState``: what the server does.
            ``weights`` is ``[P]``, zero for a client that is left out. ``uploads`` are θ_i as the clients sent them, in
            the order of ids; without them the server reconstructs θ_i from the projected gradients.
        combine: ``combine(state, ids, weights, report) -> coefficients``: how far shared directions move θ, ``[H, n]``
            float32.
        apply_combined: ``apply_combined(state, coefficients, key) -> FederatedState``: what the server does from these
            alone; the signals stay as they are. A client that is sent them follows the server so.
        upload: ``upload(state, id, report, i, key) -> θ_i`` of participant i of the report, whose id is given.
        rates: ``rates(state, ids, key[, damping]) -> [P]`` float32, the learning rates that ``work`` gives to clients:
            what a server tells them that does not do their work itself.
        directions_shared: whether all clients of a round draw the same directions.
    """

    work: Callable[..., RoundReport]
    apply: Callable[..., FederatedState]
    combine: Callable[[FederatedState, np.ndarray, np.ndarray, RoundReport], np.ndarray]
    apply_combined: Callable[..., FederatedState]
    upload: Callable[..., Params]
    rates: Callable[..., jax.Array]
    directions_shared: bool

    def __call__(
        self, state: FederatedState, loss: Any, cohort: Cohort, key: jax.Array
    ) -> tuple[FederatedState, RoundReport]:
        """Both halves; a client whose numbers are not finite is left out.

        Raises:
            FloatingPointError: no client's numbers are finite.
        """
        report = self.work(state, loss, cohort, key)
        weights = np.where(finite(report), np.asarray(cohort.weights), 0)
        if not weights.any():
            raise FloatingPointError("no client returned finite numbers")
        return self.apply(state, np.asarray(cohort.ids), weights, report, key), report


class Federated(NamedTuple):
    """What federated training is.

    Attributes:
        init: ``init(params, clients) -> FederatedState``.
        round: see :class:`Round`.
    """

    init: Callable[[Params, int], FederatedState]
    round: Round


def finite(report: RoundReport) -> np.ndarray:
    """``[P]`` bool: whose losses, projected gradients and parameters, if it sent any, are all finite."""
    rows = [np.asarray(leaf) for leaf in (report.losses, report.projected_gradients, *jax.tree.leaves(report.params))]
    return np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in rows], axis=0)


def mean_losses(losses: np.ndarray) -> np.ndarray:
    """``[P]`` float32, the mean of each row of ``[P, H]`` over the losses that are finite; 0 where none is."""
    known = np.isfinite(losses)
    total = np.sum(np.where(known, losses, 0), axis=1, dtype=np.float64)
    return (total / np.maximum(known.sum(axis=1), 1)).astype(np.float32)


def cohort_rates(
    rates: personalization.RateConfig, state: FederatedState, ids: jax.Array, key: jax.Array, damping: Any = None
) -> jax.Array:
    """``[P]`` learning rates of a round's clients, for each of ``ids``; traceable."""
    rates_key = jax.random.fold_in(jax.random.fold_in(key, random.RATES), state.round)
    rate = personalization.learning_rates(rates, state.signals, rates_key)[ids]
    return rate if damping is None else rate * damping


def local_work(
    work: LocalWork,
    state: FederatedState,
    loss: Any,
    ids: jax.Array,
    learning_rates: jax.Array,
    batches: Any,
    key: jax.Array,
    directions_shared: bool,
    transform: Any = None,
) -> LocalResult:
    """The work of clients side by side from θ, a :class:`LocalResult` with leading axis P; traceable."""
    keys = random.shared_key(key, state.round)
    if not directions_shared:
        keys = jax.vmap(random.client_key, in_axes=(None, None, 0))(key, state.round, ids)
    transforms = () if transform is None else (transform,)
    axes = (None, None, 0, None if directions_shared else 0, 0, *(None for _ in transforms))
    return jax.vmap(work, in_axes=axes)(loss, state.params, batches, keys, learning_rates, *transforms)


class WorkSettings(NamedTuple):
    """What the clients' half of a round is compiled for; see :func:`federated`. Equal ones share a program."""

    work: LocalWork
    rates: personalization.RateConfig
    block_size: int | None
    directions_shared: bool
    mesh: Mesh | None
    least_width: int


def federated(
    work: LocalWork,
    rates: personalization.RateConfig,
    optimizer: optax.GradientTransformation | None = None,
    block_size: int | None = None,
    directions_shared: bool = False,
    mesh: Mesh | None = None,
    least_width: int = 1,
    aggregator: aggregation.Aggregator | None = None,
    bound_norms: bool = False,
) -> Federated:
    """Federated training of any loss: FedMeZO with :func:`client.mezo_client`, FedAvg with :func:`client.sgd_client`.

    θ ← θ + Σ_i w_i·Δ_i with Δ_i = θ_i − θ the update of participant i, or the server optimizer's move on it. With
    shared directions (and no weight decay) that is θ − Σ_h (Σ_i w_i·c_ih)·z_h: the server averages scalars, and no
    client's θ_i has to be rebuilt.

    Args:
        work: the clients' local work.
        rates: learning rates of the clients.
        optimizer: the server's, fed with the pseudo-gradient −Σ_i w_i·Δ_i; None means plain averaging.
        block_size: how many clients run at once under ``vmap`` (of each group of a mesh); None means all. Memory grows
            with it. On a CPU the last bits of a small model's losses may depend on it, because XLA sums few rows in
            another order. A client that works alone gets the bits of the round if ``least_width`` is the round's width.
        directions_shared: whether all clients of a round draw the same H·n directions; by default each client draws its
            own (as in the paper).
        mesh: devices to spread the clients over, along its axis ``clients``; a cohort's batches then have as many rows
            as its groups can share evenly, those after the P clients being copies; the state lies whole on every
            device. Of a round's work its groups exchange scalars alone (with back-propagation, the clients'
            parameters).
        least_width: how many clients run at once at least; where there are fewer, copies fill the block.
        aggregator: how the server combines the clients' updates; None means their weighted mean.
        bound_norms: whether weights are lowered for updates whose coefficients have a norm above the clients' median
            (:func:`aggregation.clip_norms`).
    """
    optimizer, aggregator = optimizer or optax.sgd(1.0), aggregator or aggregation.WeightedMean()
    by_drift = rates.strategy in personalization.BY_DRIFT

    def init(params: Params, clients: int) -> FederatedState:
        params = jax.tree.map(jnp.array, params)
        return FederatedState(params, optimizer.init(params), personalization.init_signals(clients), jnp.int32(0))

    settings = WorkSettings(work, rates, block_size, directions_shared, mesh, least_width)
    reconstructed = jax.jit(work.reconstruct) if work.reconstruct else None
    own_key, common_key = jax.jit(random.client_key), jax.jit(random.shared_key)

    def reconstruct(state, id, coefficients, rate, key) -> Params:
        assert reconstructed is not None  # back-propagated work brings its parameters
        direction_key = common_key(key, state.round) if directions_shared else own_key(key, state.round, np.int32(id))
        return reconstructed(state.params, direction_key, np.asarray(coefficients, np.float32), np.float32(rate))

    def upload(state: FederatedState, id: int, report: RoundReport, i: int, key: jax.Array) -> Params:
        if report.params is not None:
            return jax.tree.map(lambda leaf: leaf[i], report.params)
        rate = np.float32(report.learning_rates[i])
        coefficients = mezo.coefficients(rate, np.asarray(report.projected_gradients[i], np.float32))
        return reconstruct(state, id, coefficients, rate, key)

    def coefficients_of(report: RoundReport, counted: np.ndarray) -> np.ndarray:
        rates = np.asarray(report.learning_rates, np.float32)[counted, None, None]
        return mezo.coefficients(rates, np.asarray(report.projected_gradients)[counted])

    def norms_of(report: RoundReport, counted: np.ndarray) -> np.ndarray:
        norms = np.zeros(len(counted), np.float32)
        squares = np.asarray(coefficients_of(report, counted), np.float64) ** 2
        norms[counted] = np.sqrt(np.sum(squares, axis=(1, 2)))
        return norms

    def shares(state: FederatedState, ids: np.ndarray, weights: np.ndarray, report: RoundReport) -> np.ndarray:
        share = aggregation.shares(weights)
        if not bound_norms:
            return share
        counted = share > 0
        norms, known = norms_of(report, counted), np.array(state.signals.norms)
        known[ids[counted]] = norms[counted]
        return aggregation.clip_norms(share, norms, known)

    def combine(state: FederatedState, ids: np.ndarray, weights: np.ndarray, report: RoundReport) -> np.ndarray:
        share = shares(state, ids, weights, report)
        counted = share > 0  # the others may have sent anything
        return aggregator.combine_coefficients(share[counted], coefficients_of(report, counted))

    def apply_combined(state: FederatedState, coefficients: np.ndarray, key: jax.Array) -> FederatedState:
        return step(state, _difference(reconstruct(state, 0, coefficients, 0, key), state.params))

    def step(state: FederatedState, update: Params) -> FederatedState:
        params, optimizer_state = move(state.params, update, state.optimizer)
        return state._replace(params=params, optimizer=optimizer_state, round=state.round + 1)

    def apply(
        state: FederatedState,
        ids: np.ndarray,
        weights: np.ndarray,
        report: RoundReport,
        key: jax.Array,
        uploads: Iterable[Params | None] | None = None,
    ) -> FederatedState:
        share, deltas = shares(state, ids, weights, report), []

        def counted() -> Iterator[Params]:
            all_params = uploads or (
                upload(state, id, report, i, key) if share[i] else None for i, id in enumerate(ids)
            )
            for weight, client_params in zip(share, all_params, strict=True):
                if weight:
                    deltas.extend([_difference(client_params, state.params)] if by_drift else [])
                    yield client_params

        if directions_shared and uploads is None and report.params is None:
            moved = apply_combined(state, combine(state, ids, weights, report), key)
            deque(counted() if by_drift else (), 0)
        else:
            moved = step(state, aggregator.combine_params(state.params, share[share > 0], counted()))
        drift = np.zeros(len(share), np.float32)
        if deltas:
            drift[share > 0] = aggregation.client_drift(jax.tree.map(lambda *leaves: jnp.stack(leaves), *deltas))
        # A program of its own: a replay, which needs no signals, moves θ by the very same ones.
        losses = mean_losses(np.asarray(report.losses))
        norms = norms_of(report, share > 0) if bound_norms else None
        return moved._replace(signals=observe(state.signals, ids, losses, drift if deltas else None, norms, share > 0))

    move, observe = partial(_move, optimizer), jax.jit(personalization.observe)
    work_of_all, rates_of = partial(_work, settings), partial(_rates, rates)
    return Federated(init, Round(work_of_all, apply, combine, apply_combined, upload, rates_of, directions_shared))


@jax.jit
def _difference(new: Params, old: Params) -> Params:
    return jax.tree.map(jnp.subtract, new, old)


@partial(jax.jit, static_argnums=0)
def _work(
    settings: WorkSettings,
    state: FederatedState,
    loss: Any,
    cohort: Cohort,
    key: jax.Array,
    transform: Any = None,
    damping: Any = None,
) -> RoundReport:
    work, rates, block_size, directions_shared, mesh, least_width = settings
    groups = 1 if mesh is None else mesh.shape[CLIENTS]
    ids = jnp.asarray(cohort.ids)
    rate = cohort_rates(rates, state, ids, key, damping)
    clients, rows = ids.shape[0], jax.tree.leaves(cohort.batches)[0].shape[0]
    places = jnp.where(jnp.arange(rows) < clients, jnp.arange(rows), 0)

    def run_block(block):
        ids, rate, batches = block
        done = local_work(work, state, loss, ids, rate, batches, key, directions_shared, transform)
        return done.losses, done.projected_gradients, None if work.reconstruct else done.params

    block = (ids[places], rate[places], cohort.batches)
    blocks = in_blocks(block, groups, block_size or rows, least_width)
    if mesh is not None:
        blocks = jax.lax.with_sharding_constraint(blocks, NamedSharding(mesh, P(None, CLIENTS)))
    outcome = map_blocks(run_block, blocks, state.round)
    outcome = jax.tree.map(lambda leaf: leaf[:clients], out_of_blocks(outcome, groups, rows))
    if mesh is not None:
        outcome, rate = jax.lax.with_sharding_constraint((outcome, rate), NamedSharding(mesh, P()))
    losses, gradients, params = outcome
    return RoundReport(losses, gradients, rate, params)


_move = jax.jit(aggregation.apply_mean_update, static_argnums=0)
_rates = jax.jit(cohort_rates, static_argnums=0)
