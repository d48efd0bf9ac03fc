"""Experiment trackers: what ``metrics.jsonl`` has, written to TensorBoard, Trackio or Weights & Biases as well.

Each session of a run writes the curve from its first round on: a run reports the rounds of earlier sessions first. A
run that was stopped and resumed therefore leaves one curve, that of a run that was not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedmezo_jax.errors import UserError

Tracker: TypeAlias = Literal["trackio", "tensorboard", "wandb"]
Log: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Takes a round's record."""

_PROJECT = "fedmezo"
_COUNTED = ("participants", "failed")
"""Lists of a record of which the length is a curve; of others it is the mean."""


def check(name: Tracker) -> None:
    """Raises ``UserError`` if a tracker's package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name} needs {name}: pip install {name}")


def opened(name: Tracker, folder: Path, options: Mapping[str, Any]) -> AbstractContextManager[Log]:
    """A tracker of the run in ``folder`` with these options: a context that yields what takes each round's record."""
    return {"tensorboard": tensorboard, "trackio": trackio, "wandb": wandb}[name](folder, options)


def curves(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a round's record. Of a list that is its mean, or its length; what is None is left out."""
    found = {}
    for name, value in record.items():
        if isinstance(value, list):
            if name in _COUNTED:
                found[name] = len(value)
            elif value:
                found[name] = sum(value) / len(value)
        elif isinstance(value, int | float) and name != "round":
            found[name] = float(value)
    return found


@contextmanager
def tensorboard(folder: Path, options: Mapping[str, Any]) -> Iterator[Log]:
    """An event file in ``folder/tensorboard``, in the place of those of earlier sessions; needs no TensorFlow."""
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for earlier in (folder / "tensorboard").glob("events.out.tfevents.*"):
        earlier.unlink()
    writer = EventFileWriter(str(folder / "tensorboard"))

    def log(record: Mapping[str, Any]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in curves(record).items()]
        writer.add_event(Event(wall_time=time.time(), step=record["round"], summary=Summary(value=values)))
        writer.flush()

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def trackio(folder: Path, options: Mapping[str, Any]) -> Iterator[Log]:
    """A run of the project ``fedmezo`` in Trackio's local database, in the place of that of earlier sessions."""
    import trackio

    name = _name(folder)
    with suppress(ValueError):  # there is no such project yet
        for run in trackio.Api().runs(_PROJECT):
            if run.name == name:
                run.delete()
    trackio.init(_PROJECT, name, config=dict(options), embed=False, auto_log_gpu=False, auto_log_cpu=False)
    try:
        yield lambda record: trackio.log(curves(record), step=record["round"])
    finally:
        trackio.finish()


@contextmanager
def wandb(folder: Path, options: Mapping[str, Any]) -> Iterator[Log]:
    """A run of the project ``fedmezo`` at Weights & Biases, with files in ``folder/wandb``.

    A resumed run has the same id, and the service ignores the rounds that it has. ``WANDB_MODE=offline`` keeps all on
    this machine.
    """
    import wandb  # pyright: ignore[reportMissingImports]

    name = _name(folder)
    run = wandb.init(project=_PROJECT, id=name, name=name, dir=folder, config=dict(options), resume="allow")
    try:
        yield lambda record: run.log(curves(record), step=record["round"])
    finally:
        run.finish()


def _name(folder: Path) -> str:
    """A name for the run in a folder, the same in every session and another in every folder."""
    place = folder.resolve()
    return f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
