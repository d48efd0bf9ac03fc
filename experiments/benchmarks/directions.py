"""Times n directions by two-point differences, by a forward and by a backward gradient, alternately in one run.

    python -m experiments.benchmarks.directions
    python -m experiments.benchmarks.directions --layers last:6 --setting 4x2x128x8

Clients start from the hidden states below the first trained layer. Weights and examples are random; their values do
not affect the time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import _cli
from experiments.benchmarks import step
from fedmezo_jax.core import mezo
from fedmezo_jax.core.estimators import ESTIMATORS, EstimatorName
from fedmezo_jax.data.examples import HiddenBatch, Rows
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.loss import loss_of, pair_loss_of, point_loss_of
from fedmezo_jax.llama.shapes import named_shape

_LOSSES = {"pair_loss": pair_loss_of, "point_loss": point_loss_of, "loss": loss_of}


@dataclass(frozen=True)
class Config:
    """What to time."""

    model: str = "smollm2-135m"
    """a shape known by name (smollm2-135m, llama-3b, …) or the path of a config.json"""
    setting: str = "2x1x48x8"
    """clients x batch x tokens x LoRA rank; half of each example is labelled"""
    layers: str = "all"
    """layers with an adapter, as for experiments.fedmezo"""
    targets: str = "up_proj,down_proj"
    """projections with an adapter"""
    directions: str = "1,4,8"
    """numbers n of directions, separated by commas"""
    repeats: int = 5
    """runs timed, after one that compiles, alternating with the other programs"""
    seed: int = 0
    """seed of weights and examples"""
    out: Path = Path("runs/directions")
    """folder for config.json and results.json"""


def main(config: Config) -> None:
    """Times every number of directions, prints the table and writes the folder."""
    start = time.perf_counter()
    counts = config.directions.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise UserError(f"--directions must be numbers from 1 on, separated by commas, not {config.directions}")
    if config.repeats < 1:
        raise UserError(f"--repeats must be at least 1, not {config.repeats}")
    case = step.random_case(
        named_shape(config.model),
        step.parse_setting(config.setting),
        config.targets.split(","),
        "float32",
        config.seed,
        config.layers,
    )
    rows, base = _from_first_trained(case, config.seed)
    forward = jax.jit(lambda loss, lora, rows: jax.vmap(loss, (None, 0))(lora, rows))
    works: dict[str, Callable[[], Any]] = {"forward": partial(forward, loss_of(case.model, base), case.lora, rows)}
    table: list[dict[str, Any]] = []
    for estimator, count in itertools.product(ESTIMATORS, map(int, counts)):
        program, arguments = _compiled(case, base, rows, estimator, count)
        works[f"{estimator} {count}"] = partial(program, *arguments)
        held = program.memory_analysis().temp_size_in_bytes
        table.append({"estimator": estimator, "directions": count, "temporary_bytes": held})
    seconds = {name: min(times) for name, times in step.alternate(works, config.repeats).items()}
    for row in table:
        own = seconds[f"{row['estimator']} {row['directions']}"]
        row["seconds"] = own
        row["in_forward_passes"] = own / seconds["forward"]
        row["over_two_point"] = own / seconds[f"two-point {row['directions']}"]
    _cli.write_folder(config, table, time.perf_counter() - start)
    _cli.print_table(f"{config.model}, layers {config.layers}, {config.setting}, best of {config.repeats}", table)


def _from_first_trained(case: step.Case, seed: int) -> tuple[Rows, Any]:
    """Each client's examples, from the hidden states below the first trained layer on, and the weights above."""
    rows, first = jax.tree.map(lambda leaf: leaf[:, 0], case.cohort.batches), case.model.trained_layers[0]
    if not first:
        return rows, case.base
    shape = (*rows.tokens.shape, case.model.config.hidden_size)
    hidden = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    above = {"layers": jax.tree.map(lambda leaf: leaf[first:], case.base["layers"])}
    return HiddenBatch(jax.device_put(hidden), *rows[1:]), case.base | above


def _compiled(
    case: step.Case, base: Any, rows: Rows, estimator: EstimatorName, count: int
) -> tuple[Any, tuple[Any, ...]]:
    """The program of an estimate by all clients along ``count`` directions, and its arguments."""
    named = ESTIMATORS[estimator]
    chosen = named.make(mezo.MezoConfig(directions=count, distribution="rademacher"))
    loss = _LOSSES[named.loss](case.model, base)

    def estimate(loss, lora, rows, keys):
        return jax.vmap(lambda rows, key: chosen.estimate(loss, lora, rows, key))(rows, keys)

    arguments = (loss, case.lora, rows, jax.random.split(case.key, len(case.cohort.ids)))
    return jax.jit(estimate).lower(*arguments).compile(), arguments


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
