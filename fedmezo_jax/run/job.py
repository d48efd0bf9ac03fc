"""A run from beginning to end: its folder and lock, the checks before the first round, the rounds, the adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

import jax

from fedmezo_jax.core.task import Task
from fedmezo_jax.errors import UserError
from fedmezo_jax.parallel import multihost
from fedmezo_jax.parallel.sharding import parse_mesh
from fedmezo_jax.run import divergence, run_folder, signatures
from fedmezo_jax.run.clients import Clients, SimulatedClients
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext, context_of, task_name
from fedmezo_jax.run.journal import versions
from fedmezo_jax.run.loop import RunResult, probe_start, train
from fedmezo_jax.run.prepare import precision_warnings, prepare, resolve_defaults
from fedmezo_jax.run.privacy_plan import describe


def to_stderr(line: str) -> None:
    """Prints a line on standard error."""
    print(line, file=sys.stderr, flush=True)


def fine_tune(
    config: RunConfig,
    out: str | PathLike[str],
    *,
    task: Task | None = None,
    resume: bool = False,
    mesh: str | None = None,
    checkpoint_every: int = 5,
    eval_every: int = 5,
    check_rate: bool = True,
    on_start: Callable[[RunContext], None] = lambda context: None,
    on_round: Callable[[dict[str, Any]], None] = lambda record: None,
    notify: Callable[[str], None] = to_stderr,
) -> RunResult:
    """Fine-tunes a model across simulated clients: all that ``python -m experiments.fedmezo`` does but its pictures.

    The folder gets ``config.json``, ``run.ledger``, ``metrics.jsonl``, ``checkpoints/`` and what the task saves, for a
    LLaMA ``adapter/``. It is locked
    while the run works in it. Where several processes are joined (:func:`multihost.join`), all of them call this with
    the same arguments, and the first one writes. (It is not called ``run``: that is the name of the subpackage.)

    Args:
        config: what decides the run's numbers.
        task: what to train, if it is not the LLaMA and the data that ``config`` names; the options of ``config`` about
            model, LoRA and data are then not used, and ``clients`` must be that of the task.
        out: the run's folder, new or empty, or with ``resume`` one that holds this run.
        resume: go on with the run from its last checkpoint.
        mesh: devices along each axis, e.g. ``clients=4,model=2``; by default all devices go to the clients.
        checkpoint_every: rounds between checkpoints.
        eval_every: rounds between measurements of the test loss.
        check_rate: measure before the first round whether the learning rate is too large (144 forward passes).
        on_start: called with what the run works with, when all is loaded and before the first round.
        on_round: called with each round's record in ``metrics.jsonl``, those of earlier sessions first.
        notify: called with each line that the user should read.

    Raises:
        UserError: the configuration does not fit the model, the data or the devices, the folder cannot be used, all
            clients of a round failed too often, or the disk is full.
    """
    folder = Path(out)
    with multihost.report_peer_failure(), run_folder.guarded(folder):
        options = {"out": out, "resume": resume, "mesh": mesh, "check_rate": check_rate}
        options |= {"checkpoint_every": checkpoint_every, "eval_every": eval_every}
        environment = versions() | {"devices a process": jax.local_device_count()}
        multihost.check_same_config(asdict(config) | options | environment)
        if task is None:
            config = multihost.all_or_none(lambda: resolve_defaults(config, notify))
        else:
            config = replace(config, model=task_name(task), data=task_name(task))

        def load() -> RunContext:
            devices = parse_mesh(mesh, jax.devices())
            return prepare(config, devices, notify) if task is None else context_of(task, config, devices)

        return run_in_folder(
            config,
            folder,
            load,
            resume=resume,
            checkpoint_every=checkpoint_every,
            eval_every=eval_every,
            check_rate=check_rate,
            on_start=on_start,
            on_round=on_round,
            notify=notify,
        )


def run_in_folder(
    config: RunConfig,
    folder: Path,
    load: Callable[[], RunContext],
    *,
    resume: bool,
    checkpoint_every: int,
    eval_every: int,
    check_rate: bool,
    on_start: Callable[[RunContext], None],
    on_round: Callable[[dict[str, Any]], None],
    notify: Callable[[str], None],
    clients_of: Callable[[RunContext], Clients] = SimulatedClients,
    keys: signatures.ServerKeys | None = None,
) -> RunResult:
    """A run in its folder, whoever its clients are: :func:`fine_tune` from there on where the configuration is settled.

    Args:
        config: the run's, settled.
        folder: as ``out`` of :func:`fine_tune`.
        load: makes what the run works with; called when the folder has been found fit.
        resume: see :func:`fine_tune`, as all that is not explained here.
        checkpoint_every: rounds between checkpoints.
        eval_every: rounds between measurements of the test loss.
        check_rate: whether to measure the learning rate, which takes training examples.
        on_start: called when all is loaded.
        on_round: called with each round's record.
        notify: called with each line that the user should read.
        clients_of: makes those who do the local work.
        keys: the server's in a signed run, by default those of a simulation.

    Raises:
        UserError: see :func:`fine_tune`.
    """
    for name, every in (("checkpoint-every", checkpoint_every), ("eval-every", eval_every)):
        if every < 1:
            raise UserError(f"--{name} must be at least 1, not {every}")
    with ExitStack() as stack:
        context, loss_before = _open(config, folder, load, resume, stack, notify)
        begun = multihost.all_or_none((folder / "metrics.jsonl").exists)
        on_start(context)
        if guarantee := describe(config, context.seeded_noise):
            notify(f"privacy: {guarantee}")
        for warning in warnings(context, check_rate and not begun and config.sends_losses):
            notify(f"warning: {warning}")
        return train(
            context,
            folder,
            checkpoint_every=checkpoint_every,
            eval_every=eval_every,
            loss_before=loss_before,
            on_round=on_round,
            notify=lambda notice: notify(f"notice: {notice}"),
            clients=clients_of(context),
            keys=keys,
        )


def _open(
    config: RunConfig,
    folder: Path,
    load: Callable[[], RunContext],
    resume: bool,
    stack: ExitStack,
    notify: Callable[[str], None],
) -> tuple[RunContext, float]:
    """Loads and checks everything, and only then makes the folder; its lock goes into ``stack``.

    Returns:
        What the run works with, and its test loss before training.
    """
    first, lock = multihost.is_coordinator(), run_folder.lock(folder)

    def check() -> None:
        run_folder.check_folder(folder, config, resume)
        if first and (folder / "config.json").exists():
            stack.enter_context(lock)  # so that a second run is refused before it loads anything

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock)
        for notice in run_folder.check_folder(folder, config, resume):
            notify(f"notice: {notice}")
        run_folder.write_json(folder / "config.json", asdict(config))

    multihost.all_or_none(check)

    context = multihost.all_or_none(load)
    loss_before = context.task.loss_before(context.params)
    multihost.all_or_none(make if first else lambda: None)
    multihost.all_or_none(lambda: run_folder.check_shared(folder))
    return context, loss_before


def warnings(context: RunContext, check_rate: bool) -> Iterator[str]:
    """What is likely to go wrong: too coarse a precision and, measured with ``check_rate``, too large a learning rate.

    There is nothing to measure in bfloat16, whose losses show no curvature.
    """
    config = context.config
    if config.algorithm != "fedmezo":
        return
    yield from precision_warnings(config)
    if check_rate and config.learning_rate != "auto" and config.precision != "bfloat16":
        yield from divergence.warnings(probe_start(context), config, divergence.count(context.params))
