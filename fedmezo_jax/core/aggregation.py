"""The server's aggregation: who takes part in a round, and what the clients' updates become."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmezo_jax.core.mezo import Params
from fedmezo_jax.core.random import PARTICIPANTS
from fedmezo_jax.core.robust_rules import RULES, Rule

Aggregation: TypeAlias = Literal[
    "mean", "norm-clip", "median", "trimmed-mean", "krum", "multi-krum", "polar-krum", "geometric-median"
]


class Aggregator(Protocol):
    """How the updates of a round's K clients become one. Clients that are left out are not among the K.

    Both methods run on the host, outside of any compiled program, and each program that they compile is one of their
    own: the run and its replay execute the same ones. ``weights`` are ``[K]`` float32, above zero and summing to one,
    or to less where clients' norms are bounded (:func:`clip_norms`). ``docs/extending.md`` adds a rule.
    """

    def combine_coefficients(self, weights: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """How far shared directions move θ, ``[H, n]`` float32, from ``[K, H, n]`` :func:`mezo.coefficients`."""
        ...

    def combine_params(self, params: Params, weights: np.ndarray, uploads: Iterable[Params]) -> Params:
        """The update of θ, a tree like it, from the clients' θ_i, which come one by one and may not all fit at once."""
        ...


class WeightedMean:
    """Σ_i w_i·c_i along shared directions, and Σ_i w_i·(θ_i − θ): FedAvg (arXiv 1602.05629)."""

    def combine_coefficients(self, weights: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """Summed client by client in float64, so that every machine gets the same."""
        total = np.zeros(coefficients.shape[1:], np.float64)
        for weight, row in zip(weights, coefficients, strict=True):
            total += np.float64(weight) * row
        return total.astype(np.float32)

    def combine_params(self, params: Params, weights: np.ndarray, uploads: Iterable[Params]) -> Params:
        """Summed as they come, one θ_i in memory at a time."""
        total = jax.tree.map(jnp.zeros_like, params)
        for weight, client_params in zip(weights, uploads, strict=True):
            total = _add_weighted(total, weight, client_params, params)
        return total


@dataclass(frozen=True)
class Robust:
    """A robust rule, along shared directions or over the entries of θ. It does not weigh clients.

    Over the entries of θ all K updates are on the host at once, in float64.

    Attributes:
        rule: of :data:`robust_rules.RULES`.
        byzantine_share: f/K, the share of clients that may lie; f is rounded down.
    """

    rule: Rule
    byzantine_share: float

    def _combine(self, vectors: np.ndarray) -> np.ndarray:
        return self.rule(vectors, int(self.byzantine_share * len(vectors))).astype(np.float32)

    def combine_coefficients(self, weights: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """The rule on the rows of ``[K, H·n]``."""
        del weights
        vectors = np.asarray(coefficients, np.float64).reshape(len(coefficients), -1)
        return self._combine(vectors).reshape(coefficients.shape[1:])

    def combine_params(self, params: Params, weights: np.ndarray, uploads: Iterable[Params]) -> Params:
        """The rule on the rows of ``[K, D]``, the updates of all D entries of θ."""
        del weights
        leaves, structure = jax.tree.flatten(params)
        before = _flat(params)
        update = self._combine(np.stack([_flat(client_params) - before for client_params in uploads]))
        parts = np.split(update, np.cumsum([leaf.size for leaf in leaves])[:-1])
        return structure.unflatten(part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True))


def _flat(params: Params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))], dtype=np.float64)


def aggregator_of(aggregation: Aggregation, byzantine_share: float) -> Aggregator:
    """The aggregator of that name. ``norm-clip`` is the mean, of updates that :func:`clip_norms` has bounded."""
    if aggregation in RULES:
        return Robust(RULES[aggregation], byzantine_share)
    return WeightedMean()


def clip_norms(weights: np.ndarray, norms: np.ndarray, known: np.ndarray) -> np.ndarray:
    """``[P]`` float32 weights, lowered for updates longer than the median: w_i·min(1, median/‖c_i‖).

    Args:
        weights: ``[P]`` float32.
        norms: ``[P]`` ‖c_i‖ of the round's clients.
        known: ``[N]`` the last norms of all clients, this round's among them; NaN where unknown. Of these the median is
            taken, so that liars who happen to be most of one round cannot raise it.
    """
    bound = np.nanmedian(known)
    return np.where(norms > bound, weights * bound / np.where(norms > bound, norms, 1), weights).astype(np.float32)


@jax.jit
def _add_weighted(total: Params, weight: jax.Array, new: Params, old: Params) -> Params:
    return jax.tree.map(lambda t, n, o: t + weight * (n - o), total, new, old)


def shares(weights: np.ndarray) -> np.ndarray:
    """``[P]`` weights scaled to sum to one, float32; at least one is above zero."""
    return (np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64)).astype(np.float32)


def client_drift(deltas: Params) -> jax.Array:
    """‖Δ_i − mean_j Δ_j‖ over all parameters, ``[P]`` float32, from a tree of ``[P, …]`` updates.

    The mean weighs clients alike, as in the paper (its reference sums the norms of the leaves instead of taking one
    norm).
    """

    def squared(leaf):
        centred = leaf - jnp.mean(leaf, axis=0)
        return jnp.sum(centred.reshape(centred.shape[0], -1) ** 2, axis=1)

    return jnp.sqrt(sum(map(squared, jax.tree.leaves(deltas)), start=jnp.zeros(())))


def apply_mean_update(
    optimizer: optax.GradientTransformation, params: Params, mean_delta: Params, state: optax.OptState
) -> tuple[Params, optax.OptState]:
    """Moves θ by the server's optimizer on the pseudo-gradient −Σ_i w_i·Δ_i (FedOpt, arXiv 2003.00295).

    ``optax.sgd(1.0)`` is plain averaging, θ + Σ_i w_i·Δ_i: FedAvg.
    """
    updates, state = optimizer.update(jax.tree.map(jnp.negative, mean_delta), state, params)
    return optax.apply_updates(params, updates), state


def sample_participants(seed: int, round_index: int, clients: int, count: int, attempt: int = 0) -> np.ndarray:
    """The ids of one round's clients, ``[count]`` int32, sorted and distinct: a function of its arguments alone.

    A further attempt at the round, after all of its clients failed, draws others.
    """
    if count == clients:
        return np.arange(clients, dtype=np.int32)
    stream = (PARTICIPANTS, attempt) if attempt else (PARTICIPANTS,)
    generator = np.random.default_rng(np.random.SeedSequence([seed, round_index], spawn_key=stream))
    return np.sort(generator.choice(clients, count, replace=False)).astype(np.int32)
