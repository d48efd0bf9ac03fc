"""A deployed run that the SuperLink is told to start, shown to its end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedmezo_jax.deploy.flower import APP, RUNNING, has_died, read_status, write_settings
from fedmezo_jax.deploy.local_network import Processes, SuperLink
from fedmezo_jax.deploy.server import Patience
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.registry import cache_folder
from fedmezo_jax.run import run_folder
from fedmezo_jax.run.config import read_config

SETTINGS = "settings.json"


def start_and_show(
    out: Path,
    files: Sequence[Path],
    nodes: Sequence[str],
    keys: dict[str, Any] | None,
    options: dict[str, bool],
    patience: Patience,
    link: SuperLink,
    processes: Processes,
) -> None:
    """Has the SuperLink start the run, and shows it to its end.

    Args:
        out: the command's folder, with the run's ``config.json`` and, in ``network``, the SuperLink's files.
        files: the server's examples.
        nodes: the clients' SuperNodes.
        keys: of :func:`credentials.read_server_keys`, where the run is signed.
        options: of :func:`server.serve`.
        patience: how long to wait for clients.
        link: the SuperLink.
        processes: all that must be running.

    Raises:
        UserError: how the run ended, if not well.
    """
    settings = out / "network" / SETTINGS
    write_settings(
        settings,
        config=str(out / "config.json"),
        out=str(out / "run"),
        files=list(map(str, files)),
        nodes=nodes,
        options=options,
        patience=patience._asdict(),
        cache=str(cache_folder() / "compiled"),
        keys=keys,
    )
    link.run(APP, {"settings": str(settings)})
    ended = _follow(out / "run", settings.parent, read_config(out / "config.json").rounds, processes)
    if error := ended.get("error"):
        raise UserError(error)
    print(f"test loss {ended['loss_before']:.4f} -> {ended['loss_after']:.4f}")
    print(f"{out / 'run'}: run.ledger, metrics.jsonl, adapter/, checkpoints/")


def check_options(out: Path, options: Mapping[str, bool]) -> None:
    """Refuses to go on with a run with other options than it was started with.

    Raises:
        UserError: names the option.
    """
    file = out / "network" / SETTINGS
    before = json.loads(file.read_text(encoding="utf-8"))["options"] if file.exists() else {}
    for name, switch in (("exact", "exact"), ("seeded_noise", "seeded-noise")):
        if name in before and before[name] != options[name]:
            now = "" if options[name] else "no-"
            raise UserError(f"--resume: the run in {out} was started otherwise than with --{now}{switch}: do as then")


def _follow(folder: Path, network: Path, rounds: int, processes: Processes) -> dict[str, Any]:
    """Shows the rounds as they are recorded, and returns how the run ended.

    Raises:
        UserError: a process has ended before.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TextColumn("{task.fields[pace]}"), TimeRemainingColumn()) as bar:
        task = bar.add_task("rounds", total=rounds, loss="", pace="")
        while (ended := read_status(network)) in (None, RUNNING):
            processes.check(", and go on with --resume")
            if has_died(network):
                raise UserError(f"the server was ended: see {network / 'superexec.log'}, and go on with --resume")
            for record in run_folder.read_metrics(folder)[-1:]:
                pace = f"{record['seconds']:.2f} s/round"
                loss = "no loss" if record["train_loss"] is None else f"loss {record['train_loss']:.4f}"
                bar.update(task, completed=record["round"], loss=loss, pace=pace)
            time.sleep(0.5)
        bar.update(task, completed=len(run_folder.read_metrics(folder)))
    return ended
