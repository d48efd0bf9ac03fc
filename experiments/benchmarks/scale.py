"""Times rounds with a growing number of clients in blocks; memory and the time per client should stay the same.

    python -m experiments.benchmarks.scale

``over_smallest`` is the time per client, divided by that of the smallest rounds, which are timed alternately.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments import _cli
from experiments.benchmarks.step import Setting, compile_round, random_case
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.shapes import named_shape


@dataclass(frozen=True)
class Config:
    """What to time."""

    model: str = "smollm2-135m"
    """a shape known by name (smollm2-135m, llama-3b, …) or the path of a config.json"""
    clients: str = "8,64,512,1000"
    """numbers of clients"""
    block: int = 8
    """clients that run at once"""
    length: int = 32
    """tokens in a client's single example, half of them labelled"""
    rank: int = 8
    """LoRA rank"""
    targets: str = "q_proj,v_proj"
    """projections with an adapter"""
    precision: Precision = "float32"
    """of the products with frozen weights"""
    seconds: float = 10
    """least time for each number of clients, in whole rounds"""
    beside: int = 8
    """rounds of the smallest number that are timed before and after every other round"""
    seed: int = 0
    """seed of weights and examples"""
    out: Path = Path("runs/scale")
    """folder for config.json and results.json"""


def main(config: Config) -> None:
    """Times rounds of one local step at each number, prints the table and writes the folder."""
    start = time.perf_counter()
    counts, rows = [int(count) for count in config.clients.split(",")], []
    smallest, _ = ready(config, counts[0])
    for count in counts:
        run_round, temporary = ready(config, count)
        # The speed of machines varies within a minute, so the smallest round is timed before and after.
        smallest_seconds, seconds = [], []
        while sum(seconds) < config.seconds:
            smallest_seconds += _times(smallest, config.beside)
            seconds += _times(run_round, 1)
        smallest_seconds += _times(smallest, config.beside)
        seconds_per_client = statistics.mean(seconds) / count
        rows.append(
            {
                "clients": count,
                "temp_bytes": temporary,
                "rounds": len(seconds),
                "seconds": statistics.mean(seconds),
                "seconds_per_client": seconds_per_client,
                "over_smallest": seconds_per_client / statistics.mean(smallest_seconds) * counts[0],
            }
        )
        print(f"{count} clients: {rows[-1]['seconds']:.2f} s, {rows[-1]['over_smallest']:.3f}", flush=True)
    _cli.write_folder(config, rows, time.perf_counter() - start)
    _cli.print_table(f"{config.model}, {config.length} tokens a client, {config.block} clients at once", rows)


def ready(config: Config, count: int) -> tuple[Callable[[], Any], int]:
    """Returns a compiled round of ``count`` clients, and its temporary bytes."""
    llama, setting = named_shape(config.model), Setting(count, 1, config.length, config.rank)
    case = random_case(llama, setting, config.targets.split(","), config.precision, config.seed)
    compiled = compile_round(case, config.block)
    plan = compiled.program.memory_analysis()
    assert plan is not None  # present devices have a plan
    return compiled.run, plan.temp_size_in_bytes


def _times(work: Callable[[], Any], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
