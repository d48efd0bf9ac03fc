"""FedMeZO against back-propagated FedAvg, both tuned (Fig. 1 and 10 of arXiv 2402.05926).

python -m experiments.studies.convergence

The paper compares both at one learning rate, with plain SGD as the baseline. Here each method has a sweep of learning
rates and is shown at its best one, over rounds, over equivalent forward passes (a backward pass through a frozen base
has as many products as a forward pass), and over seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments import _cli, _plots
from experiments.studies import runner
from fedmezo_jax.run.loop import forward_passes

METHODS = {
    "FedMeZO": {"algorithm": "fedmezo"},
    "FedAvg, SGD": {"algorithm": "fedavg"},
    "FedAvg, Adam": {"algorithm": "fedavg", "local_optimizer": "adam"},
}


def variants(**rates: Sequence[float]) -> runner.Variants:
    """Returns every method at every learning rate of its sweep."""
    return runner.swept(
        {label: (fields, sweep) for (label, fields), sweep in zip(METHODS.items(), rates.values(), strict=True)}
    )


PRESETS = runner.standard_presets(
    variants(mezo=(2e-4, 5e-4, 7e-4, 1e-3), sgd=(3e-3, 1e-2, 3e-2, 1e-1), adam=(1e-3, 3e-3, 1e-2, 3e-2)),
    variants(mezo=(1e-5, 2.5e-5, 5e-5, 1e-4), sgd=(2.5e-5, 1e-2, 1e-1, 1.0), adam=(1e-5, 1e-4, 3e-4, 1e-3)),
)


def plot(path: str, chosen: dict[str, runner.Outcome]) -> None:
    """Plots the loss over rounds, forward passes and seconds, at each method's best learning rate."""
    figure, panels = _plots.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    for label, outcome in chosen.items():
        rounds = np.array(outcome.curves[0].rounds)
        seconds_per_round = float(np.mean([curve.seconds_per_round for curve in outcome.curves]))
        values = np.array([curve.test_loss for curve in outcome.curves])
        for axes, x in zip(
            panels, (rounds, rounds * forward_passes(outcome.config), rounds * seconds_per_round), strict=True
        ):
            runner.draw(axes, x, values, f"{label}, η = {outcome.config.learning_rate:g}")
    for axes, name in zip(panels, ("rounds", "forward passes", "seconds"), strict=True):
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test loss (nats/token)")
    _plots.legend(figure, panels[0])
    _plots.save(figure, path, dpi=100)


def main(config: runner.Config) -> None:
    """Runs the study."""
    out, outcomes = runner.run(
        config, "convergence", PRESETS, title="FedMeZO and FedAvg, tuned", conclude=runner.tuned_rows
    )
    chosen = {method: tuned.best for method, tuned in runner.tune(outcomes).items()}
    plot(str(out / "convergence.png"), chosen)
    winner = min(chosen.items(), key=lambda item: float(np.mean(item[1].after)))[0]
    print(f"lowest test loss after {chosen[winner].config.rounds} rounds: {winner}")


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
