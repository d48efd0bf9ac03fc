"""Checkpoints of a run's progress, each with a seal that tells a damaged or foreign one from a good one.

A checkpoint is a folder ``checkpoints/ROUND`` that Orbax writes and reads. The seal is a file in it that is written
last. Files are compared with it before Orbax reads them: on damaged ones it can fail in any way, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from fedmezo_jax.core.tree_hash import tree_hash
from fedmezo_jax.errors import UserError
from fedmezo_jax.orbax_logging import quiet_orbax
from fedmezo_jax.parallel import multihost
from fedmezo_jax.run import run_folder
from fedmezo_jax.run.rounds import Progress

SEAL = "seal.json"
_OVERHEAD = 2**17  # bytes of a checkpoint beyond its arrays: some twenty small files, each a block of the disk


class Seal(NamedTuple):
    """What a checkpoint is checked against before it is used.

    Attributes:
        files: SHA-256 of each file of the checkpoint, by its path in it.
        progress: SHA-256 of the whole progress (:func:`tree_hash`).
        ledger: chain value of the ledger's record of that round, in hexadecimal; None where there is no ledger.
        metrics: SHA-256 of ``metrics.jsonl`` as it was then.
        metrics_bytes: its length.
    """

    files: dict[str, str]
    progress: str
    ledger: str | None
    metrics: str
    metrics_bytes: int


class Checkpoint(NamedTuple):
    """A checkpoint that has been read and is intact.

    Attributes:
        progress: the run's, bit for bit.
        seal: its seal.
    """

    progress: Progress
    seal: Seal


@contextmanager
def manager(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """The manager of a run's checkpoints, of which it keeps two. Orbax's log is quiet while it is open."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with quiet_orbax(), ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options) as opened:
        yield opened


def save(manager: ocp.CheckpointManager, folder: Path, progress: Progress, chain: str | None) -> None:
    """Saves a run's progress under its number of rounds.

    Args:
        manager: of the folder's checkpoints.
        folder: the run's, whose ``metrics.jsonl`` has a record of each of these rounds.
        progress: the run's.
        chain: chain value of the ledger's record of the last round; None where there is no ledger.
    """
    step = int(progress.state.round)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(progress)) + _OVERHEAD
    multihost.all_or_none(lambda: _check_room(folder, size) if multihost.is_coordinator() else None)
    manager.save(step, args=ocp.args.StandardSave(progress))
    if multihost.is_coordinator():
        checkpoint, metrics = Path(manager.directory / str(step)), run_folder.metrics_bytes(folder)
        seal = Seal(_hashes(checkpoint), tree_hash(progress), chain, _sha256(metrics), len(metrics))
        run_folder.write_json(checkpoint / SEAL, seal._asdict() | {"sha256": _hash_of(seal)})


def _check_room(folder: Path, size: int) -> None:
    """Refuses a full disk. Orbax's threads would report it one by one, some after the save has failed."""
    if not hasattr(os, "posix_fallocate"):
        return
    file = folder / ".room"
    with run_folder.guarded(folder):
        try:
            with file.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, size)
        finally:
            file.unlink(missing_ok=True)


def _hashes(checkpoint: Path) -> dict[str, str]:
    files = (file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != SEAL)
    return {str(file.relative_to(checkpoint)): _sha256(file.read_bytes()) for file in files}


def newest(
    manager: ocp.CheckpointManager, like: Progress, complaint: Callable[[int, Seal], str | None]
) -> tuple[Checkpoint | None, dict[int, str]]:
    """The newest checkpoint that is intact and fits the run, and why later ones do not.

    Args:
        manager: of the folder's checkpoints.
        like: progress whose structure, shapes and sharding the checkpoint must have.
        complaint: says what is wrong with an intact checkpoint of so many rounds, or None.

    Returns:
        The checkpoint, or None if none can be used; and for each one that cannot, by its round, the reason.
    """
    reasons: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            return multihost.all_or_none(lambda step=step: _read(manager, step, like, complaint)), reasons
        except UserError as reason:
            reasons[step] = str(reason)
    return None, reasons


def _read(
    manager: ocp.CheckpointManager, step: int, like: Progress, complaint: Callable[[int, Seal], str | None]
) -> Checkpoint:
    seal = _read_seal(Path(manager.directory / str(step)))
    if wrong := complaint(step, seal):
        raise UserError(wrong)
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    progress = cast(Progress, manager.restore(step, args=ocp.args.StandardRestore(template)))
    if tree_hash(progress) != seal.progress or int(progress.state.round) != step:
        raise UserError("its contents do not match its checksum")
    if jax.process_count() == jax.device_count() == 1:
        # Orbax binds arrays to their device, for which JAX compiles a program again; those of a fresh run are free.
        progress = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)), progress)
    return Checkpoint(progress, seal)


def _read_seal(checkpoint: Path) -> Seal:
    """The seal of a checkpoint whose files are as they were when it was saved."""
    try:
        content = json.loads((checkpoint / SEAL).read_bytes())
        checksum, seal = content.pop("sha256"), Seal(**content)
    except FileNotFoundError:
        raise UserError(f"it has no {SEAL}: it was not saved completely, or the file was lost") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise UserError(f"its {SEAL} is damaged") from None
    if checksum != _hash_of(seal):
        raise UserError(f"its {SEAL} is damaged")
    if changed := sorted(set(seal.files.items()) ^ set(_hashes(checkpoint).items())):
        raise UserError(f"its file {changed[0][0]} is damaged or missing")
    return seal


def _hash_of(seal: Seal) -> str:
    return _sha256(json.dumps(seal._asdict(), sort_keys=True).encode())


def set_aside(manager: ocp.CheckpointManager, first: int) -> dict[int, Path]:
    """Renames the checkpoints of rounds after ``first``, so that these rounds can be saved again.

    Returns:
        The new path of each, by its round.
    """
    later = [step for step in manager.all_steps() if step > first]
    folder = Path(manager.directory)
    moved = multihost.all_or_none(
        lambda: {step: run_folder.set_aside(folder / str(step)) for step in later} if multihost.is_coordinator() else {}
    )
    manager.reload()
    return moved


def metrics_match(folder: Path, seal: Seal) -> bool:
    """Whether ``metrics.jsonl`` still begins as it was when the checkpoint was saved."""
    before = run_folder.metrics_bytes(folder)[: seal.metrics_bytes]
    return len(before) == seal.metrics_bytes and _sha256(before) == seal.metrics


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
