"""Which signal should personalise the clients' learning rates (Fig. 4 of arXiv 2402.05926).

python -m experiments.studies.personalised_rates

Every strategy is held against one rate for all (``frozen``) by a paired t-test over seeds. Three controls are blind to
heterogeneity: rates drawn at random from the same range, model-diff's own rates dealt out at random (``shuffled``), and
one rate for all that is a quarter larger.
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
    """The strategies, and a larger rate for all."""
    strategies = runner.vary("personalize", STRATEGIES, "{}")
    return {**strategies, "frozen, 1.25 η₀": {"learning_rate": 1.25 * learning_rate}}


PRESETS = runner.standard_presets(variants(runner.SMALL.fixed_rate), variants(runner.PAPER.fixed_rate), num_seeds=6)


def conclude(outcomes: Sequence[runner.Outcome]) -> list[dict[str, Any]]:
    """A row a strategy, with its mean difference from ``frozen`` and that test's p."""
    frozen = outcomes[0].after
    found = []
    for row, one in zip(runner.rows(outcomes), outcomes, strict=True):
        difference = one.after - frozen
        tested = one.label != "frozen" and np.ptp(difference) > 0
        p = float(np.asarray(stats.ttest_rel(one.after, frozen).pvalue)) if tested else None
        found.append(row | {"over_frozen": float(np.mean(difference)), "p_paired": p})
    return found


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "personalised_rates", PRESETS, title="personalised learning rates", conclude=conclude)


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
