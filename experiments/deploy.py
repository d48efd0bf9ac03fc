"""Runs with the server and each client in processes of their own, which Flower connects.

All of it on this machine, with TLS and registered keys (needs `pip install 'fedmezo_jax[flower]'`):

    python -m experiments.deploy local --clients 3

The worker of one client, which answers what its SuperNode passes on:

    python -m experiments.deploy worker --config config.json --client 0 --examples FILE.jsonl --socket PATH
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import _cli
from fedmezo_jax.deploy.client import Client
from fedmezo_jax.deploy.examples import TEST, VALIDATION_FILE, OwnExamples, deal_out
from fedmezo_jax.deploy.flower import STATUS, answer_at, write_settings
from fedmezo_jax.deploy.local_network import LocalNetwork, Processes, environment
from fedmezo_jax.deploy.server import Patience
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.registry import cache_folder
from fedmezo_jax.out_folder import out_folder
from fedmezo_jax.run import run_folder
from fedmezo_jax.run.config import RunConfig, read_config
from fedmezo_jax.run.job import to_stderr
from fedmezo_jax.run.prepare import resolve_defaults


@dataclass(frozen=True)
class Config:
    """What to start, and the run."""

    command: Annotated[Literal["local", "worker"], tyro.conf.Positional]
    """local: a whole run on this machine; worker: one client's worker"""
    run: RunConfig
    config: Path | None = None
    """config.json of the run, whose options take the place of the defaults"""
    out: Path | None = None
    """local: folder of the run (run/) and of all that its parties have (data/, network/); by default runs/deployed"""
    exact: bool = True
    """local: have each client compute beside copies of itself, so that its numbers are the simulation's on every model;
    without, a client does a fraction of the work"""
    seeded_noise: bool = False
    """take the noise of --dp-epsilon from the seed, which protects nobody, and not from the operating system"""
    round_seconds: float = 600.0
    """local: when the server stops waiting for a round's clients"""
    client: int = 0
    """worker: its id"""
    examples: Path | None = None
    """worker: its own examples, a .json, .jsonl or .parquet file"""
    model_here: str | None = None
    """worker: the model as it is called here, if that is not what --model of the run says"""
    socket: Path | None = None
    """worker: where it listens"""

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Config | None:
        """The options of the file after ``--config``, before those of the command line."""
        if "--config" not in arguments[:-1]:
            return None
        run = read_config(Path(arguments[list(arguments).index("--config") + 1]))
        return cls(tyro.MISSING, run)


def main(config: Config) -> None:
    """Starts what is asked for."""
    if config.command == "worker":
        work(config)
    else:
        out = (config.out or Path("runs/deployed")).absolute()
        with out_folder(out), tempfile.TemporaryDirectory(prefix="fedmezo-") as sockets:
            run_here(config, out, Path(sockets))  # the path of a socket has no more than 107 bytes


def work(config: Config) -> None:
    """One client's worker, until it is ended."""
    if config.examples is None or config.socket is None:
        raise UserError("worker: give --examples and --socket")
    own = OwnExamples(config.run, [config.examples], config.model_here)
    client = Client(config.client, own, seeded_noise=config.seeded_noise, notify=to_stderr)
    to_stderr(f"client {config.client} waits at {config.socket}")
    answer_at(config.socket, client)


def run_here(config: Config, out: Path, sockets: Path) -> None:
    """A whole run on this machine, with its progress as the main job shows it."""
    if any(out.iterdir()):
        raise UserError(f"--out {out}: holds other files: give a new or empty folder")
    run = resolve_defaults(config.run, print)
    data, network = out / "data", out / "network"
    network.mkdir()
    run_folder.write_json(out / "config.json", asdict(run))
    deal_out(run, data)
    with Processes(network, environment(network)) as processes:
        for client in range(run.clients):
            where = ["--client", client, "--examples", data / f"client-{client}.jsonl", "--socket"]
            worker = [sys.executable, "-m", "experiments.deploy", "worker", "--config", out / "config.json"]
            noise = ["--seeded-noise"] if config.seeded_noise else []
            processes.start(f"worker-{client}", [*worker, *where, sockets / str(client), *noise])
        links = LocalNetwork(network, run.clients, processes)
        links.start_link()
        for client in range(run.clients):
            links.start_node(client, sockets / str(client))
        _wait_for([sockets / str(client) for client in range(run.clients)], processes)
        settings = network / "settings.json"
        write_settings(
            settings,
            config=str(out / "config.json"),
            out=str(out / "run"),
            files=[str(data / name) for name in (TEST, VALIDATION_FILE) if (data / name).exists()],
            nodes=links.nodes,
            options={"exact": config.exact, "seeded_noise": config.seeded_noise},
            patience=Patience(config.round_seconds, config.round_seconds)._asdict(),
            cache=str(cache_folder() / "compiled"),
        )
        links.run(settings)
        ended = _follow(out / "run", network / STATUS, run.rounds, processes)
    if error := ended.get("error"):
        raise UserError(error)
    print(f"test loss {ended['loss_before']:.4f} -> {ended['loss_after']:.4f}")
    print(f"{out / 'run'}: run.ledger, metrics.jsonl, adapter/, checkpoints/")


def _wait_for(files: Sequence[Path], processes: Processes) -> None:
    while not all(file.exists() for file in files):
        processes.check()
        time.sleep(0.2)


def _follow(folder: Path, status: Path, rounds: int, processes: Processes) -> dict[str, Any]:
    """Shows the rounds as they are recorded, and returns how the run ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TextColumn("{task.fields[pace]}"), TimeRemainingColumn()) as bar:
        task = bar.add_task("rounds", total=rounds, loss="", pace="")
        while not (ended := _read_status(status)):
            processes.check()
            for record in run_folder.read_metrics(folder)[-1:]:
                pace = f"{record['seconds']:.2f} s/round"
                loss = "no loss" if record["train_loss"] is None else f"loss {record['train_loss']:.4f}"
                bar.update(task, completed=record["round"], loss=loss, pace=pace)
            time.sleep(0.5)
        bar.update(task, completed=len(run_folder.read_metrics(folder)))
    return ended


def _read_status(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
