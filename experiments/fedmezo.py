"""Fine-tunes a LLaMA across simulated clients with FedMeZO (arXiv 2402.05926), or with FedAvg to compare.

The defaults fine-tune a small LLaMA that ships with the package on data made on the spot:

    python -m experiments.fedmezo

A real model on real data:

    python -m experiments.fedmezo --model smollm2-135m --data gsm8k --data-dir FOLDER --partition iid --clients 4
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments import common
from experiments.plots import plot_loss, plot_partition
from fedmezo_jax import run_folder
from fedmezo_jax.config import RunConfig
from fedmezo_jax.data.buckets import lengths
from fedmezo_jax.errors import UserError
from fedmezo_jax.training import Setup, forward_passes, lora_traffic, prepare, seed_traffic, train


@dataclass(frozen=True)
class Config:
    """The main job's command line: what decides the run's numbers, and what does not."""

    run: RunConfig
    out: Path = Path("runs/fedmezo")
    """folder of the run"""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """go on with the run in --out from its last checkpoint"""
    mesh: str = "clients=1,model=1"
    """devices along each axis; one device is all that this version runs on"""
    checkpoint_every: int = 5
    """rounds between checkpoints"""
    eval_every: int = 5
    """rounds between measurements of the test loss"""

    def __post_init__(self):
        """Refuses what cannot run."""
        if self.mesh.replace(" ", "") != "clients=1,model=1":
            raise UserError(f"--mesh {self.mesh}: only clients=1,model=1 runs so far")
        for name in ("checkpoint_every", "eval_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


def main(config: Config) -> None:
    """Prepares, trains, prints the table and writes the folder."""
    start = time.perf_counter()
    run_folder.check_folder(config.out, config.run, config.resume)
    setup = prepare(config.run)
    config.out.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(config.out / "config.json", asdict(config.run))
    describe(setup)
    plot_partition(config.out / "partition.png", setup)
    with _progress() as bar:
        task = bar.add_task("rounds", total=config.run.rounds, loss="", pace="")

        def show(record: dict[str, Any]) -> None:
            pace = f"{record['seconds']:.2f} s/round"
            bar.update(task, completed=record["round"], loss=f"loss {record['train_loss']:.4f}", pace=pace)

        intervals = {"checkpoint_every": config.checkpoint_every, "eval_every": config.eval_every}
        result = train(setup, config.out, **intervals, on_round=show)
    later = result.metrics[1:] or result.metrics  # the first round compiles
    pace = sorted(record["seconds"] for record in later)[len(later) // 2]
    forms = {"lora": lora_traffic(setup)}
    if config.run.algorithm == "fedmezo":
        forms["seeds"] = seed_traffic(config.run)
    rows = [
        {
            "messages": form,
            "loss_before": result.loss_before,
            "loss_after": result.loss_after,
            "uplink_bytes": traffic.up,
            "downlink_bytes": traffic.down,
            "forward_passes": forward_passes(config.run) * config.run.rounds,
            "seconds_per_round": pace,
        }
        for form, traffic in forms.items()
    ]
    common.write_results(config.out, rows, time.perf_counter() - start)
    plot_loss(config.out / "loss.png", result.loss_before, result.metrics, config.run)
    common.print_table("bytes are of one client in one round; this run sent LoRA", rows)
    change = 100 * (result.loss_after / result.loss_before - 1)
    print(f"padding: {np.mean([record['padding_share'] for record in result.metrics]):.1%} of the computed tokens")
    print(f"test loss {result.loss_before:.4f} -> {result.loss_after:.4f} ({change:+.1f} %)")
    print(f"{config.out}: metrics.jsonl, results.json, loss.png, partition.png, adapter/, checkpoints/")


def describe(setup: Setup) -> None:
    """Prints what will run: sizes, and how the categories are spread over the clients."""
    config, llama = setup.config, setup.model.config
    trained = sum(leaf.size for half in setup.lora.values() for leaf in half.values())
    print(
        f"{config.algorithm}: {config.model} ({llama.num_hidden_layers} layers of {llama.hidden_size}), "
        f"{trained:,} LoRA parameters at rank {config.lora_rank} on {config.targets}"
    )
    dropped = f", {setup.dropped} too long for {config.max_length} tokens left out" if setup.dropped else ""
    cut = f", {setup.cut} cut to {config.max_length} tokens" if setup.cut else ""
    print(f"{config.data}: {len(setup.train.tokens)} training and {len(setup.test.tokens)} test rows{dropped}{cut}")
    held, wide = lengths(setup.train).mean(), setup.train.tokens.shape[1]
    print(
        f"rows of {held:.0f} tokens on average, padded to {', '.join(str(width.tokens) for width in setup.widths)} "
        f"(to {wide} alone, {1 - held / wide:.0%} would be padding)"
    )
    names = sorted(set(setup.categories))
    if names != [""]:
        shown = setup.parts[:10]
        more = f", the first {len(shown)} of {len(setup.parts)} clients" if len(shown) < len(setup.parts) else ""
        table = Table(title=f"rows of each client, {config.partition} partition{more}", title_justify="left")
        table.add_column("category")
        for i in range(len(shown)):
            table.add_column(str(i), justify="right")
        counts = [Counter(setup.categories[row] for row in part) for part in shown]
        for name in names:
            table.add_row(name, *(str(count[name] or "·") for count in counts))
        table.add_row("all", *(str(len(part)) for part in shown), style="bold")
        Console().print(table)
    print(f"heterogeneity: mean total-variation distance {setup.heterogeneity:.3f}")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    return Progress(*columns, TextColumn("{task.fields[pace]}"), TimeRemainingColumn())


if __name__ == "__main__":
    common.run(main, Config, __doc__)
