"""Fine-tunes a LLaMA across simulated clients with FedMeZO (arXiv 2402.05926), or with FedAvg to compare.

The defaults fine-tune a small LLaMA that ships with the package on data made on the spot:

    python -m experiments.fedmezo

A real model on real data:

    python -m experiments.fedmezo --model smollm2-135m --data gsm8k --data-dir FOLDER --partition iid --clients 4
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import _cli
from experiments._plots import plot_loss, plot_partition
from fedmezo_jax.data.buckets import lengths
from fedmezo_jax.errors import UserError
from fedmezo_jax.parallel import multihost
from fedmezo_jax.run import divergence, run_folder, trackers
from fedmezo_jax.run.config import RECIPES, RunConfig, read_config, recipe_of
from fedmezo_jax.run.context import RunContext
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.loop import RunResult
from fedmezo_jax.run.messages import lora_message
from fedmezo_jax.run.trackers import Tracker

OPTIONS = ("resume", "mesh", "checkpoint_every", "eval_every", "check_rate")
"""What :func:`fine_tune` takes as it is given."""


@dataclass(frozen=True)
class Config:
    """The main job's command line: what decides the run's numbers, and what does not."""

    run: RunConfig
    recipe: Literal["fast", "paper"] | None = None
    """start from the defaults (fast) or from the published method (paper), which sets --targets, --layers,
    --estimator, --directions, --distribution, --learning-rate and --server-learning-rate"""
    config: Path | None = None
    """config.json of a run, whose options take the place of the defaults; options given beside it come before its own
    """
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
    track: Tracker | None = None
    """also write what metrics.jsonl has to a tracker, which must be installed: tensorboard writes into --out, trackio
    into its local database, wandb to its service"""
    check_rate: bool = True
    """measure before the first round whether the learning rate is too large (144 forward passes; not in bfloat16, whose
    losses have no curvature to show)"""

    def __post_init__(self):
        """Refuses what cannot run."""
        if self.process_timeout < 1:
            raise UserError(f"--process-timeout must be at least 1, not {self.process_timeout}")

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Config | None:
        """The options before those of the command line: from the file after ``--config``, or from ``--recipe``."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--config", type=Path)
        parser.add_argument("--recipe", choices=list(RECIPES))
        with contextlib.suppress(argparse.ArgumentError):  # the command line's own parser says what is wrong
            given, _ = parser.parse_known_args(arguments)
            if given.config and given.recipe:
                raise UserError("--recipe and --config both say where to start from: give one of them")
            if given.config:
                return cls(read_config(given.config))
            if given.recipe:
                return cls(RECIPES[given.recipe]())
        return None


def main(config: Config) -> None:
    """Prepares, trains, prints the table and writes the folder."""
    if config.track:
        trackers.check(config.track)
    multihost.join(config.processes, config.process_timeout)
    with ExitStack() as stack:
        if not multihost.is_coordinator():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        start, result = _fine_tune(config)
        if multihost.is_coordinator():
            with run_folder.guarded(config.out):
                conclude(config.out, result, time.perf_counter() - start)


def _fine_tune(config: Config) -> tuple[float, RunResult]:
    """The run, shown as it goes on, and when it began."""
    start, bar, stack = 0.0, _progress(), ExitStack()
    log: trackers.Log | None = None
    task = bar.add_task("rounds", total=config.run.rounds, loss="", pace="")

    def begin(context: RunContext) -> None:
        nonlocal start, log
        start = time.perf_counter()
        describe(context)
        if multihost.is_coordinator() and config.track:
            log = stack.enter_context(trackers.opened(config.track, config.out, asdict(context.config)))
        stack.enter_context(bar)

    def show(record: dict[str, Any]) -> None:
        pace = f"{record['seconds']:.2f} s/round"
        loss = "no loss" if record["train_loss"] is None else f"loss {record['train_loss']:.4f}"
        bar.update(task, completed=record["round"], loss=loss, pace=pace)
        if log:
            log(record)

    options = {name: getattr(config, name) for name in OPTIONS}
    notify = partial(bar.console.print, soft_wrap=True, markup=False, highlight=False)
    with stack:
        result = fine_tune(config.run, config.out, **options, on_start=begin, on_round=show, notify=notify)
    return start, result


def conclude(out: Path, result: RunResult, seconds: float) -> None:
    """Writes results and plots, and prints them."""
    rows, config = _rows(result), result.context.config
    _cli.write_results(out, rows, seconds)
    plot_loss(out / "loss.png", result.loss_before, result.metrics, config)
    plot_partition(out / "partition.png", result.context)
    _cli.print_table(f"bytes are of one client in one round, at most; this run sent {rows[0]['messages']}", rows)
    change = 100 * (result.loss_after / result.loss_before - 1)
    print(f"padding: {np.mean([record['padding_share'] for record in result.metrics]):.1%} of the computed tokens")
    if failed := Counter(event["why"] for record in result.metrics for event in record["failed"]):
        print("clients left out: " + ", ".join(f"{count} {why}" for why, count in failed.most_common()))
    if config.learning_rate == "auto":
        taken = Counter(record["server_step"] for record in result.metrics)
        counts = ", ".join(f"{step:g}: {taken[step]}" for step in sorted(taken, reverse=True))
        print(f"rounds by how much of their update the server took: {counts}")
    print(f"test loss {result.loss_before:.4f} -> {result.loss_after:.4f} ({change:+.1f} %)")
    ledger = "run.ledger, " if config.algorithm == "fedmezo" else ""
    print(f"{out}: {ledger}metrics.jsonl, results.json, loss.png, partition.png, adapter/, checkpoints/")


def _rows(result: RunResult) -> list[dict[str, Any]]:
    """The table: the messages that were sent, and for comparison the LoRA that was not."""
    sends_coefficients = result.context.config.sends_coefficients
    later = result.metrics[1:] or result.metrics  # the first round compiles
    pace = sorted(record["seconds"] for record in later)[len(later) // 2]
    largest = {
        way: max(size for record in result.metrics for size in record[f"client_{way}link_bytes"])
        for way in ("up", "down")
    }
    forms = {"coefficients" if sends_coefficients else "lora": largest}
    if sends_coefficients:
        forms["lora"] = dict.fromkeys(largest, len(lora_message(result.context.params)))
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


_RECIPE_NOTES = {
    "fast": " (the fast recipe; --recipe paper is the published method)",
    "paper": " (the published method)",
}


def describe(setup: RunContext) -> None:
    """Prints what will run: sizes, and how the categories are spread over the clients."""
    config, llama = setup.config, setup.task.model.config
    trained = len(setup.task.model.trained_layers)
    print(
        f"{config.algorithm}: {config.model} ({llama.num_hidden_layers} layers of {llama.hidden_size}), "
        f"{divergence.count(setup.params):,} LoRA parameters at rank {config.lora_rank} on {config.targets} "
        f"of {trained} layer{'s' if trained > 1 else ''}"
    )
    if config.algorithm == "fedmezo":
        print(
            f"{config.estimator} along {config.directions} {config.distribution} "
            f"direction{'s' if config.directions > 1 else ''} a step, learning rate {config.learning_rate}"
            f"{_RECIPE_NOTES.get(recipe_of(config) or '', '')}"
        )
    skipped = f", {setup.skipped} too long for {config.max_length} tokens left out" if setup.skipped else ""
    truncated = f", {setup.truncated} truncated to {config.max_length} tokens" if setup.truncated else ""
    train, test = len(setup.task.train.labels), len(setup.task.test.labels)
    print(f"{config.data}: {train} training and {test} test examples{skipped}{truncated}")
    if config.algorithm == "fedavg":
        print("no run.ledger: back-propagated steps are no scalars that could rebuild the run")
    mean_length, width = lengths(setup.task.train).mean(), setup.task.train[0].shape[1]
    offered = ", ".join(str(bucket.tokens) for bucket in setup.task.widths)
    print(
        f"examples of {mean_length:.0f} tokens on average, padded to {offered} "
        f"(to {width} alone, {1 - mean_length / width:.0%} would be padding)"
    )
    names = sorted(set(setup.categories))
    if names != [""]:
        parts = setup.task.parts
        shown = parts[:10]
        more = f", the first {len(shown)} of {len(parts)} clients" if len(shown) < len(parts) else ""
        groups = {name: [Counter(setup.categories[row] for row in part)[name] for part in shown] for name in names}
        groups["all"] = [len(part) for part in shown]
        table = [{"category": name} | {str(i): n for i, n in enumerate(counts)} for name, counts in groups.items()]
        _cli.print_table(f"examples per client, {config.partition} partition{more}", table)
    print(f"heterogeneity: mean total-variation distance {setup.heterogeneity:.3f}")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    return Progress(*columns, TextColumn("{task.fields[pace]}"), TimeRemainingColumn())


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
