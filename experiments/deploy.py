"""Runs with the server and each client in processes of their own, which Flower connects.

All of it on this machine, with TLS and registered keys (needs `pip install 'fedmezo_jax[flower]'`):

    python -m experiments.deploy local --clients 3

With each party on a machine of its own, see docs/deployment.md:

    python -m experiments.deploy server --config config.json --address HOST:PORT --examples TEST.jsonl --node-keys *.pub
    python -m experiments.deploy client --config config.json --address HOST:PORT --examples OWN.jsonl --client 0 \
        --authority ca.crt --node-key KEY
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import _cli
from experiments._deployed_run import check_options, start_and_show
from fedmezo_jax.deploy.admission import check_node_key, check_server, why_refused
from fedmezo_jax.deploy.client import Client
from fedmezo_jax.deploy.credentials import (
    make_certificates,
    make_node_key,
    read_public_key,
    read_signing_key,
    write_key,
)
from fedmezo_jax.deploy.examples import TEST, VALIDATION_FILE, deal_out, read_own
from fedmezo_jax.deploy.flower import STATUS, answer_at
from fedmezo_jax.deploy.local_network import (
    AGAIN,
    Processes,
    SuperLink,
    environment,
    free_port,
    split_address,
    start_node,
    write_programs,
)
from fedmezo_jax.deploy.server import Patience
from fedmezo_jax.errors import UserError
from fedmezo_jax.out_folder import out_folder
from fedmezo_jax.run import run_folder
from fedmezo_jax.run.config import RunConfig, read_config
from fedmezo_jax.run.job import to_stderr
from fedmezo_jax.run.prepare import resolve_defaults
from fedmezo_jax.run.signatures import simulated_keys


@dataclass(frozen=True)
class Config:
    """What to start, and the run."""

    command: Annotated[Literal["local", "server", "client", "worker"], tyro.conf.Positional]
    """local: a whole run on this machine; server: the server of a run; client: one of its clients, or several, on
    another machine; worker: the part of clients that computes, which the others start"""
    run: RunConfig
    config: Path | None = None
    """config.json of the run, whose options take the place of the defaults"""
    out: Path | None = None
    """folder of the run (run/) and of what the parties have (data/, network/); of a client, its logs. By default
    runs/deployed, runs/served or runs/client-0, by the first client"""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """local, server: go on with the run in --out from its last checkpoint"""
    exact: bool = True
    """local, server: have each client compute beside copies of itself, so that its numbers are the simulation's on
    every model; without, a client does a fraction of the work"""
    seeded_noise: bool = False
    """take the noise of --dp-epsilon from the seed, which protects nobody, and not from the operating system"""
    clients_per_worker: int = 1
    """local: how many clients share a process, and so the base model and its compiled programs"""
    round_seconds: float = 600.0
    """local, server: when the server stops waiting for a round's clients"""
    address: str | None = None
    """server: HOST:PORT where it listens, with a host that clients know it by; client: the same"""
    node_keys: tuple[Path, ...] = ()
    """server: the clients' public keys, by client, as ssh-keygen -t ecdsa -b 384 writes them (.pub)"""
    node_key: tuple[Path, ...] = ()
    """client: its private key, whose public key the server has"""
    authority: Path | None = None
    """client: the server's network/ca.crt"""
    client: tuple[int, ...] = (0,)
    """client, worker: its id, from 0; or the ids of several clients, with as many of what each has of its own"""
    examples: tuple[Path, ...] = ()
    """client, worker: its own examples, a .json, .jsonl or .parquet file; server: its test examples"""
    validation: Path | None = None
    """server: its validation examples, with --learning-rate auto"""
    signing_key: tuple[Path, ...] = ()
    """server, client, worker: its private key in a run that is --signed or has a --secure-sum, as ssh-keygen -t ed25519
    writes it"""
    client_signing_keys: tuple[Path, ...] = ()
    """server: the clients' public keys in such a run, by client (.pub); client, worker: the same with --secure-sum"""
    model_here: str | None = None
    """client, worker: the model as it is called here, if that is not what --model of the run says"""
    socket: tuple[Path, ...] = ()
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
        return work(config)
    names = {"local": "deployed", "server": "served", "client": f"client-{min(config.client, default=0)}"}
    out = (config.out or Path("runs") / names[config.command]).absolute()
    with ExitStack() as stack:
        for context in (run_folder.guarded(out), out_folder(out), run_folder.lock(out)):
            stack.enter_context(context)
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmezo-")))
        if config.command == "local":  # the path of a socket has no more than 107 bytes
            run_here(config, out, sockets)
        elif config.command == "server":
            serve(config, out)
        else:
            join(config, out, sockets)


def work(config: Config) -> None:
    """The worker of clients, until it is ended."""
    _check_one_for_each(config, "examples", "socket")
    clients = dict(zip(config.socket, clients_of(config), strict=True))
    for client, socket in zip(config.client, clients, strict=True):
        to_stderr(f"client {client} waits at {socket}")
    answer_at(clients)


def clients_of(config: Config) -> list[Client]:
    """The clients of a worker, which share one base model, and the programs that are compiled for it."""
    own = read_own(config.run, config.examples, config.model_here)
    keys = [read_signing_key(file) for file in config.signing_key] or [None] * len(config.client)
    public_keys = [read_public_key(file) for file in config.client_signing_keys]
    options = {"seeded_noise": config.seeded_noise, "notify": to_stderr}
    return [
        Client(client, replace(own, tables=[rows]), key, public_keys, **options)
        for client, rows, key in zip(config.client, own.tables, keys, strict=True)
    ]


def _check_one_for_each(config: Config, *needed: str) -> None:
    """Checks that there is one of these options, and of the signing keys, for each client.

    Raises:
        UserError: names the option.
    """
    if not config.client or len(set(config.client)) < len(config.client):
        raise UserError(f"{config.command}: --client takes different ids, from 0")
    for name in (*needed, *(["signing_key"] if config.signing_key else [])):
        if len(given := getattr(config, name)) != len(config.client):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{config.command}: give one {option} for each --client, not {len(given)}")


def run_here(config: Config, out: Path, sockets: Path, through: Callable[[str], str] = str) -> None:
    """A whole run on this machine, with its progress as the main job shows it.

    Args:
        config: of the command.
        out: its folder.
        sockets: folder of the workers' sockets, with a short path.
        through: where SuperNodes connect to reach the SuperLink at an address; by default there.
    """
    if config.clients_per_worker < 1:
        raise UserError(f"--clients-per-worker must be at least 1, not {config.clients_per_worker}")
    run = _settle(config, out)
    data, network, clients = out / "data", out / "network", range(run.clients)
    if not data.exists():
        deal_out(run, partial := out / "data.partial")
        partial.rename(data)
    if network.exists():
        run_folder.set_aside(network)  # a resumed run has other certificates, keys and nodes
    network.mkdir()
    signs = run.signed or run.secure_sum
    keys = _write_signing_keys(run, network) if signs else None
    public_keys = tuple(map(Path, keys["clients"])) if keys and run.secure_sum else ()
    address = f"127.0.0.1:{free_port()}"
    make_certificates(network, "127.0.0.1")
    for client in clients:
        make_node_key(network / f"node-{client}")
    with Processes(network, environment(network)) as processes:
        for first in clients[:: config.clients_per_worker]:
            together = tuple(clients[first : first + config.clients_per_worker])
            own = tuple(data / f"client-{client}.jsonl" for client in together)
            signing = tuple(network / f"signing-{client}" for client in together) if signs else ()
            of_theirs = {"client": together, "examples": own, "socket": tuple(sockets / str(i) for i in together)}
            party = replace(config, **of_theirs, signing_key=signing, client_signing_keys=public_keys)
            _start_worker(party, out / "config.json", processes)
        link = SuperLink(network, address, processes)
        link.start()
        nodes = [link.register(network / f"node-{client}.pub", f"client-{client}") for client in clients]
        programs, entrance = write_programs(network / "programs"), through(address)
        for client in clients:
            party = network / f"node-{client}", sockets / str(client)
            start_node(processes, f"supernode-{client}", entrance, network / "ca.crt", *party, programs)
        _wait_for([sockets / str(client) for client in clients], processes)
        files = [data / name for name in (TEST, VALIDATION_FILE) if (data / name).exists()]
        start_and_show(out, files, nodes, keys, _options(config), _patience(config), link, processes)


def serve(config: Config, out: Path) -> None:
    """The server of a run whose clients are elsewhere, from SuperLink to adapter."""
    if len(config.examples) != 1 or config.address is None or len(config.node_keys) != config.run.clients:
        raise UserError("server: give --address, --examples with test examples, and the .pub file of each client's key")
    keys = None
    if config.run.signed or config.run.secure_sum:
        if len(config.signing_key) != 1 or len(config.client_signing_keys) != config.run.clients:
            raise UserError(
                "server: --signed and --secure-sum: give --signing-key, and --client-signing-keys, a .pub file of each "
                "client"
            )
        public = [str(file.absolute()) for file in config.client_signing_keys]
        keys = {"private": str(config.signing_key[0].absolute()), "clients": public}
    host, _ = split_address(config.address)
    run, network = _settle(config, out), out / "network"
    network.mkdir(exist_ok=True)
    (network / STATUS).unlink(missing_ok=True)
    if not (network / "server.key").exists():
        make_certificates(network, host)
    files = [config.examples[0].absolute(), *([config.validation.absolute()] if config.validation else [])]
    with Processes(network, environment(network)) as processes:
        link = SuperLink(network, config.address, processes)
        link.start()
        nodes = [link.register(file, f"client-{client}") for client, file in enumerate(config.node_keys)]
        print(f"waiting for {run.clients} clients at {config.address}; they need {network / 'ca.crt'}")
        start_and_show(out, files, nodes, keys, _options(config), _patience(config), link, processes)


def join(config: Config, out: Path, sockets: Path) -> None:
    """Clients of a run whose server is elsewhere, until they are ended: their worker, and a SuperNode for each.

    Args:
        config: of the command.
        out: folder of their logs.
        sockets: folder of the worker's sockets, with a short path.
    """
    file, server = config.config, config.address
    if file is None or server is None or config.authority is None:
        raise UserError("client: give --config, --address of the server, --authority, --node-key and --examples")
    _check_one_for_each(config, "node_key", "examples")
    for key in config.node_key:
        check_node_key(key)
    if unreachable := check_server(server, config.authority):
        print(f"notice: {unreachable}", flush=True)
    names = [f"supernode-{client}" for client in config.client]
    logs = [out / f"{name}.log" for name in names]
    earlier = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
    with Processes(out, environment(out)) as processes:
        party = replace(config, socket=tuple(sockets / str(client) for client in config.client))
        _start_worker(party, file.absolute(), processes)
        programs = write_programs(out / "programs")
        for name, key, socket in zip(names, config.node_key, party.socket, strict=True):
            start_node(processes, name, server, config.authority, key, socket, programs)
        joining = ", ".join(map(str, config.client))
        print(f"client {joining} joins the run at {server}; stop it with Ctrl-C; logs: {out}", flush=True)
        while True:
            for client, log, before in zip(config.client, logs, earlier, strict=True):
                if refused := why_refused(before, log.read_text(errors="replace")[len(before) :], server):
                    raise UserError(f"client {client}: {refused}")
            processes.check()
            time.sleep(0.5)


def _options(config: Config) -> dict[str, bool]:
    return {"exact": config.exact, "seeded_noise": config.seeded_noise, "resume": config.resume}


def _patience(config: Config) -> Patience:
    return Patience(max(config.round_seconds, Patience().enrolment), config.round_seconds)


def _settle(config: Config, out: Path) -> RunConfig:
    """The run's configuration, in its file.

    Raises:
        UserError: the folder holds another run, or this one and it is not to be resumed, or not in this way.
    """
    run = resolve_defaults(config.run, print)
    for notice in run_folder.check_folder(out, run, config.resume):
        print(f"notice: {notice}")
    check_options(out, _options(config))
    run_folder.write_json(out / "config.json", asdict(run))
    return run


def _start_worker(config: Config, file: Path, processes: Processes) -> None:
    worker = [sys.executable, "-m", "experiments.deploy", "worker", "--config", file, "--client", *config.client]
    worker += ["--examples", *config.examples, "--socket", *config.socket]
    worker += ["--seeded-noise"] if config.seeded_noise else []
    worker += ["--signing-key", *config.signing_key] if config.signing_key else []
    worker += ["--client-signing-keys", *config.client_signing_keys] if config.client_signing_keys else []
    worker += ["--model-here", config.model_here] if config.model_here else []
    processes.start(f"worker-{config.client[0]}", worker, AGAIN)


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


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
