"""How ‖∇f‖² over a run depends on N, H and T (Theorem 3.5 of arXiv 2402.05926).

    python -m experiments.studies.convergence_rate

Clients have i.i.d. data, and η ∝ (NH/T)^½ as in the theorem. A slope is fitted on logarithmic scales over all seeds. A
few zeroth-order steps lower ‖∇f‖² little, so a flat line does not refute the theorem, which is an upper bound.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _cli, _plots
from experiments.studies import runner
from experiments.studies.result_cache import measure
from fedmezo_jax.core import federated
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.batches import round_batches
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.llama.task import unpaired
from fedmezo_jax.run.config import RunConfig, paper_config
from fedmezo_jax.run.context import build
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.theory import constants
from fedmezo_jax.theory.heterogeneity import gradients

NAMES = {"clients": "N", "local_steps": "H", "rounds": "T"}


class Preset(NamedTuple):
    """One scale of the study.

    Attributes:
        run: the base of all runs, with its N, H, T and η.
        values: values of N, H and T by the run's field; one of them is varied at a time.
        num_seeds: runs per value.
        looks: number of measurements of ‖∇f‖² per run.
    """

    run: RunConfig
    values: dict[str, tuple[int, ...]]
    num_seeds: int
    looks: int


_SMALL = Preset(
    paper_config(clients=4, local_steps=5, rounds=8, partition="iid", length_buckets=1, precision="float32"),
    {"clients": (1, 2, 4, 8), "local_steps": (2, 5, 10, 20), "rounds": (4, 8, 16, 32)},
    2,
    3,
)
PRESETS: dict[runner.PresetName, Preset] = {
    "small": _SMALL,
    "paper": Preset(
        runner.PAPER, {"clients": (3, 5, 9, 20), "local_steps": (10, 30, 50), "rounds": (125, 250, 500)}, 3, 10
    ),
    "smoke": Preset(
        replace(_SMALL.run, clients=2, local_steps=1, rounds=2, batch_size=1, lora_rank=2, test_examples=8),
        {"rounds": (1, 2, 3)},
        1,
        1,
    ),
}


@dataclass(frozen=True)
class Config:
    """The preset and its data."""

    preset: runner.PresetName = "small"
    """small: minutes on two CPU cores; paper: the paper's model and data; smoke: seconds"""
    data_dir: str | None = None
    """folder with local copies of the data sets; without it they come from the hub"""
    seed: int = 0
    """the first seed"""
    out: Path = Path("runs/convergence_rate")
    """folder for config.json, results.json, the plot and finished points, which are not measured again"""


def main(config: Config) -> None:
    """Runs, prints the tables and writes the folder."""
    preset = runner.preset_of(PRESETS, config.preset)
    base = replace(preset.run, data_dir=config.data_dir)
    seeds = range(config.seed, config.seed + preset.num_seeds)
    runs = {
        name: [replace(_scaled(base, name, value), seed=seed) for value in values for seed in seeds]
        for name, values in preset.values.items()
    }
    distinct = list(dict.fromkeys(run for group in runs.values() for run in group))
    points = [{"looks": preset.looks, **asdict(run)} for run in distinct]
    results, seconds = measure(config.out / "points", points, _over_a_run)
    measured = dict(zip(distinct, results, strict=True))
    rows = [
        {
            "varied": NAMES[name],
            "clients": run.clients,
            "local_steps": run.local_steps,
            "rounds": run.rounds,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            **measured[run],
        }
        for name, group in runs.items()
        for run in group
    ]
    slopes = [slope(name, [row for row in rows if row["varied"] == NAMES[name]]) for name in runs]
    _cli.write_folder(config, [*slopes, *rows], seconds, run=asdict(base))
    plot(config.out / "convergence_rate.png", rows, slopes)
    _cli.print_table("slopes of mean ‖∇f‖² over a run, log-log; the theorem's bound: -0.5", slopes)


def slope(field: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the fit over one of N, H and T, by its field's name."""
    fit = constants.power_law([row[field] for row in rows], [row["gradient"] for row in rows])
    return {"varied": NAMES[field], "slope": fit.slope, "error": fit.error, "theorem": -0.5, "runs": len(rows)}


def _scaled(run: RunConfig, name: str, value: int) -> RunConfig:
    """``run`` with one of N, H, T changed, and η ∝ (NH/T)^½ as in the theorem."""
    changed = replace(run, **{name: value})
    growth = [config.clients * config.local_steps / config.rounds for config in (changed, run)]
    return replace(changed, learning_rate=run.learning_rate * (growth[0] / growth[1]) ** 0.5)


def _over_a_run(point: dict[str, Any]) -> dict[str, float]:
    """Mean of ‖∇f‖² over a run, and the decrease of the test loss.

    ‖∇f‖² is the inner product of gradients on two sets of examples, which is unbiased.
    """
    config = RunConfig(**{name: value for name, value in point.items() if name != "looks"})
    setup = prepare(config)
    (init, round), loss = build(setup)
    everyone, ones = np.arange(config.clients, dtype=np.int32), np.ones(config.clients, np.float32)
    state, single_loss = init(setup.params, config.clients), loss_of(unpaired(setup.task.model), setup.task.base)
    picked = np.random.default_rng(0).permutation(len(setup.task.train.labels))[: 64 - 64 % (2 * config.batch_size)]
    halves = jax.tree.map(lambda leaf: jnp.asarray(leaf[picked].reshape(2, -1, *leaf.shape[1:])), setup.task.train)
    gradients_of, squared_norms = jax.jit(gradients), []
    measured_rounds = set(np.linspace(0, config.rounds, point["looks"] + 1).round().astype(int)[1:].tolist())
    settings: dict[str, Any] = {
        "seed": config.seed,
        "local_steps": config.local_steps,
        "batch_size": config.batch_size,
    }
    for t in range(config.rounds):
        batches = round_batches(setup.task.train, setup.task.parts, everyone, t, **settings)
        state, _ = round(state, loss, federated.Cohort(everyone, ones, batches), run_key(config.seed))
        if t + 1 in measured_rounds:
            first, second = np.asarray(gradients_of(single_loss, state.params, halves), np.float64)
            squared_norms.append(float(first @ second))
    test_loss = setup.task.evaluate
    return {"gradient": float(np.mean(squared_norms)), "loss_drop": test_loss(setup.params) - test_loss(state.params)}


def plot(file: Path, rows: list[dict[str, Any]], slopes: list[dict[str, Any]]) -> None:
    """Plots the mean ‖∇f‖² of each run over N, H and T, with the fits."""
    figure, axes = _plots.subplots(figsize=(6, 4))
    field_of = {short: field for field, short in NAMES.items()}
    for i, fit in enumerate(slopes):
        field = field_of[fit["varied"]]
        varied_rows = [row for row in rows if row["varied"] == fit["varied"]]
        x, y = np.array([row[field] for row in varied_rows]), np.array([row["gradient"] for row in varied_rows])
        label = f"{fit['varied']}: slope {fit['slope']:+.2f} ± {fit['error']:.2f}"
        axes.loglog(x, y, "o", color=f"C{i}", label=label)
        centre = np.exp(np.log(y).mean())
        axes.loglog(x, centre * (x / np.exp(np.log(x).mean())) ** fit["slope"], color=f"C{i}", linewidth=1)
    axes.set(xlabel="N, H or T, with η ∝ (NH/T)^½", ylabel="mean ‖∇f‖² over a run", title="the theorem: slopes of -0.5")
    axes.grid(alpha=0.3, which="both")
    _plots.ticks_at(axes, (row[field_of[row["varied"]]] for row in rows), log=True)
    _plots.legend(figure, axes)
    _plots.save(figure, file, dpi=90)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
