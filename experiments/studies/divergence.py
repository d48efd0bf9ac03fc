"""Which learning rates are too large: the loss at multiples of the usual rate, and the first warnings.

    python -m experiments.studies.divergence

After Fig. 5 of arXiv 2402.05926. The table has one row per run; a first warning in round 0 means before the first
round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import _cli, _plots
from experiments.studies import result_cache, runner
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import divergence
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.loop import probe_start
from fedmezo_jax.run.prepare import prepare

PRESETS: dict[runner.PresetName, tuple[RunConfig, int]] = {
    "small": (replace(runner.SMALL, rounds=12), 3),
    "paper": (replace(runner.PAPER, learning_rate=1e-5), 3),
    "smoke": (runner.SMOKE, 2),
}
"""The run at the usual learning rate, and the number of seeds."""


@dataclass(frozen=True)
class Config(runner.Config):
    """The preset, and changes to it."""

    factors: str = "1,3,5,10"
    """multiples of the preset's learning rate"""
    on_divergence: Literal["warn", "clip", "rollback"] = "warn"
    """what the run does when it diverges"""


def main(config: Config) -> None:
    """Runs every rate and seed, prints the table, draws the curves."""
    factors = _factors(config.factors)
    run, num_seeds = runner.preset_of(PRESETS, config.preset)
    changed = {name: getattr(config, name) for name in ("rounds", "model", "data", "data_dir", "on_divergence")}
    base = replace(run, **{name: value for name, value in changed.items() if value is not None})
    out = config.out or Path("runs") / f"divergence-{config.preset}"
    runs = [
        replace(base, seed=seed, learning_rate=base.fixed_rate * factor)
        for seed in range(config.seed, config.seed + (config.num_seeds or num_seeds))
        for factor in factors
    ]
    outcomes, seconds = result_cache.measure(out / "points", [asdict(each_run) for each_run in runs], _outcome)
    rows = [outcome["row"] for outcome in outcomes]
    rows.sort(key=lambda row: (row["learning_rate"], row["seed"]))
    _cli.write_folder(replace(config, out=out), rows, seconds, run=asdict(base))
    curves = np.array([outcome["train_loss"] for outcome in outcomes], np.float64).reshape(
        -1, len(factors), base.rounds
    )
    plot(out / "divergence.png", base, factors, curves)
    _cli.print_table(f"{base.model} on {base.data}, --on-divergence {base.on_divergence}", rows)


@lru_cache(maxsize=1)
def _probe(run: RunConfig) -> divergence.Probe:
    """The learning-rate check's measurements before the first round, which all rates of one seed share."""
    return probe_start(prepare(run))


def _outcome(point: dict[str, Any]) -> dict[str, Any]:
    """One run's row of the table, and its training loss per round (None if no client's loss was finite)."""
    run = RunConfig(**point)
    probe = _probe(replace(run, learning_rate=1.0))
    with tempfile.TemporaryDirectory() as folder:
        result = fine_tune(
            run,
            folder,
            checkpoint_every=run.rounds,
            eval_every=run.rounds,
            check_rate=False,
            notify=lambda line: None,
        )
    trained = divergence.count(result.params)
    diverged_rounds = [record["round"] for record in result.metrics if record["diverged"]]
    warned_rounds = [
        record["round"] for record in result.metrics if (record["gradient_growth"] or 0) > divergence.GROWTH
    ]
    first_warning = 0 if divergence.warnings(probe, run, trained) else warned_rounds[0] if warned_rounds else None
    row = {
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "step_length": divergence.step_length(run.fixed_rate, probe.noisy_gradient**0.5, trained),
        "first_warning": first_warning,
        "first_divergence": diverged_rounds[0] if diverged_rounds else None,
        "divergences": len(diverged_rounds),
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
    }
    return {"row": row, "train_loss": [record["train_loss"] for record in result.metrics]}


def plot(file: Path, base: RunConfig, factors: Sequence[float], curves: np.ndarray) -> None:
    """Plots the training loss over rounds, ``[seeds, factors, rounds]``, with a colour per factor."""
    figure, axes = _plots.subplots(figsize=(6.4, 4))
    for i, factor in enumerate(factors):
        lines = axes.plot(np.arange(1, base.rounds + 1), curves[:, i].T, ".-", color=f"C{i}", alpha=0.7)
        lines[0].set_label(f"{factor:g}×")
    _plots.whole_rounds(axes)
    axes.set_ylabel("training loss (nats/token)")
    axes.set_title(f"{base.model} on {base.data}: multiples of η = {base.learning_rate:g}")
    axes.grid(alpha=0.3)
    _plots.legend(figure, axes, columns=6)
    _plots.save(figure, file, dpi=120)


def _factors(text: str) -> list[float]:
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        factors = []
    if not factors or not all(0 < factor < np.inf for factor in factors) or len(set(factors)) < len(factors):
        raise UserError(f"--factors must be different numbers above 0, like 1,3,5,10, not {text}")
    return factors


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
