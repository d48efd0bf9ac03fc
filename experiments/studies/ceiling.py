"""What back-propagation reaches from the last K layers on, run until it gains no more.

    python -m experiments.studies.ceiling

No estimator of the same gradient can be expected to end lower with these layers. Each K is shown at the best learning
rate of its sweep and after its best round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from experiments import _cli, _plots
from experiments.studies import runner

ALL = "all layers"
_ADAM = {"algorithm": "fedavg", "local_optimizer": "adam"}


def variants(counts: Sequence[int], rates: Sequence[float]) -> runner.Variants:
    """Back-propagation with Adam from the last layers on, each number of them at each rate."""
    layers = {f"last {count}": f"last:{count}" for count in counts} | {ALL: "all"}
    return runner.swept({label: ({**_ADAM, "layers": which}, rates) for label, which in layers.items()})


PRESETS: dict[runner.PresetName, runner.Preset] = {
    "small": runner.Preset(replace(runner.SMALL, rounds=60), 5, 2, variants((1, 2, 3, 4), (1e-3, 3e-3, 1e-2, 3e-2))),
    "paper": runner.Preset(runner.PAPER, 3, 10, variants((1, 2, 4, 8), (1e-4, 3e-4, 1e-3, 3e-3))),
    "smoke": runner.Preset(runner.SMOKE, 2, 1, variants((1,), (1e-3, 3e-3))),
}


def main(config: runner.Config) -> None:
    """Runs the study and draws its plot."""
    title = "back-propagation from the last layers on"
    out, outcomes = runner.run(config, "ceiling", PRESETS, title=title, conclude=conclude)
    plot(out / "ceiling.png", title, _best(outcomes))


def _means(outcome: runner.Outcome) -> np.ndarray:
    """The mean test loss at each measurement; infinite where a run has none."""
    return np.nan_to_num(np.mean([curve.test_loss for curve in outcome.curves], axis=0), nan=np.inf, posinf=np.inf)


def _best(outcomes: Sequence[runner.Outcome]) -> dict[str, runner.Outcome]:
    """For each K its outcome with the lowest mean test loss at any measurement."""
    best: dict[str, runner.Outcome] = {}
    for outcome in outcomes:
        label = outcome.label.partition(",")[0]
        if label not in best or _means(outcome).min() < _means(best[label]).min():
            best[label] = outcome
    return best


def conclude(outcomes: Sequence[runner.Outcome]) -> list[dict[str, Any]]:
    """A row for each K: its best rate and round, and the loss there.

    ``p_paired`` is of a paired t test against all layers, by seeds; ``fell_in_the_last_quarter`` says whether the mean
    loss still fell in the last quarter of the rounds, so that more of them would end lower.
    """
    best = _best(outcomes)
    lowest = {label: int(np.argmin(_means(outcome))) for label, outcome in best.items()}
    losses = {
        label: np.array([curve.test_loss[lowest[label]] for curve in outcome.curves]) for label, outcome in best.items()
    }
    rows = []
    for label, outcome in best.items():
        rates = [other.config.learning_rate for other in outcomes if other.label.partition(",")[0] == label]
        measured = outcome.curves[0].rounds
        several = label != ALL and len(outcome.curves) > 1
        rows.append(
            {
                "trained": label,
                "seeds": len(outcome.curves),
                "learning_rate": outcome.config.learning_rate,
                "at_an_end_of_the_sweep": outcome.config.learning_rate in (min(rates), max(rates)),
                "loss_before": float(_means(outcome)[0]),
                "lowest_loss": float(losses[label].mean()),
                "band_90": runner.half_width(losses[label]),
                "after_rounds": measured[lowest[label]],
                "fell_in_the_last_quarter": measured[lowest[label]] > 0.75 * measured[-1],
                "p_paired": float(stats.ttest_rel(losses[label], losses[ALL]).pvalue) if several else None,
            }
        )
    return rows


def plot(file: Any, title: str, best: dict[str, runner.Outcome]) -> None:
    """Plots the test loss over rounds, each K at its best rate."""
    figure, axes = _plots.subplots(figsize=(6.4, 4))
    for label, outcome in best.items():
        values = np.array([curve.test_loss for curve in outcome.curves])
        runner.draw(axes, outcome.curves[0].rounds, values, f"{label}, η = {outcome.config.learning_rate:g}")
    _plots.whole_rounds(axes)
    axes.set(ylabel="test loss (nats/token)", title=title)
    axes.grid(alpha=0.3)
    _plots.legend(figure, axes, columns=3)
    _plots.save(figure, file, dpi=100)


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
