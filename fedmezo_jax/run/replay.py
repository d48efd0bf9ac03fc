"""A run made again from its ledger: θ after any round, without data and without one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from fedmezo_jax.core import mezo
from fedmezo_jax.core.random import init_key, run_key
from fedmezo_jax.core.task import Task
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import ledger, ledger_checks, rounds, signatures
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.config_parts import ModelConfig
from fedmezo_jax.run.context import algorithm, task_name
from fedmezo_jax.run.prepare import base_of_ledger

if TYPE_CHECKING:
    from fedmezo_jax.llama.config import LlamaConfig


class VerifiedLedger(NamedTuple):
    """A ledger all of whose records are intact and permitted, and which belongs to the base model.

    Attributes:
        file: the ledger.
        header: its header.
        config: the run's configuration, from the header.
        llama: the base model's; None where the run's task is another.
        rounds: how many rounds it has.
        size: bytes of its header and its whole records.
    """

    file: Path
    header: dict[str, Any]
    config: RunConfig
    llama: LlamaConfig | None
    rounds: int
    size: int


class Replay(NamedTuple):
    """A run made again.

    Attributes:
        ledger: what it was made from.
        params: θ after the last of these rounds.
        rounds: how many rounds were made.
    """

    ledger: VerifiedLedger
    params: mezo.Params
    rounds: int


def replay(
    ledger_file: str | PathLike[str],
    model: str | None = None,
    until: int | None = None,
    *,
    task: Task | None = None,
    identities: str | PathLike[str] | None = None,
    without: int | None = None,
    on_start: Callable[[VerifiedLedger], None] = lambda verified: None,
    on_round: Callable[[int], None] = lambda done: None,
    notify: Callable[[str], None] = lambda line: None,
) -> Replay:
    """Rebuilds the adapter of a run from its ledger, which is verified first, without data.

    Args:
        ledger_file: the ``run.ledger`` in a run's folder.
        model: the run's base model, whose weights are checked against the ledger; fetched where that is needed. By
            default the one that the run names, if it is on this machine.
        until: round to go up to, from 0; by default the last.
        task: the run's, where it is not a LLaMA; its data are not used.
        identities: the public keys that a signed ledger must be signed with, an ``identities.json``; by default those
            in its header.
        without: a client whose numbers are left out of every round, see :func:`reconstruct`.
        on_start: called when all is verified and before anything is rebuilt.
        on_round: called with the number of rounds made.
        notify: called with each line that the user should read.

    Raises:
        UserError: the ledger is damaged, holds what no run can have, ends before that round, or cannot leave that
            client out; or the model is not the run's, or not on this machine.
    """
    if until is not None and until < 0:
        raise UserError(f"--round must be 0 or more, not {until}")
    file, trusted = Path(ledger_file), None if identities is None else signatures.read_identities(Path(identities))
    verified, init_params = _verify(file, model, task, trusted, notify)
    on_start(verified)
    first = init_params(init_key(verified.config.seed))
    return Replay(verified, *reconstruct(verified.file, verified.config, first, until, on_round, without))


def _verify(
    file: Path, model: str | None, task: Task | None, trusted: bytes | None, notify: Callable[[str], None]
) -> tuple[VerifiedLedger, Callable[[jax.Array], mezo.Params]]:
    """Checks every record of a ledger and the frozen weights; also says how θ begins."""
    header = ledger.read_header(file)
    *_, last = ledger.records(file)  # the whole chain, before anything is computed
    torn = file.stat().st_size - last.end
    notify(f"{file}: {last.index} rounds, {last.end:,} bytes, every checksum holds")
    if torn:
        notify(f"notice: its last record was cut short: {torn} bytes are not looked at")
    config = ledger_checks.run_config(header, file)
    for _ in ledger_checks.entries(file, config):
        pass
    signatures.verify(file, trusted)
    if config.signed:
        keys = "the keys in its own header" if trusted is None else "the keys given"
        notify(f"every signature holds, with {keys}")
    if last.index < config.rounds:
        notify(
            f"notice: the ledger ends after round {last.index} of {config.rounds}: the run was stopped or is not over"
        )
    _check_task(file, config, task)
    if task is None:
        llama, base_hash, init_params = base_of_ledger(file, config, model)
        name = f"--model {model or config.model}"
    else:
        llama, base_hash, init_params, name = None, task.hash_frozen(), task.init_params, type(task).__name__
    if base_hash != header["base_hash"]:
        raise UserError(f"{name}: its weights are not those that the run was on")
    return VerifiedLedger(file, header, config, llama, last.index, last.end), init_params


def _check_task(file: Path, config: ModelConfig, task: Task | None) -> None:
    """Refuses a task that is not the run's, and a run of a task where none is given."""
    if task is None and config.model.startswith("task:"):
        raise UserError(f"{file}: the run is of {config.model}: give it to fedmezo_jax.replay as task=")
    if task is not None and config.model != task_name(task):
        raise UserError(f"{file}: the run is of {config.model} and not of {task_name(task)}")


def reconstruct(
    file: Path,
    config: RunConfig,
    start: mezo.Params,
    until: int | None,
    on_round: Callable[[int], None] = lambda done: None,
    without: int | None = None,
) -> tuple[mezo.Params, int]:
    """Rebuilds θ from a ledger, round by round with the programs that the run used.

    On one backend and one version of JAX the result is the run's, bit for bit. On another, Gaussian directions may
    differ in their last place; Rademacher directions with shared directions leave nothing that could round differently
    except the server's own optimizer.

    Leaving a client out gives the server's mean of the others' numbers in every round. It is not the run that never had
    that client: from the second round on the others measured their numbers at a θ that it had moved.

    Args:
        file: the ledger; every record on the way is verified, and checked against the configuration.
        config: the run's.
        start: θ at the start.
        until: rounds to make; None means all.
        on_round: called with the number of rounds made.
        without: a client that is left out of every round; None for none.

    Returns:
        θ and the number of rounds made.

    Raises:
        UserError: a record is damaged or does not fit the configuration, the ledger ends before that round, or has no
            client's own numbers that could be left out.
    """
    if without is not None:
        if not 0 <= without < config.clients:
            raise UserError(f"--without {without}: the run has clients 0 to {config.clients - 1}")
        if config.keeps_mean:
            raise UserError(
                f"--without {without}: the ledger holds the clients' mean alone, and not this one's numbers"
            )
    params, done = start, 0
    for progress in islice(follow_ledger(file, config, start, without), None if until is None else until + 1):
        params, done = progress.state.params, int(progress.state.round)
        if done:
            on_round(done)
    if until is not None and done < until:
        raise UserError(f"--round {until}: {file} ends after round {done}")
    return jax.device_get(params), done


def follow_ledger(
    file: Path, config: RunConfig, start: mezo.Params, without: int | None = None
) -> Iterator[rounds.Progress]:
    """A run's progress before its first round and after each round of its ledger, as :func:`reconstruct` makes it."""
    # The rates are in the ledger: what they came from need not be measured again.
    init, round = algorithm(replace(config, personalize="frozen"))
    progress, key = rounds.begin(init(start, config.clients), config, 1.0), run_key(config.seed)
    yield progress
    for entry in ledger_checks.entries(file, config):
        if without is not None:
            entry = _leave_out(entry, without)
        moved = rounds.move(config, round, progress, entry, None, key)
        progress = rounds.advance(config, progress, entry, moved)
        yield progress


def _leave_out(entry: ledger.Entry, client: int) -> ledger.Entry:
    """The entry as if the client had not answered; of a round in which nobody else did nothing is taken."""
    weights = np.where(entry.ids == client, np.float32(0), entry.weights)
    return entry._replace(weights=weights, step=entry.step if weights.any() else 0.0)


def largest_difference(one: mezo.Params, other: mezo.Params) -> float | None:
    """The largest absolute difference between two trees on the host; None where they agree bit for bit.

    Infinite where they have other leaves or shapes, or numbers that are not finite.
    """
    if jax.tree.map(np.shape, one) != jax.tree.map(np.shape, other):
        return np.inf
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    if all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs):
        return None
    largest = max(float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))) for a, b in pairs)
    return largest if np.isfinite(largest) else np.inf
