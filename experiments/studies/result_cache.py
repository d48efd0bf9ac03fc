"""Measurements that are many and slow: each is kept as one small JSON file and is not made again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedmezo_jax.errors import UserError
from fedmezo_jax.run.run_folder import write_json

Point = Mapping[str, Any]
"""All that decides a measurement's outcome, as JSON would have it."""


class ResultCache:
    """A folder with one file for each measurement, named after all that decides its outcome."""

    def __init__(self, folder: Path):
        """Makes the folder where it is missing."""
        if any(path.is_file() for path in (folder, *folder.parents)):
            raise UserError(f"--out {folder.parent}: there is a file in its way: give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def load(self, point: Point) -> dict[str, Any] | None:
        """``found`` and ``seconds`` of a measurement; None if it has not been made."""
        file = self._file(point)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def store(self, point: Point, found: Any, seconds: float) -> None:
        """Keeps a measurement, which JSON must be able to hold, and the seconds that it took."""
        write_json(self._file(point), {"point": point, "found": found, "seconds": seconds})

    def _file(self, point: Point) -> Path:
        name = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:20]
        return self._folder / f"{name}.json"


def progress() -> Progress:
    """A bar that counts finished measurements."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn())


def measure(folder: Path, points: Sequence[Point], work: Callable[[Any], Any]) -> tuple[list[Any], float]:
    """``work(point)`` of each point, in order, and the seconds spent on all of them, in this run or an earlier one.

    What ``folder`` has a file for is not measured again. The progress over all points is shown.

    Args:
        folder: for the files; made where it is missing.
        points: distinct ones.
        work: returns what JSON can hold.
    """
    cache = ResultCache(folder)
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        # Equal programs of different points are compiled once.
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    kept = []
    with progress() as bar:
        task = bar.add_task("points", total=len(points))
        for point in points:
            if cache.load(point) is None:
                bar.update(task, description=" ".join(str(value) for value in point.values())[:60])
                begun = time.perf_counter()
                found = work(point)
                cache.store(point, found, time.perf_counter() - begun)
            kept.append(cache.load(point))
            bar.advance(task)
        bar.update(task, description="points")
    return [one["found"] for one in kept], sum(one["seconds"] for one in kept)
