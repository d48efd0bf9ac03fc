"""The clock: measures job after job, and leaves out what the time does not allow.

How long a job takes is guessed from its plan, times how far the guess of the last job of its kind was off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from experiments.benchmarks.accelerator_rows.plan import DEVICE, Job
from experiments.benchmarks.accelerator_rows.process import FailedError, OutOfTimeError

Row = Mapping[str, Any]


class Measures(Protocol):
    """What the schedule asks of a :class:`process.Process`."""

    def run(
        self, kind: str, wanted: Sequence[str], card: Row, options: Mapping[str, Any], seconds: float
    ) -> Iterator[dict[str, Any]]:
        """Yields the rows of a job."""
        ...

    def close(self) -> None:
        """Ends the process."""
        ...


class Clock:
    """Counts down."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        """Starts it; ``now`` is a clock in seconds."""
        self._now, self._end = now, now() + seconds

    def left(self) -> float:
        """Seconds that are left; negative when the time is up."""
        return self._end - self._now()


class Schedule:
    """Measures jobs in their order.

    Attributes:
        rows: all rows so far, by name.
        skipped: why others are missing, by name.
    """

    def __init__(
        self,
        clock: Clock,
        start: Callable[[Job], Measures],
        record: Callable[[Row], None],
        rows: Mapping[str, Row],
        stamp: Row,
        process: Measures | None = None,
    ):
        """Nothing is measured yet.

        Args:
            clock: the time that is left.
            start: starts the process of a job.
            record: is called with each new row.
            rows: those of an earlier run, by name, which are not measured again.
            stamp: what each new row says besides.
            process: one that is on the device already.
        """
        self._clock, self._start, self._record = clock, start, record
        self.rows, self.skipped, self._stamp = dict(rows), dict[str, str](), stamp
        self._process = None if process is None else (DEVICE, process)
        self._pace: dict[str, float] = {}

    def run(self, jobs: Sequence[Job]) -> None:
        """Measures what there is time for."""
        try:
            for job in jobs:
                while self._missing(job) and self._run(job):
                    self._close()  # what is still missing takes a fresh process
        finally:
            self._close()

    def _missing(self, job: Job) -> list[str]:
        return [name for name in job.rows if name not in self.rows and name not in self.skipped]

    def _run(self, job: Job) -> bool:
        """Whether a job that has run should run once more, for rows that are missing."""
        missing, before = self._missing(job), self._clock.left()
        guess = job.seconds * len(missing) / len(job.rows)
        expected = guess * self._pace.get(job.kind, 1.0)
        if expected > before:
            self._skip(missing, f"would take {expected:.0f} s, {before:.0f} s are left")
            return False
        if job.kind != "card" and "error" in self.rows.get("card", {"error": "not measured"}):
            self._skip(missing, "the card could not be measured")
            return False
        try:
            process = self._process_of(job)
            before = self._clock.left()
            for row in process.run(job.kind, missing, self.rows.get("card", {}), job.options, before):
                self._add(job, row)
        except OutOfTimeError:
            self._close()
            self._skip(self._missing(job), "was cut off when the time was up")
        except FailedError as error:
            for name in self._missing(job):
                self._add(job, {"row": name, "error": str(error)})
            self._close()
        self._pace[job.kind] = (before - self._clock.left()) / guess
        still = self._missing(job)
        if len(still) == len(missing):
            for name in still:
                self._add(job, {"row": name, "error": "gave no row"})
        return bool(self._missing(job))

    def _add(self, job: Job, row: Row) -> None:
        row = {"row": row["row"], "kind": job.kind, **row, **self._stamp}
        self._record(row)
        self.rows[row["row"]] = row

    def _skip(self, names: Sequence[str], reason: str) -> None:
        self.skipped |= dict.fromkeys(names, reason)

    def _process_of(self, job: Job) -> Measures:
        label = job.process or job.rows[0]
        if self._process is None or self._process[0] != label:
            self._close()
            self._process = (label, self._start(job))
        return self._process[1]

    def _close(self) -> None:
        if self._process is not None:
            self._process[1].close()
            self._process = None
