"""Which heterogeneity index follows the clients' true heterogeneity (open question 2 of arXiv 2402.05926).

    python -m experiments.studies.heterogeneity_index

Clients are ranked by each index after each round (round-wise and five-round loss, client drift), and by two references:
the gradient disparity ‖∇f − ∇f_i‖² by back-propagation, and the distance of a client's categories from those of all
examples. The last index is the drift of the same clients with shared directions.

A reference measured on few examples is noisy. The row "gradient disparity" therefore has the correlation between the
two halves of its examples, which no index can be expected to exceed by much. All rounds use the same examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments import _cli, _plots
from experiments.studies import runner
from experiments.studies.result_cache import measure
from fedmezo_jax.core import federated
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.batches import round_batches, take
from fedmezo_jax.data.examples import Rows
from fedmezo_jax.data.partition import category_distances
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.llama.task import unpaired
from fedmezo_jax.run.config import RunConfig, paper_config
from fedmezo_jax.run.context import build
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.theory import heterogeneity

INDICES = ("round-wise", "five-round", "model-diff", "model-diff, shared directions")
_QUANTITIES = ("to_gradient", "to_label", "round_to_round")


class Preset(NamedTuple):
    """One scale of the study.

    Attributes:
        run: configuration of all its runs.
        alphas: Dirichlet concentrations.
        num_seeds: runs per concentration.
        truth_rows: examples per client on which its gradient is measured, a multiple of four.
        truth_rounds: rounds before which the gradients are measured.
    """

    run: RunConfig
    alphas: tuple[float, ...]
    num_seeds: int
    truth_rows: int
    truth_rounds: tuple[int, ...]


_SMALL = Preset(
    paper_config(clients=8, rounds=8, local_steps=5, length_buckets=1, precision="float32"),
    (0.05, 0.2, 1.0, 10.0, 100.0),
    3,
    32,
    (0, 7),
)
PRESETS: dict[runner.PresetName, Preset] = {
    "small": _SMALL,
    "paper": Preset(
        replace(runner.PAPER, data="dolly", partition="dirichlet", clients=8, rounds=100),
        (0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0),
        5,
        128,
        (0, 50, 99),
    ),
    "smoke": Preset(
        replace(_SMALL.run, clients=4, rounds=6, local_steps=1, batch_size=1, lora_rank=2, test_examples=8),
        (0.1, 100.0),
        2,
        4,
        (0, 5),
    ),
}


@dataclass(frozen=True)
class Config:
    """What to measure."""

    preset: runner.PresetName = "small"
    """small: minutes on two CPU cores; paper: the paper's model and data; smoke: seconds"""
    data: str | None = None
    """another data set than the preset's; it needs categories"""
    data_dir: str | None = None
    """folder with local copies of the data sets; without it they come from the hub"""
    seed: int = 0
    """the first seed"""
    out: Path = Path("runs/heterogeneity_index")
    """folder for config.json, results.json, the plot and finished points, which are not measured again"""


def main(config: Config) -> None:
    """Runs, prints the table and writes the folder."""
    preset = runner.preset_of(PRESETS, config.preset)
    changed = {name: value for name in ("data", "data_dir") if (value := getattr(config, name)) is not None}
    run = replace(preset.run, **changed, personalize="model-diff", personalize_scale=0.0)  # measured but not applied
    seeds = range(config.seed, config.seed + preset.num_seeds)
    runs = [replace(run, dirichlet_alpha=alpha, seed=seed) for alpha in preset.alphas for seed in seeds]
    points = [
        {**asdict(config_of_run), "truth_rows": preset.truth_rows, "truth_rounds": preset.truth_rounds}
        for config_of_run in runs
    ]
    trajectories, seconds = measure(config.out / "points", points, _trajectory)
    rows = [
        row
        for alpha in preset.alphas
        for row in summary(
            alpha,
            [
                path
                for path, config_of_run in zip(trajectories, runs, strict=True)
                if config_of_run.dirichlet_alpha == alpha
            ],
        )
    ]
    _cli.write_folder(config, rows, seconds, run=asdict(run))
    plot(config.out / "heterogeneity_index.png", rows, config.data or run.data)
    _cli.print_table("rank correlations over clients: mean over runs ± half a 90 % interval", list(map(_shown, rows)))


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as printed, with errors beside their values."""
    named = {f"{name}_band_90" for name in _QUANTITIES}
    values = {name: f"{row[name]:+.2f} ± {row[f'{name}_band_90'] or 0:.2f}" for name in _QUANTITIES}
    return {name: values.get(name, value) for name, value in row.items() if name not in named}


def _trajectory(point: dict[str, Any]) -> dict[str, Any]:
    """Runs a configuration and records the indices and the references.

    Returns:
        ``indices``, ``[rounds][clients]`` of each index (NaN until it is defined); ``gradient``, the gradient
        disparities ``[truths][clients]``; ``halves``, the same from each half of the examples,
        ``[truths][2][clients]``; and ``label``, the label distances ``[clients]``.
    """
    names = RunConfig.__dataclass_fields__
    config = RunConfig(**{name: value for name, value in point.items() if name in names})
    setup = prepare(config)
    (init, round), loss = build(setup)
    shared, _ = build(setup._replace(config=replace(config, directions_shared=True)))
    single_loss, key = loss_of(unpaired(setup.task.model), setup.task.base), run_key(config.seed)
    everyone, ones = np.arange(config.clients, dtype=np.int32), np.ones(config.clients, np.float32)
    state = init(setup.params, config.clients)
    indices: dict[str, list[list[float]]] = {name: [] for name in INDICES}
    truths, halves = [], []
    samples = _samples(setup.task.train, setup.task.parts, point["truth_rows"], config.seed)
    for t in range(config.rounds):
        if t in point["truth_rounds"]:
            quarters = [_gradients(single_loss, state.params, rows) for rows in samples]
            first, second = _disparity(*quarters[:2]), _disparity(*quarters[2:])
            halves.append([first.tolist(), second.tolist()])
            truths.append(_disparity((quarters[0] + quarters[1]) / 2, (quarters[2] + quarters[3]) / 2).tolist())
        batches = round_batches(
            setup.task.train,
            setup.task.parts,
            everyone,
            t,
            seed=config.seed,
            local_steps=config.local_steps,
            batch_size=config.batch_size,
        )
        cohort = federated.Cohort(everyone, ones, jax.tree.map(jnp.asarray, batches))
        with_shared, _ = shared.round(state, loss, cohort, key)
        state, _ = round(state, loss, cohort, key)
        losses = np.asarray(state.signals.losses)
        signals = (losses[:, 0], losses.mean(axis=1), state.signals.drift, with_shared.signals.drift)
        for name, signal in zip(INDICES, signals, strict=True):
            indices[name].append(np.asarray(signal, np.float64).tolist())
    categories = category_distances(list(setup.task.parts), setup.categories)
    return {"indices": indices, "gradient": truths, "halves": halves, "label": categories.tolist()}


def _samples(train: Rows, parts: Sequence[np.ndarray], count: int, seed: int) -> list[Rows]:
    """Four disjoint quarters of ``count`` examples of each client, leaves ``[N, count/4, …]``.

    A client with fewer examples has some of them in several quarters.
    """
    rng = np.random.default_rng(seed)
    picked = np.stack([np.resize(rng.permutation(part), count) for part in parts])
    return [jax.tree.map(jnp.asarray, take(train, quarter)) for quarter in np.split(picked, 4, axis=1)]


_gradients = jax.jit(heterogeneity.gradients)
_disparity = jax.jit(heterogeneity.disparity)


def summary(alpha: float, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns means over runs: a row for each index, and one for the gradient disparity."""
    rows = []
    for name in (*INDICES, "gradient disparity"):
        correlations = []
        for run in runs:
            gradient = np.mean(run["gradient"], axis=0)
            signals = [
                signal
                for signal in (run["indices"][name] if name in INDICES else run["gradient"])
                if np.isfinite(signal).all()
            ]
            to_gradient = [rank_correlation(signal, gradient) for signal in signals]
            if name not in INDICES:  # of the two halves of its sample
                to_gradient = [rank_correlation(*halves) for halves in run["halves"]]
            to_label = [rank_correlation(signal, run["label"]) for signal in signals]
            stable = [rank_correlation(*pair) for pair in pairwise(signals)]
            correlations.append([np.mean(to_gradient), np.mean(to_label), np.mean(stable)])
        row: dict[str, Any] = {"dirichlet_alpha": alpha, "index": name, "runs": len(runs)}
        for column, quantity in enumerate(_QUANTITIES):
            values = np.array(correlations)[:, column]
            row |= {quantity: float(values.mean()), f"{quantity}_band_90": runner.half_width(values)}
        row["mean_gradient_disparity"] = float(np.mean([run["gradient"] for run in runs]))
        row["mean_label_distance"] = float(np.mean([run["label"] for run in runs]))
        rows.append(row)
    return rows


def rank_correlation(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Returns Spearman's ρ; 0 if all values of either argument are equal."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(stats.spearmanr(first, second)[0])  # pyright: ignore[reportArgumentType]


def plot(file: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Plots the rank correlations and the references over the Dirichlet α."""
    figure, axes = _plots.subplots(1, 4, figsize=(14, 4.2))
    names = ("with gradient disparity", "with label distance", "from round to round")
    for panel, quantity, name in zip(axes, _QUANTITIES, names, strict=False):
        for i, index in enumerate(dict.fromkeys(row["index"] for row in rows)):
            index_rows = [row for row in rows if row["index"] == index]
            label = index if index in INDICES or quantity != "to_gradient" else "gradient disparity, half with half"
            x = [row["dirichlet_alpha"] * 1.05**i for row in index_rows]
            y, error = [row[quantity] for row in index_rows], [row[f"{quantity}_band_90"] or 0 for row in index_rows]
            panel.errorbar(x, y, error, fmt="o-", markersize=3, color=f"C{i}", label=label)
        panel.axhline(0, color="0.5", linewidth=0.8)
        panel.set(xlabel="Dirichlet α", title=f"rank correlation {name}", ylim=(-1.05, 1.05))
    index_rows = [row for row in rows if row["index"] == INDICES[0]]
    x = [row["dirichlet_alpha"] for row in index_rows]
    axes[3].plot(x, [row["mean_gradient_disparity"] for row in index_rows], "ko-", label="gradient disparity (right)")
    axes[3].plot(
        x, [row["mean_label_distance"] for row in index_rows], "s-", color="0.5", label="label distance (right)"
    )
    axes[3].set(xlabel="Dirichlet α", title=f"mean over clients ({title})")
    axes[3].set_yscale("symlog", linthresh=1e-3)
    for panel in axes:
        _plots.ticks_at(panel, (row["dirichlet_alpha"] for row in rows), log=True)
        panel.grid(alpha=0.3)
    _plots.legend(figure, axes[0], axes[3], columns=4)
    _plots.save(figure, file, dpi=72)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
