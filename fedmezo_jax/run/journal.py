"""What a run leaves in its folder round by round, and how it is read again to go on: ledger, metrics and checkpoints.

The first process writes; the others read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from fedmezo_jax.errors import UserError
from fedmezo_jax.parallel import multihost
from fedmezo_jax.run import ledger, ledger_checks, run_checkpoints, run_folder, signatures
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext
from fedmezo_jax.run.privacy_plan import describe
from fedmezo_jax.run.rounds import Progress
from fedmezo_jax.run.run_checkpoints import Seal

PACKAGES = ("jax", "jaxlib", "numpy", "optax")
"""Whose versions the numbers may hang on."""


class Journal(NamedTuple):
    """A run's ledger and metrics, open, and where the run goes on.

    Attributes:
        progress: of the rounds that are done.
        metrics: the records of these rounds.
        signing: what the next round's signatures take; None where nothing is signed.
        known: later rounds that the ledger has, each with the chain value of its record.
        append: writes a round to the ledger and returns the chain value of its record; it is on the disk then.
        record: the same for its metrics.
    """

    progress: Progress
    metrics: list[dict[str, Any]]
    signing: signatures.Signing | None
    known: Iterator[tuple[ledger.Entry, str]]
    append: Callable[[ledger.Entry], str | None]
    record: Callable[[Mapping[str, Any]], None]


def versions() -> dict[str, str]:
    """Versions of :data:`PACKAGES`."""
    return {name: version(name) for name in PACKAGES}


def open_journal(
    setup: RunContext,
    folder: Path,
    manager: ocp.CheckpointManager,
    fresh: Progress,
    first_rate: float,
    keys: signatures.ServerKeys | None,
    notify: Callable[[str], None],
) -> Journal:
    """The journal of a folder, new or verified, cut back to where the run goes on.

    That is the newest checkpoint that is intact and belongs to the ledger and the metrics. Without one a run with a
    ledger makes all its rounds again from that, and a run without starts over.

    Args:
        setup: the run's.
        folder: the run's.
        manager: of its checkpoints.
        fresh: progress before the first round.
        first_rate: its base learning rate.
        keys: the server's, where clients and server sign.
        notify: called with each thing that the user should know.

    Raises:
        UserError: the ledger is damaged, of another run, or missing although rounds were recorded.
    """
    if keys and jax.process_count() > 1:
        raise UserError("--signed: a run of several processes is not signed: leave it out")
    config, file, first_process = setup.config, folder / run_folder.LEDGER, multihost.is_coordinator()
    header = None  # back-propagated steps are no scalars that could rebuild the run
    if config.algorithm == "fedmezo":
        public_keys = keys.public if keys else b""
        counts = setup.example_counts if config.protects_examples else None
        guarantee = describe(config, setup.seeded_noise)
        header = ledger.make_header(
            asdict(config), setup.task.hash_frozen(), versions(), first_rate, guarantee, public_keys, counts
        )
    steps, written = manager.all_steps(), run_folder.metrics_bytes(folder).count(b"\n")

    def open_ledger() -> ledger.Ledger | None:
        if not first_process:
            return None
        run_folder.remove_partial(folder)
        return _open_ledger(file, header, bool(steps or written), notify) if header else None

    book = multihost.all_or_none(open_ledger)
    if header and keys:
        signatures.verify(file)
        run_folder.write_json(folder / run_folder.IDENTITIES, signatures.as_json(header["identities"]))
    chains, recorded = _chains(file, {0, *steps}) if header else ({}, 0)

    def unfit(step: int, seal: Seal) -> str | None:
        if header and step > recorded:
            return f"{file.name} ends after round {recorded}"
        if seal.ledger != chains.get(step):
            return f"{file.name} has another record of that round"
        matches = run_checkpoints.metrics_match(folder, seal)
        return None if matches else "metrics.jsonl has changed since it was saved"

    newest, reasons = run_checkpoints.newest(manager, fresh, unfit)
    kept = newest.seal.metrics_bytes if newest else 0
    if not newest and not header:  # without a ledger only the checkpoint can save the work: go on without those metrics
        newest, reasons = run_checkpoints.newest(
            manager, fresh, lambda step, _: "metrics.jsonl lacks its test loss" if step == config.rounds else None
        )
    progress = newest.progress if newest else fresh
    first = int(progress.state.round)
    unexpected = bool(reasons) or (written > recorded if header else written > 0 == kept)
    moved = run_checkpoints.set_aside(manager, first)
    old = multihost.all_or_none(lambda: run_folder.keep_metrics(folder, kept, unexpected) if first_process else None)
    if unexpected:
        for step, reason in reasons.items():
            notify(f"{moved[step]}: this checkpoint of round {step} is not used: {reason}")
        if old:
            notify(f"{old}: the metrics recorded before")
        again = f"; {file.name} rebuilds rounds {first + 1} to {recorded}" if recorded > first else ""
        notify(f"{folder}: going on from {f'the checkpoint of round {first}' if first else 'the start'}{again}")

    # The first process may be appending already: metrics of later rounds, and to the ledger once all have reached a new
    # round.
    metrics = [record for record in run_folder.read_metrics(folder) if record["round"] <= first]
    known = _known(file, config, first) if header else iter(())

    def append(entry: ledger.Entry) -> str | None:
        if book is None:
            return None
        if keys:
            context = signatures.Context(bytes.fromhex(chains[0]), book.chain)
            entry = signatures.sign_record(keys.private, context, entry)
        return book.append(entry).hex()

    record = (lambda metrics: run_folder.append_metrics(folder, metrics)) if first_process else _nowhere
    signing = None
    if header and keys:
        context = signatures.Context(*(bytes.fromhex(chains[step]) for step in (0, first)))
        signing = signatures.Signing(keys.public, context)
    return Journal(progress, metrics, signing, known, append, record)


def _open_ledger(file: Path, header: Mapping[str, Any], begun: bool, notify: Callable[[str], None]) -> ledger.Ledger:
    if not file.exists():
        if begun:
            raise UserError(
                f"{file} is missing, and the run cannot go on without it: put a copy there, or give another --out"
            )
        return ledger.create(file, header)
    book, notices = ledger.reopen(file, header)
    for notice in notices:
        notify(notice)
    return book


def _chains(file: Path, rounds: Collection[int]) -> tuple[dict[int, str], int]:
    """The chain values of the records of some rounds, as far as the ledger has them, and how many rounds it has."""
    chains, last = {}, 0
    for record in ledger.records(file):
        last = record.index
        if last in rounds:
            chains[last] = record.chain.hex()
    return chains, last


def _known(file: Path, config: RunConfig, first: int) -> Iterator[tuple[ledger.Entry, str]]:
    chains = (record.chain.hex() for record in ledger.records(file) if record.index > first)
    return zip(ledger_checks.entries(file, config, first), chains, strict=False)


def _nowhere(written: Any) -> None:
    pass
