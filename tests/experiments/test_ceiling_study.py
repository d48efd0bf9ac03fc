"""The study of what back-propagation reaches with so many trained layers."""

import numpy as np
import pytest

from experiments.studies import ceiling, runner
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.sweep import Curve


def outcome(trained, rate, *losses):
    """A curve for each seed, measured every second round."""
    curves = [Curve([0, 2, 4, 6, 8], list(curve), [], 0.1) for curve in losses]
    return runner.Outcome(f"{trained}, η = {rate:g}", paper_config(learning_rate=rate), curves)


def test_each_number_of_layers_is_shown_at_its_best_rate_and_round():
    outcomes = [
        outcome("last 1", 0.1, [3, 2.9, 2.8, 2.7, 2.6], [3, 2.9, 2.8, 2.7, 2.6]),
        outcome("last 1", 0.2, [3, 2.0, 1.0, 2.0, 2.5], [3, 2.0, 1.5, 2.0, 2.5]),  # lower, before it overfits
        outcome("last 1", 0.4, [3, 0.1, 0.1, 0.1, 0.1], [3, 3.0, 9.0, np.nan, np.nan]),  # a seed diverges
        outcome(ceiling.ALL, 0.1, [3, 2.5, 2.0, 1.5, 0.5], [3, 2.5, 2.0, 1.5, 1.5]),
        outcome(ceiling.ALL, 0.2, [3, 4.0, 4.0, 4.0, 4.0], [3, 4.0, 4.0, 4.0, 4.0]),
    ]
    last, whole = ceiling.conclude(outcomes)
    assert (last["trained"], last["learning_rate"], last["after_rounds"], last["lowest_loss"]) == (
        "last 1",
        0.2,
        4,
        1.25,
    )
    assert (whole["learning_rate"], whole["after_rounds"], whole["lowest_loss"]) == (0.1, 8, 1.0)
    assert [row["at_an_end_of_the_sweep"] for row in (last, whole)] == [False, True]
    assert [row["fell_in_the_last_quarter"] for row in (last, whole)] == [False, True]
    assert whole["p_paired"] is None
    # Differences 0.5 and 0: t = 1 with one degree of freedom, whose two-sided p is 0.5.
    assert last["p_paired"] == pytest.approx(0.5)


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_all_layers_are_among_what_is_compared(preset):
    variants = ceiling.PRESETS[preset].variants
    assert "all" in {fields["layers"] for fields in variants.values()}
    assert {fields["algorithm"] for fields in variants.values()} == {"fedavg"}
