"""When a run diverges, what announces it, and how large a projected gradient may be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fedmezo_jax.core import mezo
from fedmezo_jax.core.federated import RoundReport
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.config_parts import LocalConfig

MEMORY = 10
"""Recent rounds that decide what is typical."""
DIVERGED_ABOVE = 1.5
"""A round's mean loss this many times the typical one has diverged."""
CLIP = 5.0
"""Projected gradients are g ~ N(0, ‖∇F‖²) along Gaussian directions: one beyond five standard deviations is no draw."""

GROWTH, ENOUGH = 2.5, 8
"""Growth of projected gradients over a round's local steps that announces divergence; fewer of them are not judged."""


class Typical(NamedTuple):
    """What recent rounds measured, of those that were kept.

    Attributes:
        loss: median of their training losses (:func:`median_loss`); before there are any, the test loss of the base
            model.
        gradient: median of their projected gradients (:func:`median_gradient`); infinite before there are any.
    """

    loss: float
    gradient: float

    @property
    def limit(self) -> float:
        """Largest projected gradient that is not clipped."""
        return CLIP * self.gradient

    def diverged(self, losses: np.ndarray) -> bool:
        """Whether the ``[P, H]`` losses of a round have exploded, those of half of its clients or more."""
        return bool(len(losses)) and not median_loss(losses) <= DIVERGED_ABOVE * self.loss


def kept(record: Mapping[str, Any]) -> bool:
    """Whether a round, by its record in ``metrics.jsonl``, counts as typical."""
    return not (record["diverged"] or record["rolled_back"]) and record["server_step"] > 0


def typical(loss_before: float, recent: Collection[Mapping[str, Any]]) -> Typical:
    """What the last :data:`MEMORY` rounds that were kept measured, by their records."""
    if not recent:
        return Typical(loss_before, np.inf)
    losses = [record["median_loss"] for record in recent if record["median_loss"] is not None] or [loss_before]
    gradients = [record["median_gradient"] for record in recent if record["median_gradient"] is not None]
    return Typical(float(np.median(losses)), float(np.median(gradients)) if gradients else np.inf)


def median_loss(losses: np.ndarray) -> float:
    """Median over P clients of each one's mean loss, from ``[P, H]``: fewer than half of them cannot make it large.

    A client with a loss that is not finite counts as infinite.
    """
    with np.errstate(invalid="ignore"):
        means = np.mean(losses, axis=1, dtype=np.float64)
    return float(np.median(np.where(np.isfinite(means), means, np.inf)))


def _gradients(report: RoundReport, counted: np.ndarray) -> np.ndarray:
    """``[K, H, n]`` projected gradients of the clients that count, in float64 as their squares may be large."""
    return np.asarray(report.projected_gradients, np.float64)[counted]


def gradient_rms(report: RoundReport, counted: np.ndarray) -> float | None:
    """Root mean square of g over the clients that count: an estimate of ‖∇F‖; None for back-propagation and nobody."""
    gradients = _gradients(report, counted)
    return float(np.sqrt(np.mean(gradients**2))) if gradients.size else None


def median_gradient(report: RoundReport, counted: np.ndarray) -> float | None:
    """A robust estimate of ‖∇F‖: the median over clients of each one's root-mean-square g. None as above.

    The mean square of k normal numbers has a median below its mean, by the factor (1 − 2/9k)³ (Wilson and Hilferty),
    which is divided out.
    """
    gradients = _gradients(report, counted)
    if not gradients.size:
        return None
    squares = np.mean(gradients**2, axis=(1, 2))
    return float(np.sqrt(np.median(squares) / (1 - 2 / (9 * gradients[0].size)) ** 3))


def count_clipped(report: RoundReport, counted: np.ndarray, limit: float) -> int:
    """Steps of the clients that count with a projected gradient at the limit, or with a loss that is not finite."""
    at_limit = np.abs(report.projected_gradients) >= np.float32(limit)
    return int(np.sum((at_limit.any(axis=2) | ~np.isfinite(report.losses))[counted]))


class Probe(NamedTuple):
    """What decides how large a learning rate may be, measured at one θ.

    Attributes:
        gradient: ‖∇f‖², f the mean loss over the batches probed.
        noisy_gradient: E‖∇F‖², of a single batch; c_g = E‖∇F‖²/‖∇f‖² is the paper's gradient noise.
        trace: tr(H) of f's Hessian.
    """

    gradient: float
    noisy_gradient: float
    trace: float

    @property
    def largest_rate(self) -> float:
        """2‖∇f‖² / (E‖∇F‖²·tr H) = 2 / (c_g·tr H): beyond it a local step is expected to raise the loss.

        A step changes the loss by −η‖∇f‖² + η²/2·E[g²·zᵀHz], and E[g²·zᵀHz] ≈ E‖∇F‖²·tr H. It is the condition
        η ≤ N/(3·c_g·H·L) of arXiv 2402.05926 for one client and one step, with tr H, which can be measured and which
        bounds L. Infinite where there is no curvature, zero where no common gradient could be told from noise.
        """
        if self.trace <= 0 or self.noisy_gradient <= 0:
            return np.inf
        return 2 * max(self.gradient, 0.0) / (self.noisy_gradient * self.trace)


def probe(
    pair_loss: mezo.PairLoss, params: mezo.Params, batches: Any, key: jax.Array, scale: float, directions: int
) -> Probe:
    """Measures a :class:`Probe` from losses at θ, θ + μz and θ − μz over the same z for all batches.

    With g = (L₊ − L₋)/2μ: E[g²] = E‖∇F‖², the mean of g_a·g_b over batches a ≠ b is ‖∇f‖², and the mean of
    (L₊ + L₋ − 2L₀)/μ² is tr(H), each over z with entries of mean 0 and variance 1.

    Args:
        pair_loss: the model's.
        params: θ.
        batches: leaves ``[B, …]``, B ≥ 2.
        key: of the directions; apart from the run's own.
        scale: μ.
        directions: K, how many z; 2·B·(K + 1) forward passes.
    """

    loss = pair_loss if isinstance(pair_loss, Partial) else Partial(pair_loss)
    here, plus, minus = jax.device_get(_losses_around(loss, params, batches, key, scale, directions))
    slopes, bends = (plus - minus) / (2 * scale), (plus + minus - 2 * here) / scale**2
    count = slopes.shape[1]
    pairs = (slopes.sum(axis=1) ** 2 - (slopes**2).sum(axis=1)) / (count * (count - 1))
    return Probe(float(pairs.mean()), float((slopes**2).mean()), float(bends.mean()))


@partial(jax.jit, static_argnums=(4, 5))
def _losses_around(loss, params, batches, key, scale, directions):
    """Losses at θ, ``[B]``, and at θ + μz and θ − μz, ``[K, B]``."""

    def at(k, scale):
        perturbation = mezo.Perturbation(jax.random.fold_in(key, k), scale)
        return jax.vmap(loss, in_axes=(None, 0, None))(params, batches, perturbation)

    return at(0, 0.0)[0], *jax.lax.map(lambda k: at(k, scale), jnp.arange(directions))


def count(params: mezo.Params) -> int:
    """d, the trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def step_length(rate: float, gradient: float, trained: int, steps: int = 1) -> float:
    """η·|g|·√(d·H): how far H local steps carry θ, a random walk whose steps have ‖z‖ ≈ √d."""
    return rate * gradient * float(np.sqrt(trained * steps))


def growth(report: RoundReport, counted: np.ndarray) -> float | None:
    """How much larger |g| is in the last third of the local steps than in the first, in root mean square.

    Local steps that carry θ to where the loss is steep show here before they do in the round's loss. None where there
    are too few to tell.
    """
    gradients = _gradients(report, counted)
    third = gradients.shape[1] // 3
    first, last = gradients[:, :third], gradients[:, gradients.shape[1] - third :]
    if first.size < ENOUGH or not np.any(first):
        return None
    return float(np.sqrt(np.mean(last**2) / np.mean(first**2)))


def warnings(probe: Probe, config: LocalConfig, trained: int) -> list[str]:
    """What there is to warn of before the first round."""
    if config.learning_rate == "auto" or config.learning_rate <= probe.largest_rate:
        return []
    step = step_length(config.learning_rate, probe.noisy_gradient**0.5, trained)
    return [
        f"--learning-rate {config.learning_rate:g} is above {probe.largest_rate:.2g}, beyond which a local step is "
        f"expected to raise the loss (it moves θ by η·|g|·√d = {step:.2g}): the loss is likely to diverge"
    ]


def describe(probe: Probe, config: RunConfig, trained: int) -> list[str]:
    """The probe in words, with the paper's conditions beside it (tr H stands for L, which it bounds)."""
    noise = probe.noisy_gradient / probe.gradient if probe.gradient > 0 else np.inf
    steps, smooth = config.local_steps, max(probe.trace, 1e-30)
    first, second = (
        1 / (3 * steps * smooth * np.sqrt(noise * trained)),
        config.participants / (3 * noise * steps * smooth),
    )
    return [
        f"measured at the start: ‖∇f‖² {probe.gradient:.3g}, E‖∇F‖² {probe.noisy_gradient:.3g} (c_g {noise:.3g}), "
        f"tr H {probe.trace:.3g}; a local step is expected to raise the loss beyond η = {probe.largest_rate:.2g}",
        f"the paper's anchor 1/√d = {trained**-0.5:.2g} for d = {trained:,} trained parameters; its conditions: "
        f"1/(3HL√(c_g·d)) = {first:.2g}, N/(3·c_g·H·L) = {second:.2g}, 1/H² = {steps**-2:.2g}",
    ]
