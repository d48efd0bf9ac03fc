"""What a run leaves in its folder round by round, and reads there to go on: ledger and metrics.

The first process writes; the others read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from fedmezo_jax import ledger, ledger_checks, processes, run_folder
from fedmezo_jax.errors import UserError
from fedmezo_jax.setup import Setup

PACKAGES = ("jax", "jaxlib", "numpy", "optax")
"""Whose versions the numbers may hang on."""


class Journal(NamedTuple):
    """A run's ledger and metrics, open.

    Attributes:
        known: the rounds that the ledger has from where the run goes on.
        metrics: the records of the rounds before.
        append: writes a round down; it is on the disk then.
        record: the same for its metrics.
    """

    known: Iterator[ledger.Entry]
    metrics: list[dict[str, Any]]
    append: Callable[[ledger.Entry], None]
    record: Callable[[Mapping[str, Any]], None]


def versions() -> dict[str, str]:
    """Versions of :data:`PACKAGES`."""
    return {name: version(name) for name in PACKAGES}


def open_journal(setup: Setup, folder: Path, first: int, notify: Callable[[str], None]) -> Journal:
    """The journal of a folder, new or verified, cut back to where the run goes on.

    Args:
        setup: the run's.
        folder: the run's.
        first: rounds that are done, by its checkpoint. Later ones that the ledger has are made again from it, so the
            records of their metrics go.
        notify: called with each thing that the user should know.

    Raises:
        UserError: the ledger is damaged or of another run, or less is written down than the checkpoint knows.
    """
    config, file = setup.config, folder / run_folder.LEDGER
    header = None  # back-propagated steps are no scalars that could rebuild the run
    if config.algorithm == "fedmezo":
        header = ledger.make_header(asdict(config), ledger.tree_hash(setup.base), versions())

    def open_both() -> ledger.Ledger | None:
        if not processes.first():
            return None
        book = None if header is None else _open_ledger(file, header, notify)
        kept = run_folder.keep_metrics(folder, first)
        if len(kept) < first or (book and book.rounds < first):
            name = "metrics.jsonl" if len(kept) < first else run_folder.LEDGER
            raise UserError(f"{folder / name} ends before the checkpoint of round {first}: put an intact copy there")
        return book

    book = processes.together(open_both)
    # The first process may be appending already: metrics of later rounds, and to the ledger once all have reached a new
    # round.
    metrics = run_folder.read_metrics(folder)[:first]
    known = iter(()) if header is None else ledger_checks.entries(file, config, first)
    record = (lambda metrics: run_folder.append_metrics(folder, metrics)) if processes.first() else _nowhere
    return Journal(known, metrics, book.append if book else _nowhere, record)


def _open_ledger(file: Path, header: Mapping[str, Any], notify: Callable[[str], None]) -> ledger.Ledger:
    if not file.exists():
        return ledger.create(file, header)
    book, notices = ledger.reopen(file, header)
    for notice in notices:
        notify(notice)
    return book


def _nowhere(written: Any) -> None:
    pass
