"""Peak memory of a FedMeZO step, of a forward pass and of back-propagation, as planned by the compiler.

    python -m experiments.memory --model llama-3b --topology v5e:2x2
    python -m experiments.memory --model smollm2-135m --device cpu --length 128 --rank 8 --precision float32
    python -m experiments.memory --model llama-3b --topology a100-40gb --sweep length

Programs are compiled ahead of time for the topology; no such device is needed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # programs are compiled and not run

from experiments import _cli
from experiments._growth_plot import plot_growth
from experiments._step_programs import StepConfig, lower, programs
from fedmezo_jax.errors import UserError
from fedmezo_jax.planning import hardware

SWEEPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "model": ("model", ("smollm2-135m", "llama-3b", "llama-7b", "llama3-8b", "llama-13b", "llama-70b")),
    "length": ("length", (256, 512, 1024, 2048, 4096, 8192)),
    "clients": ("clients_per_device", (1, 2, 4, 8, 16)),
}
"""The option that each sweep varies, and its values."""


@dataclass(frozen=True)
class Config(StepConfig):
    """What to compile, and what for."""

    topology: str | None = None
    """device to compile for: v5e:2x2, v5p:2x2x1, v6e:2x2, a100-40gb, a100-80gb, rtx-4090, h100; one chip is used"""
    device: Literal["cpu"] | None = None
    """compile for this machine instead"""
    sweep: Literal["model", "length", "clients"] | None = None
    """vary this and plot the growth"""
    out: Path = Path("runs/memory")
    """folder for config.json, results.json and, for a sweep, growth.png"""

    def __post_init__(self):
        """Checks the options."""
        super().__post_init__()
        if self.topology and self.device:
            raise UserError("--topology and --device exclude each other: give one")


def main(config: Config) -> None:
    """Compiles the programs, prints the table and writes the folder."""
    start = time.perf_counter()
    name = config.device or config.topology or "v5e:2x2"
    target = hardware.host() if name == "cpu" else hardware.describe(name)
    field, values = SWEEPS[config.sweep] if config.sweep else ("model", (config.model,))
    rows = []
    for value in values:
        for row in measure(replace(config, **{field: value}), target):
            rows.append(row)
            print(" ".join(str(part) for part in (value, row["what"], row["precision"], row["peak_bytes"])), flush=True)
    _cli.write_folder(config, rows, time.perf_counter() - start)
    title = f"{name}, {target.memory / hardware.GIB:.2f} GiB a device, r={config.rank} on "
    _cli.print_table(title + config.targets, rows)
    if config.sweep:
        plot_growth(config.out / "growth.png", rows, field, target.memory, title + config.targets)


def measure(config: Config, target: hardware.Topology) -> Iterator[dict[str, Any]]:
    """Yields one row per program; ``over_forward`` is the ratio of its peak to that of the forward pass."""
    forward = None
    for what, precision, function, arguments in programs(config, target.devices[0]):
        compiled = hardware.compile_for(target, lower(what, function, arguments))
        plan = hardware.Plan(None, None) if compiled is None else hardware.plan_of(compiled, target)
        forward = plan.peak if what == "forward" else forward
        yield {
            "model": config.model,
            "length": config.length,
            "clients_per_device": config.clients_per_device,
            "layers": config.layers,
            "base": config.base,
            "eight_bit_products": None if compiled is None else hardware.eight_bit_products(compiled),
            "what": what,
            "precision": precision,
            "peak_bytes": plan.peak,
            "temp_bytes": plan.temporary,
            "fits": plan.peak is not None and plan.peak <= target.memory,
            "over_forward": plan.peak / forward if plan.peak and forward else None,
        }


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
