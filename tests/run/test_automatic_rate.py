"""The rule behind ``--learning-rate auto``: what it takes of an update, and the rate that follows."""

import math

import numpy as np
import pytest

from fedmezo_jax.core.federated import RoundReport
from fedmezo_jax.run.automatic_rate import FIRST_MOVE, STEPS, choose_step, first_rate, next_rate


def along(**losses):
    """A validation loss that is known where it is asked for, and what was asked."""
    known, asked = {float(step.replace("_", ".").strip("at")): loss for step, loss in losses.items()}, []
    return lambda step: (asked.append(step), known[step])[1], asked


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"at1": 0.9, "at2": 0.8}, 2.0),
        ({"at1": 0.8, "at2": 0.9}, 1.0),
        ({"at1": 0.8, "at2": math.nan}, 1.0),
        ({"at1": 1.1, "at0_25": 0.95}, 0.25),
        ({"at1": 1.1, "at0_25": 1.05}, 0.0),
        ({"at1": math.inf, "at0_25": 0.99}, 0.25),
        ({"at1": math.nan, "at0_25": math.nan}, 0.0),
        ({"at1": math.nan, "at0_25": math.inf}, 0.0),
        ({"at1": 1.0, "at2": 1.0}, 2.0),  # where nothing changes the loss, the rate is too small
    ],
)
def test_the_server_takes_what_lowers_its_loss_most(losses, expected):
    validation_loss, asked = along(**losses)
    assert choose_step(validation_loss, 1.0) == expected
    assert asked == [1.0, 2.0 if losses["at1"] <= 1 else 0.25]  # two measurements a round


def test_the_loss_never_rises_whatever_the_update_is():
    random = np.random.default_rng(0)
    for _ in range(200):
        losses = dict.fromkeys(STEPS)
        losses |= {step: random.choice([math.nan, math.inf, random.normal(1, 1)]) for step in (0.25, 1.0, 2.0)}
        step = choose_step(losses.__getitem__, 1.0)
        assert step == 0 or losses[step] <= 1.0
        assert step in STEPS


@pytest.mark.parametrize("start", [1e-3, 0.3, 5.0, 300.0])
def test_a_rate_below_the_edge_of_stability_is_found_from_anywhere(start):
    """On L = θ²/2 a move of −η·θ lowers the loss for η < 2, and most at η = 1."""
    rate, seen = np.float32(start), []
    for _ in range(60):
        rate = next_rate(rate, choose_step(lambda step, rate=rate: 0.5 * (1 - step * rate) ** 2, 0.5))
        seen.append(float(rate))
    assert all(0.5 < rate < 2.3 for rate in seen[-20:])


def test_rates_are_rounded_to_float32_as_the_ledger_holds_them():
    rate = np.float32(0.1)
    for step in (2.0, 1.0, 0.25, 0.0):
        rate = next_rate(rate, step)
        assert rate.dtype == np.float32
    assert float(rate) == pytest.approx(0.1 * 1.4 * 1.05 * 0.5 * 0.35)


def report_of(gradients):
    return RoundReport(np.zeros(gradients.shape[:2]), gradients, np.zeros(len(gradients)))


def test_the_first_step_moves_each_entry_by_what_it_says():
    """Simulated: g = ⟨∇F, z⟩ for n directions, Δθ = −(η/n)·Σ g·z."""
    random = np.random.default_rng(1)
    gradient, directions = random.standard_normal(400) * 3, 4
    z = random.standard_normal((2000, directions, 400))
    slopes = z @ gradient
    rate = first_rate(report_of(slopes[None]), 400)
    moves = rate / directions * np.einsum("sk,skd->sd", slopes, z)
    assert np.sqrt(np.mean(moves**2)) == pytest.approx(FIRST_MOVE, rel=0.1)


@pytest.mark.parametrize("gradient", [0.0, np.nan, np.inf, 1e-30, 1e30])
def test_whatever_was_measured_there_is_a_first_rate(gradient):
    rate = first_rate(report_of(np.full((2, 3, 1), gradient)), 400)
    assert 0 < np.float32(rate) < np.inf


def test_back_propagated_steps_have_one_too():
    assert 0 < first_rate(None, 400) < np.inf
