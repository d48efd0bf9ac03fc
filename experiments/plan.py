"""Plans a run before anything is rented: what fits, what is sent, how long a round takes at the least.

    python -m experiments.plan --model llama-3b --topology v5e:2x4 --clients 64 --length 1024 --rank 128
    python -m experiments.plan --model llama-70b --topology h100:8 --clients 16 --length 1024

The round is compiled ahead of time by the real compiler for these devices, of which there need be none. All meshes are
compared unless one is given; each takes about four compilations, to find the most clients that a chip holds.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes are compiled, nothing is run

from rich.progress import track

from experiments import _cli
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.lora import check_targets
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.shapes import named_shape
from fedmezo_jax.parallel.sharding import parse_mesh
from fedmezo_jax.planning import cost_model, hardware

MOST = 1024
"""Clients at once beyond which none are looked for."""


@dataclass(frozen=True)
class Config:
    """The run and the devices."""

    model: str = "llama-3b"
    """llama-3b, llama-7b, llama3-8b, llama-13b, llama-70b, smollm2-135m, or the path of a config.json"""
    topology: str = "v5e:2x4"
    """devices: v5e:2x4, v5p:2x2x1, v6e:2x2, a100-40gb:4, a100-80gb:8, h100:8"""
    mesh: str | None = None
    """the only mesh to look at, e.g. clients=4,model=2"""
    clients: int = 64
    """clients of a round"""
    local_steps: int = 30
    """local steps H"""
    batch_size: int = 1
    """rows a step"""
    length: int = 1024
    """tokens a row, half of them labels"""
    rank: int = 128
    """LoRA rank"""
    targets: str = "q_proj,v_proj"
    """projections with an adapter"""
    precision: Precision = "paired"
    """of the products with frozen weights"""
    directions_shared: bool = False
    """whether clients draw directions of their own or share them"""
    out: Path = Path("runs/plan")
    """folder for config.json and results.json"""

    def __post_init__(self):
        """Refuses what cannot be planned."""
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
    planned = cost_model.RoundSpec(llama, *sizes, targets, config.precision, config.directions_shared)
    shapes = cost_model.meshes(len(target.devices), llama)
    if config.mesh:
        mesh = parse_mesh(config.mesh, target.devices)
        asked = tuple(mesh.shape.values()) if mesh else (1, 1)
        if asked not in shapes:
            raise UserError(f"--mesh {config.mesh} does not divide the heads or the MLP width of {config.model}")
        shapes = [asked]
    rows = []
    for shape in track(shapes, "compiling", transient=True):
        most = most_at_once(planned, target, shape)
        at_once = max(1, min(most, -(-planned.clients // shape[0])))
        found = cost_model.compile_round(planned, target, shape, at_once)
        fits = found.peak is not None and found.peak <= target.memory
        rows.append(
            {
                "mesh": f"clients={shape[0]},model={shape[1]}",
                "clients_at_once": at_once,
                "most_clients_per_chip": most / shape[1],
                "peak_bytes_per_chip": found.peak,
                "fits": fits,
                "collective_bytes_per_round": found.received,
                "between_clients_bytes_per_round": found.between,
                "flops_per_round": cost_model.operations(planned),
                "roofline_seconds_per_round": cost_model.roofline(
                    planned, cost_model.CHIPS[kind], shape, at_once, found
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
    """The most clients that a group could run at once, had it as many: a power of two, or 0 where not one fits.

    Peaks grow in a straight line, so two of them say where to look; what is said to fit was compiled.
    """

    def peak(count: int) -> int | None:
        found = cost_model.compile_round(planned._replace(clients=count * shape[0]), target, shape, count).peak
        return found if found is not None and found <= target.memory else None

    first = peak(1)
    second = first and peak(2)
    if first is None or second is None:
        return 0 if first is None else 1
    room = 2 + int((target.memory - second) / max(second - first, 1))
    most = 1 << (min(room, MOST).bit_length() - 1)
    while most > 2 and peak(most) is None:
        most //= 2
    return most


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
