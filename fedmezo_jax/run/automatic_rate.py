"""``--learning-rate auto``: no rate to tune.

The first round's rate is low: a local step moves each entry of θ by :data:`FIRST_MOVE` in root mean square. After each
round the server searches along the round's update, by the loss of validation examples of its own. Where the whole
update does not raise that loss, it also tries twice the update and takes the better one; where it does, a quarter; and
where that raises the loss too, none of it. What it took decides the next round's rate (:data:`STEPS`): a higher one for
as long as larger steps help, and a lower one as soon as they do not.

So the validation loss never rises, and the rate follows the curvature, which grows as the adapter does: a rate that
suits a whole run cannot be known at its start. What was taken stands in the ledger, so that a replay needs no losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fedmezo_jax.core.federated import RoundReport

FIRST_MOVE = 2e-3
"""Root mean square of the first local step's change, over the entries of θ."""
STEPS = {2.0: 1.4, 1.0: 1.05, 0.25: 0.5, 0.0: 0.35}
"""How much of an update the server may take, and by what the rate is multiplied then."""
VALIDATION = 32
"""Training examples that the server keeps for its validation loss."""
LOWEST, HIGHEST = 1e-30, 1e30
"""The rate stays between these: float32 would otherwise end at 0 or at infinity, and no step leads back from there."""


def first_rate(report: RoundReport | None, trained: int, robust: bool = False) -> float:
    """η of the first round: √(mean of a first step's (Δθ)²) = :data:`FIRST_MOVE` over the entries of θ, in expectation.

    With g ~ N(0, E‖∇F‖²) along n directions that is η·√(E‖∇F‖²/n). Back-propagated steps move θ by η·∇F.

    Args:
        report: of a round at rate 0, all of whose steps are at θ's start; None for back-propagation, for which ‖∇F‖ is
            taken as 1.
        trained: d, the trained parameters.
        robust: whether E‖∇F‖² is the median over clients and not the mean, which one client can move.
    """
    square = 1 / trained
    if report is not None:
        gradients = np.asarray(report.projected_gradients, np.float64)
        square = np.median(np.mean(gradients**2, axis=(1, 2))) if robust else np.mean(gradients**2)
        square /= gradients.shape[-1]
    return rate_for(square)


def rate_for(square: float) -> float:
    """η with which a step whose entries have this mean square at η = 1 moves them by :data:`FIRST_MOVE`."""
    rate = FIRST_MOVE / math.sqrt(square) if 0 < square < math.inf else FIRST_MOVE
    return float(np.float32(np.clip(rate, LOWEST, HIGHEST)))


def choose_step(validation_loss: Callable[[float], float], before: float) -> float:
    """How much of a round's update the server takes: that which lowers its validation loss most, or none.

    Args:
        validation_loss: the loss after so much of the update.
        before: the loss without it.
    """
    whole = validation_loss(1.0)
    further = 2.0 if whole <= before else 0.25
    losses = {0.0: before, 1.0: whole, further: validation_loss(further)}
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda step: (finite[step], -step), default=0.0)


def next_rate(rate: Any, step: float) -> Any:
    """The rate after a round of which the server took ``step``; ``rate`` is the round's, float32 of NumPy or JAX."""
    return (rate * np.float32(STEPS[step])).clip(np.float32(LOWEST), np.float32(HIGHEST))
