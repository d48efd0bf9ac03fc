"""The study of the automatic learning rate: its search for the best fixed rate, and what it compares."""

import math

import pytest

from experiments.studies import automatic_rate, rate_search


@pytest.mark.parametrize("best", [-9, -4, 0, 3])
@pytest.mark.parametrize("start", [-5, 0, 5])
def test_the_best_rate_has_a_worse_one_on_both_sides(best, start):
    """A loss with its lowest value at 2**best, which is not finite for rates that are four times as large."""
    tried = []

    def losses_at(rate):
        tried.append(rate)
        distance = math.log2(rate) - best
        return [math.nan] if distance >= 2 else [distance**2, 1.0 + distance**2]

    found = dict(rate_search.search(losses_at, 2.0**start))
    assert min(found) < 2.0**best < max(found)
    assert len(tried) == len(set(tried)) == len(found)
    assert [2.0**best * factor in found for factor in (0.5, 1.0, 2.0)] == [True] * 3


def test_a_rate_at_which_one_seed_diverges_is_not_the_best():
    found = dict(rate_search.search(lambda rate: [1 / rate, math.inf if rate > 4 else 1 / rate], 1.0))
    assert max(found) == 8.0
    fixed = [(2.0, [0.5, 0.5]), (4.0, [0.25, 0.25]), (8.0, [0.1, math.inf])]
    run = {"layers": "all", "lora_rank": 8, "local_steps": 10}
    row = automatic_rate.row({"run": run}, {"before": [1.25, 1.25], "auto": [0.5, 0.75], "fixed": fixed})
    assert (row["best_fixed_rate"], row["loss_best_fixed"], row["worst_auto"]) == (4.0, 0.25, 0.75)
    assert row["share_of_the_drop"] == pytest.approx((0.75 + 0.5) / 2)
