"""A run's folder: its config, metrics and checkpoints, and the way back into it.

config.json      the resolved configuration
metrics.jsonl    one object a round
checkpoints/     Orbax checkpoints of the state, the newest two
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import jax
import orbax.checkpoint as ocp

from fedmezo_jax.config import RunConfig
from fedmezo_jax.errors import UserError
from fedmezo_jax.federated import FederatedState

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
        if folder.exists() and any(folder.iterdir()):
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


def checkpoints(folder: Path) -> ocp.CheckpointManager:
    """The folder's checkpoint manager; close it (it is a context manager) to wait for the last save."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: FederatedState) -> None:
    """Saves the state under its number of rounds."""
    manager.save(int(state.round), args=ocp.args.StandardSave(state))


def restore(manager: ocp.CheckpointManager, like: FederatedState) -> FederatedState | None:
    """The newest state, bit for bit, or None where there is no checkpoint yet; ``like`` gives structure and shapes."""
    step = manager.latest_step()
    if step is None:
        return None
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return cast(FederatedState, manager.restore(step, args=ocp.args.StandardRestore(template)))
