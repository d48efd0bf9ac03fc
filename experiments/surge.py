"""Where the learning rate is too large: the loss at multiples of the default rate, and what the guard says before.

After Fig. 5 of arXiv 2402.05926 (η ∈ {1, 3, 5, 10} × the default: the larger, the earlier the loss surges):

    python -m experiments.surge
    python -m experiments.surge --model smollm2-135m --data gsm8k --data-dir FOLDER --partition iid --clients 3
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from experiments import common
from experiments.plots import plot_rates
from fedmezo_jax import guard, run_folder
from fedmezo_jax.config import RunConfig
from fedmezo_jax.errors import UserError
from fedmezo_jax.setup import prepare
from fedmezo_jax.training import probe_start, train


@dataclass(frozen=True)
class Config:
    """What to run; --on-surge clip or rollback shows what these do about it."""

    run: RunConfig
    factors: str = "1,3,5,10"
    """multiples of --learning-rate"""
    out: Path = Path("runs/surge")
    """folder for the runs, surge.png and results.json; it must be new"""


def main(config: Config) -> None:
    """Runs every rate, prints the table, draws the curves."""
    begin = time.perf_counter()
    factors = _factors(config.factors)
    if config.run.algorithm != "fedmezo":
        raise UserError("--algorithm fedavg has no projected gradients to guard: give fedmezo")
    if config.out.exists():
        raise UserError(f"--out {config.out} is there already: give a new folder")
    setup = prepare(config.run)
    config.out.mkdir(parents=True)
    run_folder.write_json(config.out / "config.json", asdict(setup.config) | {"factors": config.factors})
    probe = probe_start(setup)
    trained = guard.count(setup.lora)
    rows: list[dict[str, Any]] = []
    curves = []
    with Progress() as bar:
        task = bar.add_task("rounds", total=len(factors) * config.run.rounds)
        for factor in factors:
            run = replace(config.run, learning_rate=config.run.learning_rate * factor)
            folder = config.out / f"{factor:g}x"
            folder.mkdir()
            result = train(
                setup._replace(config=run),
                folder,
                checkpoint_every=run.rounds,
                eval_every=run.rounds,
                on_round=lambda _: bar.advance(task),
            )
            shutil.rmtree(folder / "checkpoints")
            surged = [record["round"] for record in result.metrics if record["surge"]]
            warned = [record["round"] for record in result.metrics if (record["gradient_growth"] or 0) > guard.GROWTH]
            before = bool(guard.warnings(probe, run, trained))
            rows.append(
                {
                    "learning_rate": run.learning_rate,
                    "step_length": guard.step_length(run.learning_rate, probe.noisy_gradient**0.5, trained),
                    "first_warning": 0 if before else warned[0] if warned else None,
                    "first_surge": surged[0] if surged else None,
                    "surges": len(surged),
                    "loss_before": result.loss_before,
                    "loss_after": result.loss_after,
                }
            )
            curves.append((f"{factor:g}×", [record["train_loss"] for record in result.metrics]))
    plot_rates(config.out / "surge.png", curves, config.run)
    common.write_results(config.out, rows, time.perf_counter() - begin)
    common.print_table(f"{config.run.model} on {config.run.data}, --on-surge {config.run.on_surge}", rows)
    for line in guard.describe(probe, config.run, trained):
        print(line)


def _factors(text: str) -> list[float]:
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        factors = []
    if not factors or min(factors) <= 0:
        raise UserError(f"--factors must be numbers above 0, like 1,3,5,10, not {text}")
    return factors


if __name__ == "__main__":
    common.run(main, Config, __doc__)
