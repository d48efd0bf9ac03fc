"""Measures the error of the projected gradient over μ and precision on your model and data, and recommends μ.

    python -m experiments.benchmarks.precision
    python -m experiments.benchmarks.precision --model smollm2-135m --data gsm8k --data-dir FOLDER --partition iid

The reference is the exact directional derivative zᵀ∇L in float32, by forward-mode differentiation, on frozen weights of
the same values for all precisions, in bfloat16 or quantised, and with eight-bit products of the same roundings: their
derivative is that of the product that each stands for. So only the error of the arithmetic is measured. How far the
model's derivative itself is from that of the first of ``--bases`` is in the rows of estimator ``derivative``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from fedmezo_jax.llama.loss import loss_of, pair_loss_of, point_loss_of
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
    bases: str = "bfloat16,int8,fp8,int4"
    """how the frozen weights are held; int8 and fp8 are measured with eight-bit products as well"""
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
    bases = config.bases.split(",")
    rows, first = [], None
    for base, products, setup in _setups(config.run, bases):
        loss, slopes = derivatives(setup, config.rows, config.probes)
        first = slopes if first is None else first
        found = [_row("derivative", "float32", None, slopes, first) | {"loss": loss}]
        for row in itertools.chain(found, measure(setup, scales, config.rows, config.probes, slopes)):
            rows.append({"base": base, "products": products} | row)
            at = "" if row["perturbation_scale"] is None else f" at {row['perturbation_scale']:g}"
            print(f"{base}, {products}, {row['estimator']}, {row['precision']}{at}: {row['error']:.2%}", flush=True)
        if isinstance(setup.task.train, HiddenBatch):
            rows.append(
                {"base": base, "products": products} | _rounded_states(setup, config.rows, config.probes, slopes)
            )
            print(f"{base}, {products}, hidden states in bfloat16: {rows[-1]['error']:.2%}", flush=True)
    plot(config.out / "precision.png", rows, f"{config.run.model} on {config.run.data}")
    _cli.write_folder(config, rows, time.perf_counter() - start)
    _cli.print_table("relative error of the projected gradient", rows)
    for base, precision in itertools.product(bases, get_args(Precision)):
        best = min(_line(rows, base, "weights", precision), key=lambda row: row["error"])
        print(
            f"{base}, {precision}: take --perturbation-scale {best['perturbation_scale']:g} (error {best['error']:.1%})"
        )


def _setups(run: RunConfig, bases: Sequence[str]) -> Iterator[tuple[str, str, RunContext]]:
    """Each base with products of its weights as floats, and in eight bits too where there are such."""
    for base in bases:
        setup = prepare(replace(run, base=base))  # pyright: ignore[reportArgumentType]
        yield base, "weights", setup
        if base in ("int8", "fp8"):
            model = setup.task.model.clone(eight_bit=True)
            yield base, "eight-bit", setup._replace(task=replace(setup.task, model=model))


def derivatives(setup: RunContext, count: int, probes: int) -> tuple[float, np.ndarray]:
    """The loss of ``count`` training examples, and its exact derivatives zᵀ∇L along the probes, in float32."""
    loss, rows = loss_of(setup.task.model.clone(precision="float32"), setup.task.base), _rows(setup, count)
    zeros = jax.tree.map(jnp.zeros_like, setup.params)

    @jax.jit
    def slope(loss, key):
        z = mezo.shift(zeros, mezo.Perturbation(key, 1.0, setup.config.distribution))
        return jax.jvp(lambda lora: loss(lora, rows), (setup.params,), (z,))

    values = [slope(loss, key) for key in _keys(setup, probes)]
    return float(values[0][0]), np.array([derivative for _, derivative in values])


def measure(
    setup: RunContext, scales: list[float], count: int, probes: int, exact: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """Yields one row per precision and scale of ``two-point``, and one for ``forward-gradient`` in bfloat16.

    The error is √(Σ(g − zᵀ∇L)² / Σ(zᵀ∇L)²) over the probes.
    """
    exact = derivatives(setup, count, probes)[1] if exact is None else exact
    rows, keys = _rows(setup, count), _keys(setup, probes)
    distribution: mezo.Distribution = setup.config.distribution

    @jax.jit
    def projected(pair_loss, key, scale):
        plus, minus = pair_loss(setup.params, rows, mezo.Perturbation(key, scale, distribution))
        return (plus - minus) / (2 * scale)

    @jax.jit
    def tangent(point_loss, key):
        def at(scale):
            return point_loss(setup.params, rows, mezo.Perturbation(key, scale, distribution))

        return jax.jvp(at, (jnp.float32(0),), (jnp.float32(1),))[1]

    model, base = setup.task.model, setup.task.base
    for precision in get_args(Precision):
        loss = pair_loss_of(model.clone(precision=precision), base)
        for scale in scales:
            estimates = np.array([projected(loss, key, jnp.float32(scale)) for key in keys])
            yield _row("two-point", precision, scale, estimates, exact)
    loss = point_loss_of(model.clone(precision="bfloat16"), base)
    yield _row("forward-gradient", "bfloat16", None, np.array([tangent(loss, key) for key in keys]), exact)


def _row(estimator: str, precision: str, scale: float | None, found: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    return {
        "estimator": estimator,
        "precision": precision,
        "perturbation_scale": scale,
        "error": error,
        "probes": len(exact),
        "loss": None,
    }


def _rows(setup: RunContext, count: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[:count]), setup.task.train)


def _keys(setup: RunContext, probes: int) -> jax.Array:
    return jax.random.split(jax.random.fold_in(run_key(setup.config.seed), random.PRECISION), probes)


def _line(rows: list[dict[str, Any]], base: str, products: str, precision: str) -> list[dict[str, Any]]:
    """The rows of the two-point estimate on this base with these products at this precision."""
    wanted = (base, products, "two-point", precision)
    return [row for row in rows if (row["base"], row["products"], row["estimator"], row["precision"]) == wanted]


def _rounded_states(setup: RunContext, count: int, probes: int, exact: np.ndarray) -> dict[str, Any]:
    """The error of the exact derivatives that comes from hidden states rounded to bfloat16."""
    some = _rows(setup, count)
    rounded = some._replace(hidden=some.hidden.astype(jnp.bfloat16))
    setup = setup._replace(task=replace(setup.task, train=rounded))
    return _row("derivative", "bfloat16 hidden states", None, derivatives(setup, count, probes)[1], exact)


def plot(file: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Plots the error of the two-point estimate over μ with a line per base and precision, as a PNG."""
    figure, axes = _plots.subplots(figsize=(6.4, 4))
    bases = list(dict.fromkeys((row["base"], row["products"]) for row in rows))
    for (i, base), (j, precision) in itertools.product(enumerate(bases), enumerate(get_args(Precision))):
        line = [(row["perturbation_scale"], row["error"]) for row in _line(rows, *base, precision)]
        label = ", ".join((*base, precision)).replace("weights, ", "")
        axes.plot(*zip(*line, strict=True), f"C{j}" + ("o-", "s--", "^:", "v-.")[i % 4], label=label)
    axes.axhline(WARN_ABOVE, color="0.6", linewidth=1, linestyle="--", label=f"{WARN_ABOVE:.0%}")
    axes.set(yscale="log", xlabel="perturbation scale μ", title=title)
    axes.set_ylabel("relative error of the projected gradient")
    axes.grid(alpha=0.3, which="both")
    _plots.ticks_at(axes, {row["perturbation_scale"] for row in rows} - {None}, log=True)
    _plots.legend(figure, axes, columns=3)
    _plots.save(figure, file, dpi=120)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
