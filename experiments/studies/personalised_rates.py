"""Which signal should personalise the clients' learning rates (Fig. 4 of arXiv 2402.05926).

python -m experiments.studies.personalised_rates

Every strategy is compared with a common rate (``frozen``) by a paired t-test over seeds. Three controls ignore
heterogeneity: random rates from the same range, model-diff's rates assigned to random clients (``shuffled``), and a
common rate that is a quarter larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments import _cli
from experiments.studies import runner
from fedmezo_jax.core.personalization import STRATEGIES


def variants(learning_rate: float) -> runner.Variants:
    """Returns the strategies, and a larger common rate."""
    strategies = runner.vary("personalize", STRATEGIES, "{}")
    return {**strategies, "frozen, 1.25 η₀": {"learning_rate": 1.25 * learning_rate}}


PRESETS = runner.standard_presets(variants(runner.SMALL.fixed_rate), variants(runner.PAPER.fixed_rate), num_seeds=6)


def conclude(outcomes: Sequence[runner.Outcome]) -> list[dict[str, Any]]:
    """Returns a row per strategy, with its mean difference from ``frozen`` and the p-value of the test."""
    frozen = outcomes[0].after
    compared = []
    for row, outcome in zip(runner.rows(outcomes), outcomes, strict=True):
        difference = outcome.after - frozen
        is_testable = outcome.label != "frozen" and np.ptp(difference) > 0
        p = float(np.asarray(stats.ttest_rel(outcome.after, frozen).pvalue)) if is_testable else None
        compared.append(row | {"over_frozen": float(np.mean(difference)), "p_paired": p})
    return compared


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "personalised_rates", PRESETS, title="personalised learning rates", conclude=conclude)


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
