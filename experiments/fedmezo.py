"""Fine-tunes a LLaMA across simulated clients with FedMeZO (arXiv 2402.05926), or with FedAvg to compare.

The defaults fine-tune a small LLaMA that ships with the package on data made on the spot:

    python -m experiments.fedmezo

A real model on real data:

    python -m experiments.fedmezo --model smollm2-135m --data gsm8k --data-dir FOLDER --partition iid --clients 4
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import _cli
from experiments._plots import plot_loss, plot_partition
from fedmezo_jax.data.buckets import lengths
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.precision import WARN_ABOVE, expected_error
from fedmezo_jax.parallel import multihost
from fedmezo_jax.parallel.sharding import parse_mesh
from fedmezo_jax.run import divergence, run_folder
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext, base_loss, prepare, resolve_defaults
from fedmezo_jax.run.journal import versions
from fedmezo_jax.run.loop import Result, probe_start, train
from fedmezo_jax.run.messages import lora_message


@dataclass(frozen=True)
class Config:
    """The main job's command line: what decides the run's numbers, and what does not."""

    run: RunConfig
    out: Path = Path("runs/fedmezo")
    """folder of the run"""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """go on with the run in --out from its last checkpoint"""
    mesh: str | None = None
    """devices along each axis, e.g. clients=4,model=2: groups of clients run side by side, and each group splits one
    copy of the frozen weights; by default all devices go to the clients"""
    processes: str | None = None
    """several processes for one run: ADDRESS:PORT,COUNT,INDEX of this one, or auto for what SLURM, Open MPI, GKE or a
    TPU pod says; by default what a launcher's environment says, if it has started several. --out is one folder to all
    of them"""
    process_timeout: int = 300
    """seconds to wait for the other processes to connect, and then for a heartbeat of each, before this one ends"""
    checkpoint_every: int = 5
    """rounds between checkpoints"""
    eval_every: int = 5
    """rounds between measurements of the test loss"""
    guard: bool = True
    """measure before the first round whether the learning rate is too large (144 forward passes; not in bfloat16, whose
    losses have no curvature to show)"""

    def __post_init__(self):
        """Refuses what cannot run."""
        for name in ("checkpoint_every", "eval_every", "process_timeout"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


def main(config: Config) -> None:
    """Prepares, trains, prints the table and writes the folder."""
    multihost.join(config.processes, config.process_timeout)
    with ExitStack() as held:
        if not multihost.is_coordinator():
            held.enter_context(contextlib.redirect_stdout(held.enter_context(open(os.devnull, "w"))))
        held.enter_context(multihost.report_peer_failure())
        held.enter_context(run_folder.guarded(config.out))
        _main(config, held)


def _main(config: Config, held: ExitStack) -> None:
    said = asdict(config) | asdict(config.run) | versions() | {"devices a process": jax.local_device_count()}
    multihost.check_same_config({name: value for name, value in said.items() if name not in ("run", "processes")})
    first, lock = multihost.is_coordinator(), run_folder.lock(config.out)
    config = replace(config, run=multihost.all_or_none(lambda: resolve_defaults(config.run, notify=print)))

    def open_folder() -> None:
        run_folder.check_folder(config.out, config.run, config.resume)
        if first and (config.out / "config.json").exists():
            held.enter_context(lock)  # so that a second run is refused before it loads anything

    def make_folder() -> None:
        config.out.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock)
        for notice in run_folder.check_folder(config.out, config.run, config.resume):
            print("notice:", notice)
        run_folder.write_json(config.out / "config.json", asdict(config.run))

    multihost.all_or_none(open_folder)
    setup = multihost.all_or_none(lambda: prepare(config.run, parse_mesh(config.mesh, jax.devices())))
    loss_before = base_loss(setup)
    begun = multihost.all_or_none((config.out / "metrics.jsonl").exists)
    multihost.all_or_none(make_folder if first else lambda: None)
    multihost.all_or_none(lambda: run_folder.check_shared(config.out))
    start = time.perf_counter()
    describe(setup)
    warn(config, setup, begun)
    if first:
        plot_partition(config.out / "partition.png", setup)
    result = _train(config, setup, loss_before)
    if first:
        conclude(config, setup, result, time.perf_counter() - start)


def warn(config: Config, setup: RunContext, begun: bool) -> None:
    """Says what is likely to go wrong: too coarse a precision; before the first round, too large a learning rate."""
    run = config.run
    if run.algorithm != "fedmezo":
        return
    precision = setup.model.precision
    if (error := expected_error(precision, run.perturbation_scale)) > WARN_ABOVE:
        size = f"{error:.0%}" if error < 10 else "more than 1000%"
        print(
            f"warning: at --precision {precision}, --perturbation-scale {run.perturbation_scale:g} the projected "
            f"gradient is likely off by {size}: choose paired or float32, or measure it with "
            "experiments.benchmarks.precision"
        )
    if config.guard and precision != "bfloat16" and not begun:
        for warning in divergence.warnings(probe_start(setup), run, divergence.count(setup.lora)):
            print("warning:", warning)


def _train(config: Config, setup: RunContext, loss_before: float) -> Result:
    with _progress() as bar:
        task = bar.add_task("rounds", total=config.run.rounds, loss="", pace="")

        def show(record: dict[str, Any]) -> None:
            pace = f"{record['seconds']:.2f} s/round"
            loss = "no loss" if record["train_loss"] is None else f"loss {record['train_loss']:.4f}"
            bar.update(task, completed=record["round"], loss=loss, pace=pace)

        intervals = {"checkpoint_every": config.checkpoint_every, "eval_every": config.eval_every}
        notify = partial(bar.console.print, "notice:", soft_wrap=True, markup=False, highlight=False)
        return train(setup, config.out, **intervals, loss_before=loss_before, on_round=show, notify=notify)


def conclude(config: Config, setup: RunContext, result: Result, seconds: float) -> None:
    """Writes results and plot, and prints them."""
    rows = _rows(config.run, setup, result)
    _cli.write_results(config.out, rows, seconds)
    plot_loss(config.out / "loss.png", result.loss_before, result.metrics, config.run)
    _cli.print_table(f"bytes are of one client in one round, at most; this run sent {rows[0]['messages']}", rows)
    change = 100 * (result.loss_after / result.loss_before - 1)
    print(f"padding: {np.mean([record['padding_share'] for record in result.metrics]):.1%} of the computed tokens")
    if failed := Counter(event["why"] for record in result.metrics for event in record["failed"]):
        print("clients left out: " + ", ".join(f"{count} {why}" for why, count in failed.most_common()))
    print(f"test loss {result.loss_before:.4f} -> {result.loss_after:.4f} ({change:+.1f} %)")
    ledger = "run.ledger, " if config.run.algorithm == "fedmezo" else ""
    print(f"{config.out}: {ledger}metrics.jsonl, results.json, loss.png, partition.png, adapter/, checkpoints/")


def _rows(config: RunConfig, setup: RunContext, result: Result) -> list[dict[str, Any]]:
    """The table: the messages that were sent, and for comparison the LoRA that was not."""
    later = result.metrics[1:] or result.metrics  # the first round compiles
    pace = sorted(record["seconds"] for record in later)[len(later) // 2]
    largest = {
        way: max(size for record in result.metrics for size in record[f"client_{way}link_bytes"])
        for way in ("up", "down")
    }
    forms = {"coefficients" if config.sends_coefficients else "lora": largest}
    if config.sends_coefficients:
        forms["lora"] = dict.fromkeys(largest, len(lora_message(setup.lora)))
    return [
        {
            "messages": form,
            "loss_before": result.loss_before,
            "loss_after": result.loss_after,
            "uplink_bytes": size["up"],
            "downlink_bytes": size["down"],
            "forward_passes": sum(record["forward_passes"] for record in result.metrics),
            "seconds_per_round": pace,
        }
        for form, size in forms.items()
    ]


def describe(setup: RunContext) -> None:
    """Prints what will run: sizes, and how the categories are spread over the clients."""
    config, llama = setup.config, setup.model.config
    print(
        f"{config.algorithm}: {config.model} ({llama.num_hidden_layers} layers of {llama.hidden_size}), "
        f"{divergence.count(setup.lora):,} LoRA parameters at rank {config.lora_rank} on {config.targets}"
    )
    dropped = f", {setup.dropped} too long for {config.max_length} tokens left out" if setup.dropped else ""
    cut = f", {setup.cut} cut to {config.max_length} tokens" if setup.cut else ""
    print(f"{config.data}: {len(setup.train.tokens)} training and {len(setup.test.tokens)} test rows{dropped}{cut}")
    if config.algorithm == "fedavg":
        print("no run.ledger: back-propagated steps are no scalars that could rebuild the run")
    held, wide = lengths(setup.train).mean(), setup.train.tokens.shape[1]
    print(
        f"rows of {held:.0f} tokens on average, padded to {', '.join(str(width.tokens) for width in setup.widths)} "
        f"(to {wide} alone, {1 - held / wide:.0%} would be padding)"
    )
    names = sorted(set(setup.categories))
    if names != [""]:
        shown = setup.parts[:10]
        more = f", the first {len(shown)} of {len(setup.parts)} clients" if len(shown) < len(setup.parts) else ""
        groups = {name: [Counter(setup.categories[row] for row in part)[name] for part in shown] for name in names}
        groups["all"] = [len(part) for part in shown]
        table = [{"category": name} | {str(i): n for i, n in enumerate(counts)} for name, counts in groups.items()]
        _cli.print_table(f"rows of each client, {config.partition} partition{more}", table)
    print(f"heterogeneity: mean total-variation distance {setup.heterogeneity:.3f}")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    return Progress(*columns, TextColumn("{task.fields[pace]}"), TimeRemainingColumn())


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
