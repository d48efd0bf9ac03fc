"""The parts that all experiments share: the command line, the results file and the table."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import STOPS
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.registry import cache_folder
from fedmezo_jax.out_folder import out_folder
from fedmezo_jax.parallel import multihost
from fedmezo_jax.run.compilation_cache import keep_compiled
from fedmezo_jax.run.run_folder import write_json

T = TypeVar("T")
Row = Mapping[str, Any]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def run(
    main: Callable[[T], None],
    config: type[T],
    description: str | None,
    parse: Callable[[type[T], str | None], T] | None = None,
) -> None:
    """Runs an experiment's ``main`` on its config from the command line.

    A ``UserError`` is printed as one line on standard error, with exit code 2. A signal that stops the command is
    reported in one line, with exit code 128 plus its number.

    Args:
        main: the experiment.
        config: the dataclass of its options.
        description: text for ``--help``.
        parse: makes the config of ``sys.argv``, from the two arguments before; tyro by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without η prints ? instead of failing
    keep_compiled(cache_folder() / "compiled")
    try:
        with _stops():
            options = (parse or _parse)(config, description)
            with _out_folder(options):
                main(options)
    except UserError as error:
        _leave("error: " + " ".join(str(error).splitlines()), 2)  # a file's name may contain a line break
    except StoppedError as stop:
        hint = "; go on with --resume" if hasattr(config, "resume") else ""
        _leave(f"stopped by {stop.signal.name}{hint}", 128 + stop.signal)


def _out_folder(options: Any) -> contextlib.AbstractContextManager[None]:
    """Makes the folder ``--out`` before any work; a command that can be resumed does so itself, under its lock."""
    folder = getattr(options, "out", None)
    return contextlib.nullcontext() if folder is None or hasattr(options, "resume") else out_folder(folder)


class StoppedError(KeyboardInterrupt):
    """A signal has stopped the command; handlers of Ctrl-C handle it too."""

    def __init__(self, number: int):
        """Takes the signal's number."""
        super().__init__()
        self.signal = signal.Signals(number)


def _raise(number: int, frame: Any) -> None:
    raise StoppedError(number)


@contextlib.contextmanager
def _stops() -> Iterator[None]:
    """Raises :class:`StoppedError` in the block for signals that the process does not ignore."""
    previous_handlers = {number: signal.getsignal(number) for number in STOPS}
    try:
        for number, handler in previous_handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _raise)
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _leave(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    multihost.abort(code, message)
    sys.exit(code)


def _parse(config: type[T], description: str | None) -> T:
    """Parses the command line with tyro, and reduces tyro's framed error messages to one line.

    A config class may have a method ``defaults(arguments)`` that returns the defaults.
    """
    import tyro

    stderr = io.StringIO()
    default = config.defaults(sys.argv[1:]) if hasattr(config, "defaults") else None  # pyright: ignore[reportAttributeAccessIssue]
    default_option = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(config, description=description, config=(tyro.conf.OmitArgPrefixes,), **default_option)
    except SystemExit as stop:
        if not stop.code:
            raise
        # The frame consists of box characters, or of dashes on simple terminals. The message ends at the first rule.
        lines = (line.strip(" │") for line in stderr.getvalue().splitlines()[1:])
        parts = itertools.groupby(lines, key=lambda line: set(line) <= set("─-╰╯"))
        message = next((" ".join(part) for is_rule, part in parts if not is_rule), stderr.getvalue().strip())
        raise UserError(message) from None


def write_folder(config: Any, rows: Sequence[Row], seconds: float, **more: Any) -> None:
    """Writes ``config.json`` and ``results.json`` into the folder ``config.out``, which is created if it is missing.

    Args:
        config: the dataclass of the command's options.
        rows: rows of the results.
        seconds: time spent on them.
        more: further contents of ``config.json``.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    write_json(config.out / "config.json", options | more)
    write_results(config.out, rows, seconds)


def write_results(folder: Path, rows: Sequence[Row], seconds: float) -> None:
    """Writes ``results.json``: ``command``, ``versions``, ``host``, ``seconds`` and ``rows``.

    Numbers that are not finite become null, because JSON has none.
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
    """Prints rows with the same keys, which become the column heads.

    No value is cut or broken: if the table is wider than the console, each row is printed as a block of lines, one per
    value.
    """
    console = Console()
    heads = [key.replace("_", " ") for key in rows[0]]
    cells = [[shown(value).expandtabs() for value in row.values()] for row in rows]
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    widths = [
        max(cell_len(part) for part in (*head.split(), *(line for cell in column for line in cell.splitlines())))
        for head, *column in zip(heads, *cells, strict=True)
    ]
    if sum(widths) + 3 * len(widths) + 1 > console.width:
        longest = max(map(cell_len, heads))
        for row in cells:
            lines = (f"{head:{longest}}  {cell}" for head, cell in zip(heads, row, strict=True))
            console.print("\n".join(lines), end="\n\n", markup=False, highlight=False, soft_wrap=True)
        return
    table = Table()
    for head, width, value in zip(heads, widths, rows[0].values(), strict=True):
        table.add_column(head, width=width, justify="right" if isinstance(value, int | float) else "left")
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)


def shown(value: Any) -> str:
    """Returns the text of a table's cell."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
