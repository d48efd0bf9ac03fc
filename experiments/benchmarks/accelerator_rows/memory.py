"""Peak memory of the programs of ``experiments.memory``, by the device's own statistics.

A device remembers its highest peak and cannot forget it. So the programs are compiled before there are any arrays, and
run in the order of their forecasts. A program that stays below the peak of an earlier one gives no row: the process
that is started for it next measures it first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments._random_arrays import random_like
from experiments._step_programs import StepConfig, lower, programs
from experiments.benchmarks.accelerator_rows.card import NO_TRAFFIC, above, chip
from experiments.benchmarks.accelerator_rows.forecast import error_line, memory_off, time_off
from fedmezo_jax.llama.shapes import named_shape
from fedmezo_jax.planning import cost_model, hardware

PROGRAMS = (
    ("forward", "bfloat16"),
    ("fedmezo", "paired"),
    ("fedmezo", "bfloat16"),
    ("forward_gradient", "bfloat16"),
    ("backprop_checkpointed", "bfloat16"),
    ("backprop", "bfloat16"),
)


_PASSES = {"forward": 1, "fedmezo": 2, "backprop": 2, "backprop_checkpointed": 3}
"""Forward passes that take as many operations. Frozen weights have no gradient: a backward pass counts as a forward."""


def name(model: str, layers: str, what: str, precision: str) -> str:
    """The name of a row."""
    return f"memory {Path(model).name} {layers} {what} {precision}"


def measure(
    wanted: Sequence[str], card: Mapping[str, Any], model: str, layers: str, length: int, rank: int
) -> Iterator[dict[str, Any]]:
    """Yields a row for each program: its peak, the compiler's forecast of it, and its seconds beside the roofline.

    Args:
        wanted: names of the rows to measure.
        card: the row of the card.
        model: a shape known by name, or a folder.
        layers: layers with an adapter; see :class:`StepConfig`.
        length: tokens of the one example, half of them labels.
        rank: LoRA rank.
    """
    config, target = StepConfig(model, length, rank, layers=layers), hardware.present()
    compiled = []
    for what, precision, function, arguments in programs(config, target.devices[0]):
        row: dict[str, Any] = {"row": name(model, layers, what, precision), "model": Path(model).name, "layers": layers}
        row |= {"what": what, "precision": precision, "length": length, "rank": rank}
        if row["row"] not in wanted:
            continue
        start = time.perf_counter()
        try:
            program = lower(what, function, arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            yield row | {"error": error_line(error)}
            continue
        row["compile_seconds"] = time.perf_counter() - start
        passes = 1 + config.directions if what == "forward_gradient" else _PASSES[what]
        row["roofline_seconds"] = passes / 2 * _roofline(config, chip(card, precision), what)
        compiled.append((hardware.plan_of(program, target).peak or 0, row, program, arguments))

    base, shapes = None, None
    for forecast, row, program, (base_shapes, *rest) in sorted(compiled, key=lambda entry: entry[0]):
        try:
            if base_shapes != shapes:
                base = None  # lets the other weights go first
                base, shapes = jax.block_until_ready(random_like(base_shapes)), base_shapes
            before = _peak()
            seconds = min(_run(program, base, rest) for _ in range(2))
        except jax.errors.JaxRuntimeError as error:
            yield row | {"forecast_bytes": forecast, "error": error_line(error)}
            continue
        peak = _peak()
        if before is None or peak != before:
            yield row | {
                "peak_bytes": peak,
                "forecast_bytes": forecast,
                "memory_forecast_off": memory_off(peak, forecast),
                "seconds": seconds,
                "time_forecast_off": time_off(seconds, row["roofline_seconds"]),
            }


def _run(program: Any, base: Any, rest: Sequence[Any]) -> float:
    """Seconds of one run. The program may use up its other arguments, so they are made for it."""
    arguments = jax.block_until_ready(random_like(tuple(rest)))
    start = time.perf_counter()
    jax.block_until_ready(program(base, *arguments))
    return time.perf_counter() - start


def _peak() -> int | None:
    """Most bytes that were ever in use on the device; None where it does not say, as a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _roofline(config: StepConfig, limits: cost_model.Chip, what: str) -> float:
    """A lower bound on the seconds of two forward passes. All but the forward pass begin at the first trained layer."""
    shape = named_shape(config.model)
    if what != "forward":
        shape = above(shape, config.layers)
    targets = tuple(config.targets.split(","))
    planned = cost_model.RoundSpec(shape, 1, 1, 1, config.length, config.rank, targets, config.precision, False)
    return cost_model.roofline(planned, limits, (1, 1), 1, NO_TRAFFIC)
