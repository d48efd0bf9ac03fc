"""Bytes and milliseconds of a secure sum, by the number of clients.

    python -m experiments.benchmarks.secure_sum

All parties run in this process, one after the other. A tenth of the clients drops out before it has sent its vector.
Messages are packed as msgpack.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from experiments import _cli, _plots
from fedmezo_jax.errors import UserError
from fedmezo_jax.privacy import fixed_point, secure_sum
from fedmezo_jax.run import secure_sum_messages


@dataclass(frozen=True)
class Config:
    """What is summed."""

    clients: str = "8,16,32,64,128"
    """numbers of clients"""
    numbers: int = 100
    """numbers of a client, H·n"""
    seed: int = 0
    """seed of the numbers"""
    out: Path = Path("runs/secure_sum")
    """folder for config.json, results.json and secure_sum.png"""


def main(config: Config) -> None:
    """Sums among each number of clients, prints the table and writes the folder."""
    start = time.perf_counter()
    rows = [measure(count, config.numbers, config.seed) for count in _counts(config.clients)]
    _cli.write_folder(config, rows, time.perf_counter() - start)
    plot(config.out / "secure_sum.png", rows)
    _cli.print_table(f"a secure sum of {config.numbers} numbers", rows)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 3:
        raise UserError(f"--clients must be numbers of clients from 3 on, like 8,16,32, not {text}")
    return counts


class _Meter:
    """Adds up the time of each party."""

    def __init__(self):
        self.seconds: dict[str, float] = {"clients": 0.0, "server": 0.0}

    def __call__(self, party: str, step: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.perf_counter()
        result = step(*arguments)
        self.seconds[party] += time.perf_counter() - begun
        return result


def measure(clients: int, numbers: int, seed: int) -> dict[str, Any]:
    """A row: bytes of one client that stays to the end, and milliseconds of a client (the mean) and of the server.

    Raises:
        UserError: the sum is not what it should be.
    """
    draw, meter, round_name = np.random.default_rng(seed), _Meter(), b"run and round"
    threshold, gone = 2 * clients // 3 + 1, clients // 10
    keys = [Ed25519PrivateKey.generate() for _ in range(clients)]
    identities = {i: key.public_key().public_bytes_raw() for i, key in enumerate(keys)}
    vectors = [fixed_point.encode(draw.standard_normal(numbers), clients) for _ in keys]

    joined = [
        meter("clients", secure_sum.join, i, round_name, threshold, identities, key) for i, key in enumerate(keys)
    ]
    parties, adverts = [party for party, _ in joined], {i: advert for i, (_, advert) in enumerate(joined)}
    boxes = [meter("clients", secure_sum.share, party, adverts) for party in parties]
    everyone, staying = list(range(clients)), list(range(clients - gone))
    masked = {i: meter("clients", secure_sum.mask, parties[i], vectors[i], everyone) for i in staying}
    signatures = {i: meter("clients", secure_sum.agree, parties[i], staying) for i in staying}
    mine = {i: {sender: boxes[sender][i] for sender in everyone} for i in staying}
    unmasked = {i: meter("clients", secure_sum.unmask, parties[i], mine[i], staying, signatures) for i in staying}
    total = meter("server", secure_sum.total, round_name, threshold, adverts, everyone, masked, unmasked)
    if not np.array_equal(total, np.sum([vectors[i] for i in staying], axis=0, dtype=np.uint64)):
        raise UserError("the sum is not that of the vectors")

    sent = secure_sum_messages.sent(adverts[0], boxes[0], masked[0], signatures[0], unmasked[0])
    heard = secure_sum_messages.heard(adverts, mine[0], staying, signatures)
    size = {name: len(message) for name, message in sent._asdict().items()}
    return {
        "clients": clients,
        "threshold": threshold,
        "dropped_out": gone,
        **{f"{name}_bytes": count for name, count in size.items()},
        "uplink_bytes": sum(size.values()),
        "downlink_bytes": sum(map(len, heard)),
        "client_milliseconds": 1e3 * meter.seconds["clients"] / clients,
        "server_milliseconds": 1e3 * meter.seconds["server"],
    }


def plot(file: Path, rows: list[dict[str, Any]]) -> None:
    """Plots bytes and milliseconds over the number of clients."""
    figure, (left, right) = _plots.subplots(1, 2, figsize=(9, 3.6))
    clients = [row["clients"] for row in rows]
    for axes, names, label in (
        (left, {"uplink_bytes": "C0", "downlink_bytes": "C1"}, "bytes of a client and round"),
        (right, {"client_milliseconds": "C2", "server_milliseconds": "C3"}, "milliseconds of a round"),
    ):
        for name, color in names.items():
            axes.plot(clients, [row[name] for row in rows], "o-", color=color, label=name.split("_")[0])
        axes.set(xlabel="clients", ylabel=label, yscale="log")
        _plots.ticks_at(axes, clients, log=True)
        axes.grid(alpha=0.3)
    _plots.legend(figure, left, right, columns=4)
    _plots.save(figure, file, dpi=100)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
