"""Effective rank tr(H)/‖H‖ of the Hessian with respect to the LoRA parameters (open question 1 of arXiv 2402.05926).

    python -m experiments.studies.effective_rank
    python -m experiments.studies.effective_rank --data-dir FOLDER

The second command adds SmolLM2-135M on GSM8K and CodeAlpaca. H is measured at the start, where B = 0 and so the block
of H for A is zero, and after some steps of back-propagated Adam. Each batch has its own H; errors are over batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _cli, _plots
from experiments.studies.result_cache import measure
from fedmezo_jax.core import random
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.context import RunContext
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.theory import spectrum


class Case(NamedTuple):
    """Where H is measured, and how precisely.

    Attributes:
        model: as on the command line of the main job.
        data: as on the command line of the main job.
        max_length: most tokens in an example.
        ranks: LoRA ranks r; α = 2r as in the paper, so the adapter's scale is the same for all.
        layers: layers whose diagonal blocks are measured too, at the second rank, or the only one.
        batches: number of batches on which H is measured.
        rows: examples per batch.
        probes: Lanczos runs for each H.
        steps: steps of a Lanczos run.
        train_steps: steps of Adam, on other examples, before the second measurement.
    """

    model: str
    data: str
    max_length: int
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    batches: int
    rows: int
    probes: int
    steps: int
    train_steps: int


_TINY = Case("tiny", "bundled", 160, (4, 8, 32, 128), (0, 1, 2, 3, 4), 4, 8, 2, 16, 60)
_REAL = Case("smollm2-135m", "gsm8k", 128, (4, 128), (0, 29), 3, 1, 1, 8, 15)
_PAPER = Case(
    "openlm-research/open_llama_3b_v2", "gsm8k", 512, (4, 8, 16, 32, 64, 128), (0, 8, 17, 25), 8, 4, 2, 24, 60
)
PRESETS: dict[str, tuple[Case, ...]] = {
    "small": (_TINY,),
    "paper": tuple(_PAPER._replace(data=data) for data in ("gsm8k", "codealpaca", "dolly", "alpaca")),
    "smoke": (_TINY._replace(ranks=(4,), layers=(4,), batches=2, rows=2, probes=1, steps=4, train_steps=2),),
}


_QUANTITIES = ("trace", "norm", "effective_rank", "effective_rank_positive", "effective_rank_absolute")


@dataclass(frozen=True)
class Config:
    """What to measure."""

    preset: Literal["small", "paper", "smoke"] = "small"
    """small: minutes on two CPU cores; paper: the paper's model and data; smoke: seconds"""
    data_dir: str | None = None
    """folder with local copies of the data sets; with it, small measures SmolLM2-135M, too"""
    seed: int = 0
    """seed of the initial LoRA, the examples and the probes"""
    out: Path = Path("runs/effective_rank")
    """folder for config.json, results.json, the plot and finished points, which are not measured again"""


def main(config: Config) -> None:
    """Measures, prints the table and writes the folder."""
    cases = PRESETS[config.preset]
    if config.preset == "small" and config.data_dir:
        cases = (*cases, _REAL, _REAL._replace(data="codealpaca"))
    points = [
        {**_settings(case), "rank": rank, "layer": layer, "state": state, "seed": config.seed}
        for case in cases
        for rank in case.ranks
        for state in ("start", "trained")
        for layer in (None, *(case.layers if rank == case.ranks[:2][-1] and state == "trained" else ()))
    ]
    all_probes, seconds = measure(config.out / "points", points, partial(_probe, config.data_dir))
    rows = [_row(point, probes) for point, probes in zip(points, all_probes, strict=True)]
    _cli.write_folder(config, rows, seconds)
    plot(config.out / "effective_rank.png", rows)
    _cli.print_table("of the LoRA Hessian: mean over batches ± standard error", [_shown(row) for row in rows])


def _settings(case: Case) -> dict[str, Any]:
    """The fields of a case on which a single point depends."""
    return {name: value for name, value in case._asdict().items() if name not in ("ranks", "layers")}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as printed, with errors beside their values."""
    values = {name: f"{row[name]:.3g} ± {row[f'{name}_error']:.2g}" for name in _QUANTITIES}
    return {name: row[name] for name in ("data", "lora_rank", "state", "layer")} | values


def _probe(data_dir: str | None, point: dict[str, Any]) -> list[list[dict[str, float]]]:
    """The probes of one H for each batch, ``[batches][probes]``."""
    names = ("model", "data", "max_length", "rank", "seed")
    setup, loss, trained = _trained(*(point[name] for name in names), data_dir, _train_rows(point))
    params = setup.params if point["state"] == "start" else trained
    mask = spectrum.layer_mask(params, point["layer"])
    key, probes_by_batch = jax.random.fold_in(run_key(point["seed"]), random.EFFECTIVE_RANK), []
    for batch in range(point["batches"]):
        rows = _rows(setup, batch * point["rows"], point["rows"])
        keys = [jax.random.fold_in(key, batch * point["probes"] + probe) for probe in range(point["probes"])]
        runs = [_lanczos(loss, params, rows, mask, key, point["steps"]) for key in keys]
        probes_by_batch.append([spectrum.read(jax.device_get(run), int(mask.sum()))._asdict() for run in runs])
    return probes_by_batch


@partial(jax.jit, static_argnums=5)
def _lanczos(loss, params, rows, mask, key, steps) -> spectrum.Tridiagonal:
    product = spectrum.hessian_product(loss, params, rows)
    return spectrum.lanczos(lambda v: mask * product(mask * v), spectrum.random_signs(key, mask), steps)


def _train_rows(point: dict[str, Any]) -> tuple[int, int, int]:
    """First example, examples per step and steps of the training, which uses none of the measured examples."""
    return point["batches"] * point["rows"], 2 * point["rows"], point["train_steps"]


@lru_cache(maxsize=1)
def _trained(
    model: str, data: str, max_length: int, rank: int, seed: int, data_dir: str | None, train: tuple[int, int, int]
) -> tuple[RunContext, Any, Any]:
    """The setup at this rank, its loss (one object, so that programs are compiled once), and θ after training.

    The training is Adam at 1e-3 on separate examples.
    """
    lora = {"lora_rank": rank, "lora_alpha": 2.0 * rank}
    model_and_data = {"model": model, "data": data, "data_dir": data_dir, "max_length": max_length}
    setup = prepare(paper_config(**model_and_data, **lora, partition="iid", clients=1, precision="float32", seed=seed))
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(loss, params, state, rows):
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state)
        return optax.apply_updates(params, updates), state

    first, size, steps = train
    params, state, loss = setup.params, optimizer.init(setup.params), loss_of(setup.task.model, setup.task.base)
    for i in range(steps):
        params, state = step(loss, params, state, _rows(setup, first + i * size, size))
    return setup, loss, params


def _rows(setup: RunContext, first: int, count: int) -> TokenBatch:
    """``count`` training examples from number ``first`` on, in a fixed random order that starts over at the end."""
    order = np.random.default_rng(setup.config.seed).permutation(len(setup.task.train.tokens))
    picked = np.take(order, range(first, first + count), mode="wrap")
    return TokenBatch(*(jnp.asarray(leaf[picked]) for leaf in setup.task.train))


def _row(point: dict[str, Any], probes_by_batch: list[list[dict[str, float]]]) -> dict[str, Any]:
    """The table's row: means over batches of each H's trace, norm and effective ranks, and their standard errors."""
    batches = [[spectrum.Probe(**probe) for probe in probes] for probes in probes_by_batch]
    ranks = [spectrum.effective_ranks(probes) for probes in batches]
    row = {
        "model": point["model"],
        "data": point["data"],
        "lora_rank": point["rank"],
        "state": point["state"],
        "layer": "all" if point["layer"] is None else str(point["layer"]),
    }
    quantities = (
        [np.mean([probe.trace for probe in probes]) for probes in batches],
        [max(probe.norm for probe in probes) for probes in batches],
        *([estimates[name] for estimates in ranks] for name in ("plain", "positive", "absolute")),
    )
    for name, values in zip(_QUANTITIES, quantities, strict=True):
        row[name], row[f"{name}_error"] = spectrum.estimate(values)
    row["norm_residual"] = max(probe.norm_residual for probes in batches for probe in probes)
    return row


def plot(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Plots the effective rank of the whole H over the LoRA rank (left) and of each layer's block (right)."""
    figure, (left, right) = _plots.subplots(1, 2, figsize=(10, 5), width_ratios=(3, 2))
    for i, (model, data) in enumerate(dict.fromkeys((row["model"], row["data"]) for row in rows)):
        case_rows = [row for row in rows if (row["model"], row["data"]) == (model, data)]
        for state, style in (("start", ":"), ("trained", "-")):
            for quantity, marker in (("effective_rank", "o"), ("effective_rank_positive", "^")):
                state_rows = [row for row in case_rows if row["layer"] == "all" and row["state"] == state]
                name = {"effective_rank": "tr H/‖H‖", "effective_rank_positive": "tr H₊/‖H₊‖"}[quantity]
                left.errorbar(
                    [row["lora_rank"] for row in state_rows],
                    [row[quantity] for row in state_rows],
                    [row[f"{quantity}_error"] for row in state_rows],
                    fmt=marker + style,
                    color=f"C{i}",
                    markersize=4,
                    label=f"{model}, {data}, {state}: {name}",
                )
        layers = [row for row in case_rows if row["layer"] != "all"]
        right.errorbar(
            [int(row["layer"]) for row in layers],
            [row["effective_rank_positive"] for row in layers],
            [row["effective_rank_positive_error"] for row in layers],
            fmt="^-",
            color=f"C{i}",
        )
    for axes in (left, right):
        axes.set_yscale("symlog", linthresh=10)
    left.set(xlabel="LoRA rank", ylabel="effective rank", title="whole Hessian (error: over batches)")
    right.set(xlabel="layer", ylabel="tr H₊/‖H₊‖", title="a layer's diagonal block, trained")
    _plots.ticks_at(left, (row["lora_rank"] for row in rows), log=True)
    _plots.ticks_at(right, (int(row["layer"]) for row in rows if row["layer"] != "all"))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _plots.legend(figure, left)
    _plots.save(figure, file, dpi=90)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
