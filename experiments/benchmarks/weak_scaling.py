"""Weak scaling of compiled programs: the same number of clients per device, on 1 to 256 devices.

    python -m experiments.benchmarks.weak_scaling --model llama-3b --topology a100-80gb
    python -m experiments.benchmarks.weak_scaling --model smollm2-135m --topology v5e --devices 4,16,64,256

Peak memory and traffic per device come from the compiler, and operations are counted; nothing is run. Each round is
compiled in ``paired`` precision and in plain bfloat16.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # programs are compiled and not run

from rich.progress import track

from experiments import _cli, _plots
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.lora import trained_layers
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.shapes import named_shape
from fedmezo_jax.planning import cost_model, hardware

PRECISIONS: tuple[Precision, ...] = ("paired", "bfloat16")
"""Two losses at once, and plain bfloat16 for comparison."""


@dataclass(frozen=True)
class Config:
    """The model, the devices and the round."""

    model: str = "llama-3b"
    """llama-3b, qwen3-0.6b, smollm3-3b, mistral-7b or another of the shapes in docs/models.md, or the path of a
    config.json"""
    topology: str = "a100-80gb"
    """kind of device: v5e, v6e, a100-40gb, a100-80gb or h100"""
    devices: str = "1,4,16,64,256"
    """numbers of devices; TPUs must fill a square slice"""
    clients_per_device: int = 1
    """clients per device in a round"""
    local_steps: int = 30
    """local steps H"""
    length: int = 1024
    """tokens per example, half of them labels"""
    rank: int = 128
    """LoRA rank"""
    layers: str = "all"
    """layers with an adapter, as in experiments.fedmezo; steps start from the hidden states below the first of them"""
    directions_shared: bool = False
    """whether all clients share their directions"""
    out: Path = Path("runs/weak_scaling")
    """folder for config.json, results.json and weak_scaling.png"""

    @property
    def counts(self) -> list[int]:
        """The numbers in ``devices``."""
        try:
            counts = [int(part) for part in self.devices.split(",")]
        except ValueError:
            counts = []
        if not counts or min(counts) < 1 or self.clients_per_device < 1:
            raise UserError(f"--devices {self.devices}: give numbers of at least 1, e.g. 1,4,16")
        return counts


def main(config: Config) -> None:
    """Compiles the round for every number of devices, prints the table and writes the folder."""
    start = time.perf_counter()
    llama = named_shape(config.model)
    rows: list[dict[str, Any]] = []
    for count in track(config.counts, "compiling", transient=True):
        target = hardware.describe(_slice(config.topology, count))
        clients = count * config.clients_per_device
        sizes = (clients, config.local_steps, 1, config.length, config.rank)
        for precision in PRECISIONS:
            how = (("q_proj", "v_proj"), precision, config.directions_shared, trained_layers(config.layers, llama))
            planned = cost_model.RoundSpec(llama, *sizes, *how)
            compiled = cost_model.compile_round(planned, target, (count, 1), config.clients_per_device)
            rows.append(
                {
                    "devices": count,
                    "clients": clients,
                    "precision": precision,
                    "program_bytes": compiled.code,
                    "peak_bytes_per_device": compiled.peak,
                    "flops_per_device": cost_model.operations(planned) // count,
                    "collective_bytes_per_round": compiled.received,
                }
            )
    _cli.write_folder(config, rows, time.perf_counter() - start)
    plot(config.out / "weak_scaling.png", config, rows)
    _cli.print_table(f"{config.model} on {config.topology}, {config.clients_per_device} client(s) a device", rows)


def _slice(kind: str, count: int) -> str:
    if kind not in hardware.TPUS:
        return f"{kind}:{count}"
    side = math.isqrt(count)
    if side * side != count or side < 2:
        raise UserError(f"--devices: {count} TPU chips are no square slice; take 4, 16, 64 or 256")
    return f"{kind}:{side}x{side}"


def plot(file: Path, config: Config, rows: list[dict[str, Any]]) -> None:
    """Plots memory and traffic per device over the number of devices."""
    figure, (left, right) = _plots.subplots(1, 2, figsize=(8, 3.6))
    devices = list(dict.fromkeys(row["devices"] for row in rows))
    for precision, style in zip(PRECISIONS, ("o-", "v--"), strict=True):
        precision_rows = [row for row in rows if row["precision"] == precision]
        left.plot(
            devices,
            [(row["peak_bytes_per_device"] or nan) / hardware.GIB for row in precision_rows],
            style,
            label=precision,
        )
        right.plot(devices, [row["collective_bytes_per_round"] for row in precision_rows], style)
    left.set(ylabel="peak GiB of a device", ylim=(0, 1.1 * left.get_ylim()[1]))
    right.set(ylabel="bytes received in a round")
    for axes in (left, right):
        axes.set_xlabel("devices")
        _plots.ticks_at(axes, devices, log=True)
        axes.grid(alpha=0.3)
    _plots.legend(figure, left)
    figure.suptitle(f"{config.model} on {config.topology}, {config.clients_per_device} client(s) a device", fontsize=11)
    _plots.save(figure, file, dpi=100)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
