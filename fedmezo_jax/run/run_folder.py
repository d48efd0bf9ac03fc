"""A run's folder: its config and metrics, and the way back into it.

config.json      the resolved configuration
run.ledger       what rebuilds the run (:mod:`ledger`); written before all that follows from it
metrics.jsonl    one object a round
checkpoints/     checkpoints of the run's progress, the newest two (:mod:`run_checkpoints`)
.lock            held while a process works in the folder
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock

from fedmezo_jax.errors import UserError
from fedmezo_jax.run import ledger
from fedmezo_jax.run.config import RunConfig

LOCK, LEDGER, IDENTITIES = ".lock", "run.ledger", "identities.json"
_EMPTY = {LOCK, ".config.json.new"}  # what a run leaves that was stopped before its first file was whole
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_folder(folder: Path, config: RunConfig, resume: bool) -> list[str]:
    """Refuses a folder that holds another run, before anything is written or computed.

    Returns:
        What the user should know: that ``config.json`` is damaged and will be written again.

    Raises:
        UserError: the folder holds a run and ``resume`` is not set, or it holds another configuration (the keys that
            differ are named), or it is no folder that could be made and written to.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out {folder}: {existing} is a file: give a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"--out {folder}: {existing} may not be written to: give another folder")
    file, book, now = folder / "config.json", folder / LEDGER, asdict(config)
    if not file.exists() and not book.exists():
        if folder.exists() and any(path.name not in _EMPTY for path in folder.iterdir()):
            raise UserError(f"--out {folder} holds other files and no run: give a new or empty folder")
        return []
    if not resume:
        raise UserError(f"--out {folder} holds a run already: give another folder, or --resume to go on with it")
    before = _read_config(file)
    if before and not _differing(before, now):
        return []
    if book.exists():
        recorded = ledger.read_header(book)["config"]
        if not _differing(recorded, now):
            return [f"{file} was missing or damaged: its content is recovered from {LEDGER}"]
        before = before or recorded
    if not before:
        raise UserError(f"{file} is damaged and there is no {LEDGER} to recover it from: give another --out")
    described = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} now)" for key in _differing(before, now))
    raise UserError(f"--resume: {folder} was run with another configuration: {described}")


def _read_config(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def check_shared(folder: Path) -> None:
    """Refuses a folder in which this process does not see what the first one wrote."""
    if not (folder / "config.json").exists():
        raise UserError(f"--out {folder}: is not the first process's: give a folder that all processes share")


def lock(folder: Path) -> filelock.BaseFileLock:
    """The lock of a run's folder, a context manager; it ends with the process that holds it, however that ends."""
    return filelock.FileLock(folder / LOCK, timeout=0)


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Turns a folder in use by another process, and a full disk, into the one line that says so."""
    try:
        yield
    except filelock.Timeout:
        raise UserError(f"--out {folder}: another process is working in it: wait for it, or give another") from None
    except (OSError, ValueError) as error:
        # Orbax's storage layer reports a full disk as a ValueError that quotes the system's words.
        if getattr(error, "errno", None) not in _FULL and not re.search("No space left|File too large", str(error)):
            raise
        raise UserError(f"{folder}: the disk is full: make room, then go on with --resume") from None


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a file that is either whole or not there, even after a power loss."""
    _write_whole(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write_whole(file: Path, content: bytes) -> None:
    fresh = file.with_name(f".{file.name}.new")
    with fresh.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)
    ledger.sync_folder(file.parent)


def set_aside(path: Path) -> Path:
    """Renames a file or folder to the first free name of ``NAME.old``, ``NAME.old-2``, …; returns its new path."""
    fresh = next(new for new in _old_names(path) if not new.exists())
    path.rename(fresh)
    ledger.sync_folder(path.parent)
    return fresh


def _old_names(path: Path) -> Iterator[Path]:
    yield path.with_name(f"{path.name}.old")
    yield from (path.with_name(f"{path.name}.old-{n}") for n in itertools.count(2))


def remove_partial(folder: Path) -> None:
    """Removes the unfinished adapter that a process leaves if it is killed while it writes."""
    for partial in folder.glob(".adapter.*"):
        shutil.rmtree(partial, ignore_errors=True)


def metrics_bytes(folder: Path) -> bytes:
    """The whole lines of ``metrics.jsonl``; what follows the last line break was never finished."""
    file = folder / "metrics.jsonl"
    content = file.read_bytes() if file.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rounds recorded so far."""
    return [json.loads(line) for line in metrics_bytes(folder).splitlines()]


def keep_metrics(folder: Path, size: int, copy: bool) -> Path | None:
    """Cuts ``metrics.jsonl`` back to its first ``size`` bytes.

    Args:
        folder: the run's.
        size: bytes to keep.
        copy: whether to keep the whole file under another name.

    Returns:
        The path of the copy, None without one.
    """
    file, kept = folder / "metrics.jsonl", metrics_bytes(folder)[:size]
    old = set_aside(file) if copy and file.exists() else None
    _write_whole(file, kept)
    return old


def append_metrics(folder: Path, record: Mapping[str, Any]) -> None:
    """Adds one round's record."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())  # before a checkpoint that counts on it
