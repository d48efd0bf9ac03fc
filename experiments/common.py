"""What every experiment shares: the command line, the results file and the table."""

from __future__ import annotations

import contextlib
import io
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

from fedmezo_jax.errors import UserError
from fedmezo_jax.run_folder import write_json

T = TypeVar("T")
Row = Mapping[str, Any]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def run(main: Callable[[T], None], config: type[T], description: str | None) -> None:
    """Runs an experiment's ``main`` on its config as parsed from the command line.

    Whatever the user can mend ends in one line on standard error and exit code 2.
    """
    try:
        main(_parse(config, description))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _parse(config: type[T], description: str | None) -> T:
    """tyro's parser, whose framed error messages are brought to one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                config, description=description, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        inside = [line.strip(" │") for line in complaint.getvalue().splitlines() if line.startswith("│")]
        rule = next((i for i, line in enumerate(inside) if set(line) == {"─"}), len(inside))
        raise UserError(" ".join(inside[:rule]) or complaint.getvalue().strip()) from None


def write_results(folder: Path, rows: Sequence[Row], seconds: float) -> None:
    """Writes ``results.json``: ``command``, ``versions``, ``host``, ``seconds`` and ``rows``."""
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
    results = {"command": command, "versions": versions, "host": host, "seconds": seconds, "rows": list(rows)}
    write_json(folder / "results.json", results)


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Prints rows of one shape; their keys become the heads of the columns."""
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="right" if isinstance(rows[0][key], int | float) else "left")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    Console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
