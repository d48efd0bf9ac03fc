"""``--learning-rate auto``: no rate to tune.

The first round's rate is low: a local step moves each entry of θ by :data:`FIRST_MOVE` in root mean square. After each
round the server searches along the round's update, by the loss of validation examples of its own. Where the whole update
does not raise that loss, it also tries twice the update and takes the better one; where it does, a quarter; and where
that raises the loss too, none of it. What it took decides the next round's rate (:data:`STEPS`): a higher one for as
long as larger steps help, and a lower one as soon as they do not.

So the validation loss never rises, and the rate follows the curvature, which grows as the adapter does: a rate that
suits a whole run cannot be known at its start. What was taken stands in the ledger, so that a replay needs no losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

FIRST_MOVE = 2e-3
"""Root mean square of the first local step's change, over the entries of θ."""
STEPS = {2.0: 1.4, 1.0: 1.1, 0.25: 0.7, 0.0: 0.5}
"""How much of an update the server may take, and by what the rate is multiplied then."""
VALIDATION = 32
"""Training examples that the server keeps for its validation loss."""


def first_rate(mean_square: float, directions: int) -> float:
    """η of the first round: with g ~ N(0, E‖∇F‖²) a step changes each entry of θ by η·√(E‖∇F‖²/n) in root mean square.

    Args:
        mean_square: E‖∇F‖², of a single batch.
        directions: n.
    """
    return float(np.float32(FIRST_MOVE * math.sqrt(directions / max(mean_square, 1e-20))))


def choose_step(validation_loss: Callable[[float], float], before: float) -> tuple[float, float]:
    """How much of a round's update the server takes, and its validation loss then.

    Args:
        validation_loss: the loss after so much of the update.
        before: the loss without it.
    """
    whole = validation_loss(1.0)
    further = 2.0 if whole <= before else 0.25
    losses = {0.0: before, 1.0: whole, further: validation_loss(further)}
    step = min(losses, key=lambda step: (losses[step] if math.isfinite(losses[step]) else math.inf, -step))
    return step, losses[step]


def next_rate(rate: Any, step: float) -> np.float32:
    """The rate after a round of which the server took ``step``; ``rate`` is the round's, a float32 scalar."""
    return np.float32(jax.device_get(rate)) * np.float32(STEPS[step])
