"""Measures the error of the projected gradient over μ and precision on your model and data, and recommends μ.

    python -m experiments.benchmarks.precision
    python -m experiments.benchmarks.precision --model smollm2-135m --data gsm8k --data-dir FOLDER --partition iid

The reference is the exact directional derivative zᵀ∇L in float32, by forward-mode differentiation. The frozen weights
are rounded to bfloat16 for all precisions, so only the error of the arithmetic is measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _cli, _plots
from fedmezo_jax.core import mezo, random
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.examples import HiddenBatch
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.loss import loss_of, pair_loss_of
from fedmezo_jax.llama.precision import WARN_ABOVE, Precision
from fedmezo_jax.run.config import RunConfig, paper_config
from fedmezo_jax.run.context import RunContext
from fedmezo_jax.run.prepare import prepare


@dataclass(frozen=True)
class Config:
    """The run whose model, data and LoRA are used, and the measurement."""

    run: RunConfig
    scales: str = "1e-4,3e-4,1e-3,3e-3,1e-2,3e-2"
    """perturbation scales μ"""
    rows: int = 2
    """training examples in the loss"""
    probes: int = 12
    """directions z"""
    out: Path = Path("runs/precision")
    """folder for config.json, results.json and precision.png"""

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Config:
        """Those of the published method, whose two-point estimate this measures."""
        del arguments
        return cls(paper_config())


def main(config: Config) -> None:
    """Measures, prints the table and the recommendation, writes the folder."""
    start = time.perf_counter()
    try:
        scales = sorted(float(text) for text in config.scales.split(","))
    except ValueError:
        scales = [0.0]
    if scales[0] <= 0:
        raise UserError(f"--scales {config.scales}: give numbers above 0, separated by commas")
    if config.rows < 1 or config.probes < 1:
        raise UserError("--rows and --probes must be at least 1")
    setup = prepare(config.run)
    rows = []
    for row in measure(setup, scales, config.rows, config.probes):
        rows.append(row)
        print(f"{row['precision']} at {row['perturbation_scale']:g}: {row['error']:.2%}", flush=True)
    plot(config.out / "precision.png", rows, f"{config.run.model} on {config.run.data}")
    if isinstance(setup.task.train, HiddenBatch):
        rows.append({"precision": "bfloat16 hidden states", "perturbation_scale": None, "probes": config.probes})
        rows[-1]["error"] = rounded_states(setup, config.rows, config.probes)
        print(f"hidden states in bfloat16: {rows[-1]['error']:.2%}")
    _cli.write_folder(config, rows, time.perf_counter() - start)
    _cli.print_table("relative error of the projected gradient", rows)
    for precision in get_args(Precision):
        best = min((row for row in rows if row["precision"] == precision), key=lambda row: row["error"])
        print(f"{precision}: take --perturbation-scale {best['perturbation_scale']:g} (error {best['error']:.1%})")


def measure(setup: RunContext, scales: list[float], count: int, probes: int) -> Iterator[dict[str, Any]]:
    """Yields one row per precision and scale: √(Σ(g − zᵀ∇L)² / Σ(zᵀ∇L)²) over the probes."""
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), setup.task.base)
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[:count]), setup.task.train)
    keys = jax.random.split(jax.random.fold_in(run_key(setup.config.seed), random.PRECISION), probes)
    distribution: mezo.Distribution = setup.config.distribution
    zeros = jax.tree.map(jnp.zeros_like, setup.params)
    exact_loss = loss_of(setup.task.model.clone(precision="float32"), base)

    @jax.jit
    def slope(loss, key):
        z = mezo.shift(zeros, mezo.Perturbation(key, 1.0, distribution))
        return jax.jvp(lambda lora: loss(lora, rows), (setup.params,), (z,))[1]

    @jax.jit
    def projected(pair_loss, key, scale):
        plus, minus = pair_loss(setup.params, rows, mezo.Perturbation(key, scale, distribution))
        return (plus - minus) / (2 * scale)

    exact = np.array([slope(exact_loss, key) for key in keys])
    for precision in get_args(Precision):
        loss = pair_loss_of(setup.task.model.clone(precision=precision), base)
        for scale in scales:
            estimates = np.array([projected(loss, key, jnp.float32(scale)) for key in keys])
            error = np.linalg.norm(estimates - exact) / np.linalg.norm(exact)
            yield {"precision": precision, "perturbation_scale": scale, "error": float(error), "probes": probes}


def rounded_states(setup: RunContext, count: int, probes: int) -> float:
    """The relative error of exact float32 slopes that comes from hidden states rounded to bfloat16."""
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[:count]), setup.task.train)
    rounded = rows._replace(hidden=rows.hidden.astype(jnp.bfloat16))
    keys = jax.random.split(jax.random.fold_in(run_key(setup.config.seed), random.PRECISION), probes)
    loss = loss_of(setup.task.model.clone(precision="float32"), setup.task.base)
    zeros = jax.tree.map(jnp.zeros_like, setup.params)

    @jax.jit
    def slope(loss, rows, key):
        z = mezo.shift(zeros, mezo.Perturbation(key, 1.0, setup.config.distribution))
        return jax.jvp(lambda lora: loss(lora, rows), (setup.params,), (z,))[1]

    exact, found = (np.array([slope(loss, each, key) for key in keys]) for each in (rows, rounded))
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def plot(file: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Plots the error over μ with a line per precision, as a PNG."""
    figure, axes = _plots.subplots(figsize=(6.4, 4))
    for precision in get_args(Precision):
        line = [(row["perturbation_scale"], row["error"]) for row in rows if row["precision"] == precision]
        axes.plot(*zip(*line, strict=True), "o-", label=precision)
    axes.axhline(WARN_ABOVE, color="0.6", linewidth=1, linestyle="--", label=f"{WARN_ABOVE:.0%}")
    axes.set(yscale="log", xlabel="perturbation scale μ", title=title)
    axes.set_ylabel("relative error of the projected gradient")
    axes.grid(alpha=0.3, which="both")
    _plots.ticks_at(axes, (row["perturbation_scale"] for row in rows), log=True)
    _plots.legend(figure, axes, columns=4)
    _plots.save(figure, file, dpi=120)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
