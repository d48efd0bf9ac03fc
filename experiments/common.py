"""What every experiment shares: the command line, the results file and the table."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro
from rich.console import Console
from rich.table import Table

from fedmezo_jax import processes
from fedmezo_jax.errors import UserError
from fedmezo_jax.run_folder import write_json

T = TypeVar("T")
Row = Mapping[str, Any]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def run(main: Callable[[T], None], config: type[T], description: str | None) -> None:
    """Runs an experiment's ``main`` on its config as parsed from the command line.

    Whatever the user can mend ends in one line on standard error and exit code 2.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no η prints ? and does not fail
    try:
        main(_parse(config, description))
    except UserError as error:
        print("error:", *str(error).splitlines(), file=sys.stderr, flush=True)  # a file's name may hold a line break
        processes.leave(2)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        processes.leave(130)
        sys.exit(130)


def _parse(config: type[T], description: str | None) -> T:
    """tyro's parser, whose framed error messages are brought to one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, description=description, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:
            raise
        # The frame is of box characters or, for a terminal without them, of dashes; the message ends at its first rule.
        lines = (line.strip(" │") for line in complaint.getvalue().splitlines()[1:])
        parts = itertools.groupby(lines, key=lambda line: set(line) <= set("─-╰╯"))
        message = next((" ".join(part) for is_rule, part in parts if not is_rule), complaint.getvalue().strip())
        raise UserError(message) from None


def write_results(folder: Path, rows: Sequence[Row], seconds: float) -> None:
    """Writes ``results.json``: ``command``, ``versions``, ``host``, ``seconds`` and ``rows``.

    Numbers that are not finite become null, as JSON has none.
    """
    rows = [{key: _in_json(value) for key, value in row.items()} for row in rows]
    versions = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    devices = jax.devices()
    host = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "platform": devices[0].platform,
    }
    module = sys.modules["__main__"].__spec__
    command = shlex.join(["python", "-m", module.name if module else sys.argv[0], *sys.argv[1:]])
    results = {"command": command, "versions": versions, "host": host, "seconds": seconds, "rows": rows}
    write_json(folder / "results.json", results)


def _in_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Prints rows of one shape; their keys become the heads of the columns."""
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="right" if isinstance(rows[0][key], int | float) else "left")
    for row in rows:
        table.add_row(*(shown(value) for value in row.values()))
    Console().print(table)


def shown(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
