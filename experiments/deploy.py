"""Runs with the server and each client in processes of their own, which Flower connects.

All of it on this machine, with TLS and registered keys (needs `pip install 'fedmezo_jax[flower]'`):

    python -m experiments.deploy local --clients 3

The worker of one client, which answers what its SuperNode passes on:

    python -m experiments.deploy worker --config config.json --client 0 --examples FILE.jsonl --socket PATH
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import _cli
from fedmezo_jax.deploy.client import Client
from fedmezo_jax.deploy.credentials import read_signing_key, write_key
from fedmezo_jax.deploy.examples import TEST, VALIDATION_FILE, OwnExamples, deal_out
from fedmezo_jax.deploy.flower import RUNNING, answer_at, has_died, read_status, write_settings
from fedmezo_jax.deploy.local_network import AGAIN, LocalNetwork, Processes, environment
from fedmezo_jax.deploy.server import Patience
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.registry import cache_folder
from fedmezo_jax.out_folder import out_folder
from fedmezo_jax.run import run_folder
from fedmezo_jax.run.config import RunConfig, read_config
from fedmezo_jax.run.job import to_stderr
from fedmezo_jax.run.prepare import resolve_defaults
from fedmezo_jax.run.signatures import simulated_keys


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
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """local: go on with the run in --out from its last checkpoint"""
    exact: bool = True
    """local: have each client compute beside copies of itself, so that its numbers are the simulation's on every model;
    without, a client does a fraction of the work"""
    seeded_noise: bool = False
    """take noise from the seed, which protects nobody"""
    round_seconds: float = 600.0
    """local: when the server stops waiting for a round's clients"""
    client: int = 0
    """worker: its id"""
    examples: Path | None = None
    """worker: its own examples, a .json, .jsonl or .parquet file"""
    signing_key: Path | None = None
    """worker: its private key in a --signed run, as ssh-keygen -t ed25519 writes it"""
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
        with ExitStack() as stack:
            for context in (run_folder.guarded(out), out_folder(out), run_folder.lock(out)):
                stack.enter_context(context)
            sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmezo-"))
            run_here(config, out, Path(sockets))  # the path of a socket has no more than 107 bytes


def work(config: Config) -> None:
    """One client's worker, until it is ended."""
    if config.examples is None or config.socket is None:
        raise UserError("worker: give --examples and --socket")
    own = OwnExamples(config.run, [config.examples], config.model_here)
    key = config.signing_key and read_signing_key(config.signing_key)
    client = Client(config.client, own, key, seeded_noise=config.seeded_noise, notify=to_stderr)
    to_stderr(f"client {config.client} waits at {config.socket}")
    answer_at(config.socket, client)


def run_here(config: Config, out: Path, sockets: Path) -> None:
    """A whole run on this machine, with its progress as the main job shows it."""
    run = resolve_defaults(config.run, print)
    for notice in run_folder.check_folder(out, run, config.resume):
        print(f"notice: {notice}")
    data, network = out / "data", out / "network"
    run_folder.write_json(out / "config.json", asdict(run))
    if not data.exists():
        deal_out(run, partial := out / "data.partial")
        partial.rename(data)
    if network.exists():
        run_folder.set_aside(network)  # a resumed run has other certificates, keys and nodes
    network.mkdir()
    keys = _write_signing_keys(run, network) if run.signed else None
    with Processes(network, environment(network)) as processes:
        for client in range(run.clients):
            where = ["--client", client, "--examples", data / f"client-{client}.jsonl", "--socket"]
            worker = [sys.executable, "-m", "experiments.deploy", "worker", "--config", out / "config.json"]
            more = ["--seeded-noise"] if config.seeded_noise else []
            more += ["--signing-key", network / f"signing-{client}"] if run.signed else []
            processes.start(f"worker-{client}", [*worker, *where, sockets / str(client), *more], AGAIN)
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
            options={"exact": config.exact, "seeded_noise": config.seeded_noise, "resume": config.resume},
            patience=Patience(config.round_seconds, config.round_seconds)._asdict(),
            cache=str(cache_folder() / "compiled"),
            keys=keys,
        )
        links.run(settings)
        ended = _follow(out / "run", network, run.rounds, processes)
    if error := ended.get("error"):
        raise UserError(error)
    print(f"test loss {ended['loss_before']:.4f} -> {ended['loss_after']:.4f}")
    print(f"{out / 'run'}: run.ledger, metrics.jsonl, adapter/, checkpoints/")


def _write_signing_keys(run: RunConfig, folder: Path) -> dict[str, Any]:
    """Writes everyone's keys, those of the run's simulation, and returns the files that the server reads."""
    keys = simulated_keys(run)
    for name, key in (("server", keys.server), *enumerate(keys.clients)):
        write_key(folder / f"signing-{name}", key)
    public = [str(folder / f"signing-{client}.pub") for client in range(run.clients)]
    return {"private": str(folder / "signing-server"), "clients": public}


def _wait_for(files: Sequence[Path], processes: Processes) -> None:
    while not all(file.exists() for file in files):
        processes.check()
        time.sleep(0.2)


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
                raise UserError(f"the server was ended: see {network / 'superlink.log'}, and go on with --resume")
            for record in run_folder.read_metrics(folder)[-1:]:
                pace = f"{record['seconds']:.2f} s/round"
                loss = "no loss" if record["train_loss"] is None else f"loss {record['train_loss']:.4f}"
                bar.update(task, completed=record["round"], loss=loss, pace=pace)
            time.sleep(0.5)
        bar.update(task, completed=len(run_folder.read_metrics(folder)))
    return ended


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
