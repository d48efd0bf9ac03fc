"""A run's folder: its config, metrics and checkpoints, and the way back into it.

config.json      the resolved configuration
run.ledger       what rebuilds the run (:mod:`ledger`); written before all that follows from it
metrics.jsonl    one object a round
checkpoints/     Orbax checkpoints of the run's progress, the newest two
.lock            held while a process works in the folder
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import filelock
import jax
import orbax.checkpoint as ocp

from fedmezo_jax.config import RunConfig
from fedmezo_jax.errors import UserError
from fedmezo_jax.rounds import Progress

LOCK, LEDGER = ".lock", "run.ledger"
_EMPTY = {LOCK, ".config.json.new"}  # what a run leaves that was stopped before its first file was whole
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save there


def check_folder(folder: Path, config: RunConfig, resume: bool) -> None:
    """Refuses a folder that holds another run, before anything is written or computed.

    Raises:
        UserError: the folder holds a run and ``resume`` is not set, or it holds another configuration (the keys that
            differ are named), or it is no folder that could be made and written to.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out {folder}: {existing} is a file: give a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"--out {folder}: {existing} may not be written to: give another folder")
    file = folder / "config.json"
    if not file.exists():
        if folder.exists() and any(path.name not in _EMPTY for path in folder.iterdir()):
            raise UserError(f"--out {folder} holds other files and no run: give a new or empty folder")
        return
    if not resume:
        raise UserError(f"--out {folder} holds a run already: give another folder, or --resume to go on with it")
    now = asdict(config)
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    except (ValueError, AttributeError):
        raise UserError(f"{file} is no run's configuration: give another --out") from None
    if differing:
        described = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} now)" for key in differing)
        raise UserError(f"--resume: {folder} was run with another configuration: {described}")


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
    """Writes a file that is either whole or not there."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(file)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rounds recorded so far; a last line that a crash cut short does not count."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # whatever follows the last line break was never finished


def keep_metrics(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Drops the records of rounds that the checkpoint does not know, which will be run again; returns the rest."""
    kept = [record for record in read_metrics(folder) if record["round"] <= rounds]
    fresh = folder / ".metrics.jsonl.new"
    fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    fresh.replace(folder / "metrics.jsonl")
    return kept


def append_metrics(folder: Path, record: Mapping[str, Any]) -> None:
    """Adds one round's record."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())  # before a checkpoint that counts on it


def checkpoints(folder: Path) -> ocp.CheckpointManager:
    """The folder's checkpoint manager; close it (it is a context manager) to wait for the last save."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, progress: Progress) -> None:
    """Saves a run's progress under its number of rounds."""
    manager.save(int(progress.state.round), args=ocp.args.StandardSave(progress))


def restore(manager: ocp.CheckpointManager, like: Progress) -> Progress | None:
    """The newest progress, bit for bit, or None without a checkpoint; ``like`` gives structure and shapes."""
    step = manager.latest_step()
    if step is None:
        return None
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return cast(Progress, manager.restore(step, args=ocp.args.StandardRestore(template)))
