"""What server and clients must have alike before the first round, and what follows from all clients' examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from fedmezo_jax import __version__
from fedmezo_jax.core.blocks import block_width
from fedmezo_jax.data.buckets import Width, step_width
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.deploy.envelopes import Enrolment, Facts, Plan
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.task import LlamaTask
from fedmezo_jax.run import messages
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.journal import versions
from fedmezo_jax.run.ledger_header import config_hash


def facts_of(config: RunConfig, base_hash: str, public_keys: Sequence[bytes] = ()) -> Facts:
    """What decides the numbers of a run: options, base weights and versions; with the clients' public keys where each
    client must know them.
    """
    options = {f"--{name.replace('_', '-')}": value for name, value in asdict(config).items()}
    release = {"fedmezo_jax": __version__, "message format": messages.VERSION}
    hashes = {"base weights": base_hash, "configuration": config_hash(asdict(config))}
    if public_keys:
        hashes["the clients' public keys"] = hashlib.sha256(b"".join(public_keys)).hexdigest()
    return hashes | release | versions() | options


def difference(server: Facts, client: Facts, who: str) -> str | None:
    """What differs between the server's facts and those of the client that ``who`` names, in one line, or None."""
    differing = sorted(
        name for name in server.keys() | client.keys() if server.get(name, "nothing") != client.get(name, "nothing")
    )
    if len(differing) > 1 and "configuration" in differing:
        differing.remove("configuration")  # its options say more than its hash
    if not differing:
        return None
    values = ", ".join(
        f"{name} ({server.get(name, 'nothing')} at the server, {client.get(name, 'nothing')} at {who})"
        for name in differing
    )
    return f"{who} differs from the server: {values}: start both alike"


def run_name(facts: Facts) -> bytes:
    """16 bytes that stand for the facts."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).digest()


def sum_name(run: bytes, name: bytes, t: int, attempt: int) -> bytes:
    """What the clients of a secure sum sign it by: the run, the round, the attempt and the sum's own name."""
    return run + name + np.array([t, attempt], "<u8").tobytes()


def check_deployable(config: RunConfig) -> None:
    """Refuses what a run over a network cannot have.

    Raises:
        UserError: names the option.
    """
    if not config.sends_coefficients:
        raise UserError("clients of a deployed run send coefficients: leave out --uplink lora and --algorithm fedavg")
    if config.dropout or config.deadline is not None:
        raise UserError("--dropout and --deadline simulate failing clients, and real ones fail by themselves")


def blank_examples(enrolments: Sequence[Enrolment], shape: Width) -> tuple[TokenBatch, list[np.ndarray]]:
    """The clients' examples as far as the server knows them: rows of the right lengths, without their words.

    Args:
        enrolments: of all clients.
        shape: of the table.

    Returns:
        The rows, client after client, and for each client the indices of its own.
    """
    lengths, labels = (np.concatenate([getattr(each, name) for each in enrolments]) for name in ("lengths", "labels"))
    count = len(lengths)
    positions = np.broadcast_to((lengths - 2).astype(np.int32)[:, None], (count, shape.labels))
    used = (np.arange(shape.labels) < labels[:, None]).astype(np.float32)
    blank = [np.broadcast_to(np.int32(0), (count, size)) for size in shape]
    ends = np.cumsum([len(each.lengths) for each in enrolments])
    return TokenBatch(blank[0], positions, blank[1], used), np.split(np.arange(count), ends[:-1])


def plan_of(config: RunConfig, task: LlamaTask, exact: bool) -> Plan:
    """The plan of a run.

    Args:
        config: the run's.
        task: the server's, on :func:`blank_examples`.
        exact: whether a client runs as many copies of itself as the simulation runs clients at once. Its numbers are
            then those of the simulation on every model, and it does as many times the work. Without, the last bits may
            differ on models smaller than ``tiny``.
    """
    width = block_width(config.participants, task.block_size) if exact else 1
    shape = Width(task.train[0].shape[1], task.train.labels.shape[-1])
    return Plan(shape, task.widths, max(task.least_width, width))


def step_widths(config: RunConfig, task: LlamaTask, ids: np.ndarray, picks: np.ndarray) -> dict[int, bytes]:
    """For each client of a round which of the task's widths its local steps run at, as in the simulation.

    There a step runs at the narrowest width that fits all clients of its block.

    Args:
        config: the run's.
        task: the server's.
        ids: ``[P]`` the round's clients.
        picks: ``[P, H, batch]`` their examples.
    """
    if len(task.widths) == 1:
        return dict.fromkeys(map(int, ids), b"")
    alone = step_width(task.train, picks, task.widths, task.packed)
    size = max(task.least_width, block_width(len(ids), task.block_size))
    filled = np.concatenate([alone, np.repeat(alone[:1], -len(ids) % size, axis=0)])
    index = filled.reshape(-1, size, config.local_steps).max(axis=1).astype(np.uint8)
    return {int(id): index[i // size].tobytes() for i, id in enumerate(ids)}
