"""Measures an accelerator: memory, speed, precision and exactness, beside what the compiler and the roofline forecast.

    python -m experiments.benchmarks.accelerator --minutes 8 --out runs/accelerator

Nothing is fetched: weights are random, and ``tiny`` is in the package. Rows are added to ``rows.jsonl`` as they come.
Run again with the same folder, the command measures what is missing. On a CPU it is a smoke test at small sizes.
PyTorch and PEFT are measured where they are installed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from experiments import _cli
from experiments.benchmarks.accelerator_rows.plan import ACCELERATOR, CPU, Job, jobs
from experiments.benchmarks.accelerator_rows.process import FailedError, OutOfTimeError, Process
from experiments.benchmarks.accelerator_rows.schedule import Clock, Row, Schedule
from fedmezo_jax.errors import UserError

_CLOSING = 10.0
"""Seconds kept for the table and the results."""
_COLUMNS = {
    "card": "device_memory_bytes bfloat16_flops float32_flops copied_bytes_per_second table_bfloat16_flops "
    "table_bytes_per_second",
    "memory": "peak_bytes forecast_bytes memory_forecast_off seconds roofline_seconds time_forecast_off "
    "compile_seconds",
    "speed": "seconds roofline_seconds time_forecast_off tokens_per_second over_two_forwards share_of_products "
    "share_of_table compile_seconds",
    "rebuild": "seconds roofline_seconds time_forecast_off",
    "slope": "relative_error expected_error",
    "exactness": "replay_bit_exact replay_largest_difference repeat_bit_exact repeat_largest_difference",
    "comparison": "theta_bits theta_bits_apart theta_parts_in_round ledger_bits ledger_bits_apart "
    "ledger_parts_in_round adapter_bits_apart adapter_largest_difference",
    "peer": "seconds over_fedmezo torch_peak_bytes",
}
"""What the tables show of each kind of row."""


@dataclass(frozen=True)
class Config:
    """How long to measure."""

    minutes: float = 8.0
    """time for all rows; those that do not fit are listed, and measured when the command is run again"""
    out: Path = Path("runs/accelerator")
    """folder for rows.jsonl, config.json, results.json, log.txt and the runs of tiny"""

    def __post_init__(self):
        """Checks the options."""
        if not 0 < self.minutes < math.inf:
            raise UserError(f"--minutes must be above 0, not {self.minutes}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends the command in one line."""
        raise UserError(message)


def parse(config: type[Config], description: str | None) -> Config:
    """Parses the command line without tyro, which may be missing where an accelerator is."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, kind in zip(fields(config), (float, Path), strict=True):
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"by default {field.default}")
    return config(**vars(parser.parse_args(sys.argv[1:])))


def main(config: Config) -> None:
    """Measures what there is time for, prints the tables and writes the folder."""
    begun = time.perf_counter()
    clock = Clock(60 * config.minutes - _CLOSING)
    file, log = config.out / "rows.jsonl", config.out / "log.txt"
    earlier, compiled = read_rows(file), config.out / "compiled"
    shutil.rmtree(compiled, ignore_errors=True)  # no row shall be spared the compilation that it times

    def start_process(job: Job) -> Process:
        own = job.kind == "memory"  # of which some programs are compiled in two processes
        return Process(log, clock.left(), job.process == "cpu", None if own else compiled)

    try:
        process = Process(log, clock.left(), compiled=compiled)
    except (FailedError, OutOfTimeError) as error:
        raise UserError(f"JAX found no device to measure ({error or 'the time was up'}): see {log}") from None
    here = {name: process.hello[name] for name in ("device_kind", "jax")}
    try:
        check_same(earlier, here, config.out)
        write_rows(file, earlier)
    except BaseException:
        process.close()
        raise
    schedule = Schedule(
        clock,
        start_process,
        partial(_record, file),
        {row["row"]: row for row in earlier},
        here,
        process,
    )
    schedule.run(jobs(CPU if process.hello["platform"] == "cpu" else ACCELERATOR, config.out / "tiny"))
    shutil.rmtree(compiled, ignore_errors=True)
    rows = [*schedule.rows.values(), *({"row": name, "skipped": why} for name, why in schedule.skipped.items())]
    _cli.write_folder(config, rows, time.perf_counter() - begun)
    print_tables(rows, f"{here['device_kind']}, jax {here['jax']}")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Returns the rows in a file, without a last one that was cut off; none where there is no file.

    Raises:
        UserError: another line is no row.
    """
    if not file.exists():
        return []
    rows = []
    *lines, _ = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            known = {"row", "kind", "device_kind", "jax"} <= row.keys()
        except (ValueError, AttributeError):
            known = False
        if not known:
            raise UserError(f"{file}: line {number} is no row of this benchmark: give another folder")
        rows.append(row)
    return rows


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Writes the file anew."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def check_same(rows: Sequence[Row], here: Mapping[str, str], folder: Path) -> None:
    """Refuses a folder with rows of another device or another version of JAX."""
    for row in rows:
        there = {name: row[name] for name in here}
        if there != here:
            texts = (f"{place['device_kind']} with jax {place['jax']}" for place in (there, here))
            raise UserError("--out {}: holds rows of {}, and this is {}: give another folder".format(folder, *texts))


def print_tables(rows: Sequence[Row], title: str) -> None:
    """Prints a table for each kind of row, then what failed and what was skipped, and which forecasts did not hold."""
    for kind, columns in _COLUMNS.items():
        measured = [row for row in rows if row.get("kind") == kind and "error" not in row]
        if measured:
            shown = [
                {"row": row["row"].removeprefix(f"{kind} ")} | {name: row[name] for name in columns.split()}
                for row in measured
            ]
            _cli.print_table(f"{title}: {kind}", shown)
    for reason in ("error", "skipped"):
        for row in rows:
            if reason in row:
                print(f"{reason}: {row['row']}: {row[reason]}")
    for name, what in (
        ("memory_forecast_off", "10 % from the compiler's forecast"),
        ("time_forecast_off", "2 times the roofline, or less than half of it"),
    ):
        off = [row["row"] for row in rows if row.get(name)]
        if off:
            print(f"more than {what}: {', '.join(off)}")


def _record(file: Path, row: Row) -> None:
    with file.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")
    print(row["row"], "failed" if "error" in row else "measured", flush=True)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__, parse)
