"""Bytes, seconds and memory of a run over Flower, by the number of clients; beside it Flower's own FedAvg.

    python -m experiments.benchmarks.deployment

All parties are on this machine. Bytes on the wire are counted at a TCP relay before the SuperLink, between the first
round and the last, and so hold TLS, signatures and the SuperNodes' asking for messages. FedAvg ships the same LoRA
adapter as float32 arrays, and its clients compute nothing. Needs ``pip install 'fedmezo_jax[flower]'``. What is in the
folder already is not measured again.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from safetensors.numpy import load_file

from experiments import _cli, _plots, deploy
from experiments._network_meters import Relay, memory_of_children
from experiments.studies.runner import Q_AND_V
from fedmezo_jax.deploy import envelopes
from fedmezo_jax.deploy.credentials import make_certificates, make_node_key
from fedmezo_jax.deploy.envelopes import Answer, Progressed, Result, Start
from fedmezo_jax.deploy.local_network import Processes, SuperLink, environment, free_port, start_node
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import run_folder
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.job import fine_tune

FEDAVG = Path(__file__).parent / "flower_fedavg"
FEDAVG_COLUMNS = "fedavg_serialised", "fedavg_wire_up", "fedavg_wire_down", "fedavg_seconds"


@dataclass(frozen=True)
class Config:
    """What is measured."""

    clients: str = "3,8,16,50"
    """numbers of clients"""
    fedavg: str = "3,8,16"
    """those at which Flower's FedAvg is measured too"""
    clients_per_worker: int = 50
    """how many clients share a worker"""
    rounds: int = 3
    """rounds of each run; the first is not counted"""
    out: Path = Path("runs/deployment")
    """folder for config.json, results.json and deployment.png, and of the runs"""


_EMPTY: dict[Any, Any] = {bytes: b"", int: 0, float: math.inf, Progressed: Progressed(0, [Result(0, b"")])}
"""A value of each type that a request has, without the messages in it."""


def main(config: Config) -> None:
    """Measures each number of clients, prints the table and writes the folder."""
    rows, seconds = [], 0.0
    with_fedavg = _counts("--fedavg", config.fedavg)
    for clients in _counts("--clients", config.clients):
        place, row = config.out / f"run-{clients}", {}
        parts = {
            "ours": partial(measure, clients, config.clients_per_worker, config.rounds, place),
            "simulated": partial(measure_simulated, clients, config.rounds, place),
        }
        if clients in with_fedavg:
            parts["fedavg"] = partial(measure_fedavg, clients, config.rounds, place)
        for name, part in parts.items():
            found, taken = _kept(config.out / f"rows/{clients}-{name}.json", part)
            row |= found
            seconds += taken
        rows.append(dict.fromkeys(FEDAVG_COLUMNS) | row)
        _cli.write_folder(config, rows, seconds)
    plot(config.out / "deployment.png", rows)
    _cli.print_table("a client and round over Flower", rows)


def _kept(file: Path, measured: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """A part of a row and the seconds that it took, from its file or measured now."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        row = measured()
        run_folder.write_json(file, {"row": row, "seconds": time.perf_counter() - begun})
    kept = json.loads(file.read_text(encoding="utf-8"))
    return kept["row"], kept["seconds"]


def _counts(option: str, text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 2:
        raise UserError(f"{option} must be numbers of clients from 2 on, like 3,8,16, not {text}")
    return counts


def measure(clients: int, clients_per_worker: int, rounds: int, out: Path) -> dict[str, Any]:
    """Our part of a row."""
    run = RunConfig(**Q_AND_V, clients=clients, rounds=rounds)
    relays: list[Relay] = []

    def through(address: str) -> str:
        relays.append(Relay(address))
        return relays[0].address

    with tempfile.TemporaryDirectory(prefix="fedmezo-") as sockets, _Meter(out / "run/metrics.jsonl", relays) as meter:
        options = deploy.Config("local", run, out=out, exact=False, clients_per_worker=clients_per_worker)
        out.mkdir(parents=True)
        deploy.run_here(options, out.absolute(), Path(sockets), through)
    last = run_folder.read_metrics(out / "run")[-1]
    sent, got = last["uplink_bytes"] / clients, last["downlink_bytes"] / clients
    up, down = sent + len(envelopes.pack(Answer(bytes(8), b"", b""))), got + len(envelopes.pack(_start(run)))
    sizes = _sizes()
    return {
        "clients": clients,
        "workers": math.ceil(clients / clients_per_worker),
        "message_up": sent,
        "message_down": got,
        "payload_up": up,
        "payload_down": down,
        "serialised_up": sizes.of_bytes(round(up)),
        "serialised_down": sizes.of_bytes(round(down)),
        "wire_up": meter.up / clients,
        "wire_down": meter.down / clients,
        "seconds": meter.seconds,
        **{f"{kind}_mib": size for kind, size in meter.memory.items()},
        "mib_together": meter.together,
    }


def measure_simulated(clients: int, rounds: int, out: Path) -> dict[str, Any]:
    """The seconds of a round of the run's simulation, a part of a row."""
    run = RunConfig(**Q_AND_V, clients=clients, rounds=rounds)
    records = fine_tune(run, out / "simulated", notify=lambda line: None).metrics[1:]
    return {"simulated_seconds": sum(record["seconds"] for record in records) / len(records)}


def measure_fedavg(clients: int, rounds: int, out: Path) -> dict[str, Any]:
    """FedAvg's part of a row, with an adapter of the shapes that our run left in the folder."""
    adapter = load_file(out / "run/adapter/adapter_model.safetensors")
    shapes = json.dumps([array.shape for array in adapter.values()])
    meter = _fedavg(clients, rounds, shapes, (out / "fedavg").absolute())
    found = _sizes().of_arrays(shapes), meter.up / clients, meter.down / clients, meter.seconds
    return dict(zip(FEDAVG_COLUMNS, found, strict=True))


def _sizes() -> Any:
    """The module that knows how long Flower's messages are."""
    if str(FEDAVG) not in sys.path:
        sys.path.insert(0, str(FEDAVG))
    return importlib.import_module("fedavg_app.sizes")


class _Meter:
    """Bytes and seconds of a round by the lines of a file to which a run adds one for each round, and its memory."""

    def __init__(self, progress: Path, relays: list[Relay]):
        self.up = self.down = self.seconds = self.together = 0.0
        self.memory: dict[str, float] = {}
        self._progress, self._relays, self._done = progress, relays, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        seen: list[tuple[int, float, int, int]] = []
        while not self._done.wait(0.1):
            lines = self._progress.read_bytes().count(b"\n") if self._progress.exists() else 0
            if lines > len(seen) and self._relays:
                seen.append((lines, time.monotonic(), self._relays[0].up, self._relays[0].down))
                now, together = memory_of_children()
                self.memory |= {kind: max(size, self.memory.get(kind, 0.0)) for kind, size in now.items()}
                self.together = max(together, self.together)
        if len(seen) > 1:
            first, last = seen[0], seen[-1]
            rounds = last[0] - first[0]
            self.seconds, self.up, self.down = ((last[i] - first[i]) / rounds for i in (1, 2, 3))

    def __enter__(self) -> _Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _start(run: RunConfig) -> Start:
    """What a request for work has beside the run's own messages."""
    empty = Start(*(_EMPTY[kind] for kind in get_type_hints(Start).values()))
    widths = bytes(run.local_steps if run.length_buckets > 1 else 0)
    return empty._replace(ticket=bytes(envelopes.TICKET_BYTES), run=bytes(16), step_widths=widths)


def _fedavg(clients: int, rounds: int, shapes: str, out: Path) -> _Meter:
    """Flower's FedAvg in the same set-up, but for the workers: its ClientApp is all that a client has."""
    out.mkdir()
    address, progress = f"127.0.0.1:{free_port()}", out / "progress"
    make_certificates(out, "127.0.0.1")
    settings = {"shapes": shapes, "rounds": rounds, "clients": clients, "progress": str(progress)}
    with Processes(out, environment(out)) as processes:
        link = SuperLink(out, address, processes)
        link.start()
        relay = Relay(address)
        for client in range(clients):
            make_node_key(out / f"node-{client}")
            link.register(out / f"node-{client}.pub", f"client-{client}")
            party = out / "ca.crt", out / f"node-{client}", out / "none", Path(sys.executable).parent
            start_node(processes, f"supernode-{client}", relay.address, *party)
        with _Meter(progress, [relay]) as meter:
            link.run(FEDAVG, settings)
            while not progress.exists() or progress.read_bytes().count(b"\n") < rounds:
                processes.check()
                time.sleep(0.5)
            time.sleep(0.5)
    return meter


def plot(file: Path, rows: list[dict[str, Any]]) -> None:
    """Plots bytes, seconds and memory over the number of clients."""
    figure, axes = _plots.subplots(1, 3, figsize=(11, 3.6))
    clients = [row["clients"] for row in rows]
    lines = (
        {"message_up": "message", "serialised_up": "serialised", "wire_up": "on the wire"},
        {"seconds": "over Flower", "simulated_seconds": "simulated"},
        {"mib_together": "all processes"},
    )
    theirs = ({"fedavg_serialised": "FedAvg, serialised", "fedavg_wire_up": "FedAvg, on the wire"}, {}, {})
    theirs[1]["fedavg_seconds"] = "FedAvg, without computing"
    labels = "bytes up, a client and round", "seconds of a round", "MiB"
    for panel, ours, other, label in zip(axes, lines, theirs, labels, strict=True):
        for style, names in (("o-", ours), ("s--", other)):
            for name, said in names.items():
                panel.plot(clients, np.array([row[name] for row in rows], float), style, label=said)
        panel.set(xlabel="clients", ylabel=label, **({"yscale": "log"} if panel is axes[0] else {"ylim": (0, None)}))
        _plots.ticks_at(panel, clients, log=False)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small")
    _plots.save(figure, file, dpi=100)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
