"""Plans a run on given devices: what fits, how much is communicated, and the least time of a round.

    python -m experiments.plan --model llama-3b --topology v5e:2x4 --clients 64 --length 1024 --rank 128
    python -m experiments.plan --model llama-70b --topology h100:8 --clients 16 --length 1024

The round is compiled ahead of time by the devices' own compiler; no device is needed. All meshes are compared unless
one is given. Each takes about four compilations, which find the most clients per chip.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # programs are compiled and not run

from rich.progress import track

from experiments import _cli
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.lora import check_targets, trained_layers
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.quantised import BaseType
from fedmezo_jax.llama.shapes import named_shape
from fedmezo_jax.parallel.sharding import parse_mesh
from fedmezo_jax.planning import cost_model, hardware

MOST = 1024
"""Most clients at once that are tried."""


@dataclass(frozen=True)
class Config:
    """The run and the devices."""

    model: str = "llama-3b"
    """llama-3b, qwen3-0.6b, smollm3-3b, mistral-7b or another of the shapes in docs/models.md, or the path of a
    config.json"""
    topology: str = "v5e:2x4"
    """devices: v5e:2x4, v5p:2x2x1, v6e:2x2, a100-40gb:4, a100-80gb:8, rtx-4090, h100:8"""
    mesh: str | None = None
    """the only mesh to consider, e.g. clients=4,model=2"""
    clients: int = 64
    """clients of a round"""
    local_steps: int = 30
    """local steps H"""
    batch_size: int = 1
    """examples per step"""
    length: int = 1024
    """tokens per example, half of them labels"""
    rank: int = 128
    """LoRA rank"""
    targets: str = "q_proj,v_proj"
    """projections with an adapter"""
    layers: str = "all"
    """layers with an adapter, as in experiments.fedmezo; steps start from the hidden states below the first of them"""
    precision: Precision = "paired"
    """of the products with frozen weights"""
    base: BaseType | None = None
    """how the frozen weights are held: float32, bfloat16, int8, fp8 or int4; by default as the precision. The round has
    two-point steps, which take no --eight-bit-products: experiments.memory shows steps that do"""
    directions_shared: bool = False
    """whether all clients share their directions"""
    out: Path = Path("runs/plan")
    """folder for config.json and results.json"""

    def __post_init__(self):
        """Checks the options."""
        for name in ("clients", "local_steps", "batch_size", "length", "rank"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        check_targets(tuple(self.targets.split(",")))


def main(config: Config) -> None:
    """Compiles the round for every mesh, prints the table and writes the folder."""
    start = time.perf_counter()
    target, kind = hardware.describe(config.topology), config.topology.partition(":")[0]
    llama = named_shape(config.model)
    targets = tuple(name.strip() for name in config.targets.split(","))
    sizes = (config.clients, config.local_steps, config.batch_size, config.length, config.rank)
    trained = trained_layers(config.layers, llama)
    planned = cost_model.RoundSpec(
        llama, *sizes, targets, config.precision, config.directions_shared, trained, config.base
    )
    shapes = cost_model.meshes(len(target.devices), llama)
    if config.mesh:
        mesh = parse_mesh(config.mesh, target.devices)
        mesh_shape = tuple(mesh.shape.values()) if mesh else (1, 1)
        if mesh_shape not in shapes:
            raise UserError(f"--mesh {config.mesh} does not divide the heads or the MLP width of {config.model}")
        shapes = [mesh_shape]
    rows = []
    for shape in track(shapes, "compiling", transient=True):
        most_clients = most_at_once(planned, target, shape)
        at_once = max(1, min(most_clients, -(-planned.clients // shape[0])))
        compiled = cost_model.compile_round(planned, target, shape, at_once)
        fits = compiled.peak is not None and compiled.peak <= target.memory
        rows.append(
            {
                "mesh": f"clients={shape[0]},model={shape[1]}",
                "clients_at_once": at_once,
                "most_clients_per_chip": most_clients / shape[1],
                "peak_bytes_per_chip": compiled.peak,
                "fits": fits,
                "collective_bytes_per_round": compiled.received,
                "between_clients_bytes_per_round": compiled.between,
                "flops_per_round": cost_model.operations(planned),
                "roofline_seconds_per_round": cost_model.roofline(
                    planned, cost_model.CHIPS[kind], shape, at_once, compiled
                )
                if fits
                else None,
            }
        )
    best = min((row for row in rows if row["fits"]), key=lambda row: row["roofline_seconds_per_round"], default=None)
    for row in rows:
        row["best"] = row is best
    _cli.write_folder(config, rows, time.perf_counter() - start)
    title = (
        f"{config.model} on {config.topology}, {target.memory / hardware.GIB:.2f} GiB a chip, {config.clients} clients"
    )
    _cli.print_table(title, rows)
    print(f"chip: {cost_model.CHIPS[kind].source}")
    if any(row["fits"] and row["collective_bytes_per_round"] is None for row in rows):
        print("traffic unknown (-), and not in the time: the compiler's text could not be read")
    print(f"best: --mesh {best['mesh']}" if best else "nothing fits: take more or larger chips, or shorter rows")


def most_at_once(planned: cost_model.RoundSpec, target: hardware.Topology, shape: tuple[int, int]) -> int:
    """Returns the most clients that a group can run at once, a power of two; 0 if not even one fits.

    Peaks grow linearly, so two of them give a first estimate. The result was always compiled.
    """

    def peak(count: int) -> int | None:
        peak_bytes = cost_model.compile_round(planned._replace(clients=count * shape[0]), target, shape, count).peak
        return peak_bytes if peak_bytes is not None and peak_bytes <= target.memory else None

    first = peak(1)
    second = first and peak(2)
    if first is None or second is None:
        return 0 if first is None else 1
    estimate = 2 + int((target.memory - second) / max(second - first, 1))
    most = 1 << (min(estimate, MOST).bit_length() - 1)
    while most > 2 and peak(most) is None:
        most //= 2
    return most


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
