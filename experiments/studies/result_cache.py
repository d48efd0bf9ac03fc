"""A cache of slow measurements: each result is stored in a small JSON file and is not measured again."""

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
"""Everything that determines a measurement's result, as a JSON object."""


class ResultCache:
    """A folder with one file per measurement, named by a hash of everything that determines its result."""

    def __init__(self, folder: Path):
        """Creates the folder if it is missing."""
        if any(path.is_file() for path in (folder, *folder.parents)):
            raise UserError(f"--out {folder.parent}: there is a file in its way: give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def load(self, point: Point) -> dict[str, Any] | None:
        """Returns ``found`` and ``seconds`` of a measurement; None if it has not been made."""
        file = self._file(point)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def store(self, point: Point, result: Any, seconds: float) -> None:
        """Stores a measurement, which must be valid JSON, and the seconds that it took."""
        write_json(self._file(point), {"point": point, "found": result, "seconds": seconds})

    def _file(self, point: Point) -> Path:
        name = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:20]
        return self._folder / f"{name}.json"


def progress() -> Progress:
    """Returns a progress bar that counts finished measurements."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn())


def measure(folder: Path, points: Sequence[Point], work: Callable[[Any], Any]) -> tuple[list[Any], float]:
    """Measures every point that is not in the cache yet, and shows a progress bar.

    Args:
        folder: folder of the cache; created if it is missing.
        points: distinct points.
        work: ``work(point)`` measures a point and returns a JSON value.

    Returns:
        The results in order, and the seconds spent on all of them, in this run or an earlier one.
    """
    cache = ResultCache(folder)
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        # Equal programs of different points are compiled once.
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    stored = []
    with progress() as bar:
        task = bar.add_task("points", total=len(points))
        for point in points:
            if cache.load(point) is None:
                bar.update(task, description=" ".join(str(value) for value in point.values())[:60])
                start = time.perf_counter()
                result = work(point)
                cache.store(point, result, time.perf_counter() - start)
            stored.append(cache.load(point))
            bar.advance(task)
        bar.update(task, description="points")
    return [entry["found"] for entry in stored], sum(entry["seconds"] for entry in stored)
