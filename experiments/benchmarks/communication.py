"""The bytes that a client and the server exchange in a round (App. F.1 of arXiv 2402.05926).

    python -m experiments.benchmarks.communication
    python -m experiments.benchmarks.communication --model llama-70b --clients 30

Only the model's shape is needed. The messages are those of ``fedmezo_jax.run.messages``, filled with random numbers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from experiments import _cli, _plots
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import leaves
from fedmezo_jax.llama.lora import check_targets, lora_shapes
from fedmezo_jax.llama.shapes import named_shape
from fedmezo_jax.run import messages


@dataclass(frozen=True)
class Config:
    """The model, its adapter and the round; the paper's by default."""

    model: str = "llama-3b"
    """llama-3b, qwen3-0.6b, smollm3-3b, mistral-7b or another of the shapes in docs/models.md, or the path of a
    config.json"""
    rank: int = 128
    """LoRA rank"""
    targets: str = "q_proj,v_proj"
    """projections with an adapter"""
    clients: int = 3
    """clients of a round"""
    local_steps: int = 30
    """local steps H"""
    seed: int = 0
    """seed of the numbers in the messages"""
    out: Path = Path("runs/communication")
    """folder for config.json, results.json and communication.png"""

    def __post_init__(self):
        """Checks the options."""
        for name in ("rank", "clients", "local_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        check_targets(tuple(self.targets.split(",")))


def main(config: Config) -> None:
    """Packs the messages, prints the table and writes the folder."""
    start = time.perf_counter()
    llama = named_shape(config.model)
    draw = np.random.default_rng(config.seed)
    shapes = lora_shapes(llama, config.rank, config.targets.split(","))
    parameters = sum(int(np.prod(shape)) for half in shapes.values() for shape in half.values())

    def lora(dtype: type) -> int:
        tree = jax.tree.map(lambda shape: np.zeros(shape, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple))
        return len(messages.lora_message(tree))

    steps = draw.standard_normal((config.clients, config.local_steps, 1)).astype(np.float32)
    update = messages.Update(config.local_steps, config.clients - 1, 10_000, steps[0], steps[0, :, 0])
    start_bytes = len(messages.pack_start(config.local_steps, 1e-5))
    rates = np.full(config.clients, 1e-5, np.float32)
    outcome = messages.Outcome(config.local_steps, np.arange(config.clients), None, rates, steps[:, :, 0], 1.0)
    update_bytes = len(messages.pack_update(update))
    all_weights = 2 * sum(int(np.prod(shape)) for shape in leaves(llama).values())
    table = {
        "all weights, 16 bits (counted)": (all_weights, all_weights),
        "LoRA, float32": (lora(np.float32),) * 2,
        "LoRA, float16": (lora(np.float16),) * 2,
        "coefficients, per-client directions": (
            update_bytes,
            start_bytes + len(messages.pack_outcome(outcome, config.clients, 0)),
        ),
        "coefficients, shared directions": (
            update_bytes,
            start_bytes + len(messages.pack_mean(config.local_steps, steps[0], 1.0)),
        ),
    }
    rows = [
        {"sent": name, "uplink_bytes": uplink, "downlink_bytes": downlink} for name, (uplink, downlink) in table.items()
    ]
    _cli.write_folder(config, rows, time.perf_counter() - start)
    plot(config.out / "communication.png", config, table)
    _cli.print_table(f"{config.model}, {parameters:,} LoRA parameters: bytes of a client and round", rows)


def plot(file: Path, config: Config, table: dict[str, tuple[int, int]]) -> None:
    """Plots the bytes of each message as bars on a logarithmic axis."""
    figure, axes = _plots.subplots(figsize=(7, 3))
    positions = np.arange(len(table))
    for shift, column, label in ((-0.2, 0, "up"), (0.2, 1, "down")):
        bars = axes.barh(positions + shift, [sizes[column] for sizes in table.values()], 0.38, label=label)
        axes.bar_label(bars, [f"{sizes[column]:,}" for sizes in table.values()], padding=3, fontsize="x-small")
    axes.set_yticks(positions, list(table))
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(10, 1e13), xlabel="bytes of a client and round")
    axes.set_title(f"{config.model}, r = {config.rank}, H = {config.local_steps}, {config.clients} clients")
    _plots.legend(figure, axes)
    _plots.save(figure, file, dpi=100)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
