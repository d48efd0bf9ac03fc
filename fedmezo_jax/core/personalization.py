"""Each client's learning rate, from how heterogeneous it is (Prop. 3.7, arXiv 2402.05926).

All functions are pure. The signals that personalise learning rates are kept for each of the N clients of the
federation, whether or not it takes part in a round.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp

Strategy: TypeAlias = Literal["frozen", "random", "round-wise", "five-round", "model-diff", "shuffled"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
BY_DRIFT = ("model-diff", "shuffled")
"""Strategies for which client drift is measured."""
HISTORY = 5
"""Rounds that the five-round strategy looks back (Sec. 3.3, arXiv 2402.05926)."""


class RateConfig(NamedTuple):
    """How learning rates are set.

    Attributes:
        learning_rate: η₀ > 0.
        strategy: what Φ_i is made of; ``frozen`` gives every client η₀; ``shuffled`` deals out at random, each round
            anew, what ``model-diff`` has: a control with the same rates that knows nothing of whom they are for.
        scale: A in [0, 1), with α = A·η₀: rates stay within η₀(1 ± A), above zero. The paper's 5e-6 at 1e-5 is 0.5.
    """

    learning_rate: float = 1e-3
    strategy: Strategy = "frozen"
    scale: float = 0.5


class Signals(NamedTuple):
    """What the server remembers of each client. NaN stands for "not seen yet".

    Attributes:
        losses: ``[N, 5]`` float32, its mean training losses of the last rounds it took part in, newest first.
        drift: ``[N]`` float32, its client drift ‖Δ_i − mean_j Δ_j‖ in the last round it took part in.
        norms: ``[N]`` float32, the norm of its coefficients in the last round it took part in.
    """

    losses: jax.Array
    drift: jax.Array
    norms: jax.Array


def init_signals(clients: int) -> Signals:
    """Signals of ``clients`` clients of which nothing is known."""
    unknown = jnp.float32(jnp.nan)  # with its type: weakly typed, a resumed run's program would be another one
    return Signals(jnp.full((clients, HISTORY), unknown), *(jnp.full((clients,), unknown) for _ in range(2)))


def observe(
    signals: Signals,
    participants: jax.Array,
    losses: jax.Array,
    drift: jax.Array | None,
    norms: jax.Array | None = None,
    counted: jax.Array | bool = True,
) -> Signals:
    """Records a round.

    Args:
        signals: of all N clients.
        participants: ``[P]`` int32, distinct ids of the clients that took part.
        losses: ``[P]`` float32, their mean training losses.
        drift: ``[P]`` float32, their client drift, or None where it is not measured.
        norms: ``[P]`` float32, the norms of their coefficients, or None where they are not measured.
        counted: ``[P]`` bool, which of them returned a result; nothing changes for the others.
    """
    before = signals.losses[participants]
    counted = jnp.broadcast_to(counted, losses.shape)
    history = jnp.where(counted[:, None], jnp.concatenate([losses[:, None], before[:, :-1]], axis=1), before)

    def latest(known: jax.Array, new: jax.Array | None) -> jax.Array:
        return known if new is None else known.at[participants].set(jnp.where(counted, new, known[participants]))

    losses_known = signals.losses.at[participants].set(history)
    return Signals(losses_known, latest(signals.drift, drift), latest(signals.norms, norms))


def heterogeneity_index(signal: jax.Array) -> jax.Array:
    """Φ_i = (s_i − mean_j s_j) / max_j |s_j − mean s| (Prop. 3.7, arXiv 2402.05926).

    Args:
        signal: ``[N]`` float32; NaN for a client whose signal is not known yet.

    Returns:
        ``[N]`` float32 in [−1, 1]: 0 where the signal is unknown, and 0 for all where all signals are equal.
    """
    known = jnp.isfinite(signal)
    mean = jnp.sum(jnp.where(known, signal, 0)) / jnp.maximum(jnp.sum(known), 1)
    centred = jnp.where(known, signal - mean, 0)
    # Equal signals differ from their own mean by rounding alone, which must not be blown up to ±1.
    widest = jnp.max(jnp.abs(centred))
    spread = widest > 4 * jnp.finfo(signal.dtype).eps * jnp.abs(mean)
    return jnp.where(spread, centred / jnp.where(spread, widest, 1), 0)


def learning_rates(config: RateConfig, signals: Signals, key: jax.Array) -> jax.Array:
    """Each client's rate for the coming round, η_i = η₀·(1 + A·Φ_i) (Prop. 3.7 with α = A·η₀).

    Args:
        config: η₀, A and the strategy.
        signals: of all N clients.
        key: the round's key, used by ``random`` and ``shuffled``.

    Returns:
        ``[N]`` float32.
    """
    clients = signals.drift.shape[0]
    if config.strategy == "frozen":
        index = jnp.zeros((clients,))
    elif config.strategy == "random":
        index = jax.random.uniform(key, (clients,), minval=-1.0, maxval=1.0)
    elif config.strategy == "round-wise":
        index = heterogeneity_index(signals.losses[:, 0])
    elif config.strategy == "five-round":
        index = heterogeneity_index(jnp.mean(signals.losses, axis=1))  # NaN until all five are there
    else:
        index = heterogeneity_index(signals.drift)
    if config.strategy == "shuffled":
        index = jax.random.permutation(key, index)
    return config.learning_rate * (1 + config.scale * index)
