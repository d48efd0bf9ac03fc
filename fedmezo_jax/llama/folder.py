"""Folders of models and adapters: opening files, reading JSON, and writing folders atomically."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from fedmezo_jax.errors import UserError

_JSON_BYTES = 128 << 20  # the largest tokenizer.json files have about 30 MB
_JSON_DEPTH = 100  # levels of nesting; tokenizer.json has about ten


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the system's errors when reading ``path`` into a ``UserError``."""
    try:
        yield
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        remedy = "a model or adapter folder must hold it" if absent else "check its permissions and the disk"
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Opens an ordinary file for reading.

    Raises:
        UserError: it is not an ordinary file or cannot be read.
    """
    with readable(path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no ordinary file; give a model's or an adapter's own file")
        with path.open("rb") as stream:
            stream.peek(1)  # some errors only occur at the first read
            yield stream


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        UserError: the file is missing, broken, too large, or not an object.
    """
    with opened(path) as stream:
        data = stream.read(_JSON_BYTES + 1)
    if len(data) > _JSON_BYTES:
        raise UserError(f"{path}: is larger than {_JSON_BYTES >> 20} MiB, too large for such a file; fetch it again")
    try:
        raw = json.loads(data.decode("utf-8"))
        too_deep = _is_deeper(raw, _JSON_DEPTH)
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); fetch it again") from None
    except RecursionError:
        raw, too_deep = None, True
    if too_deep:
        raise UserError(f"{path}: is nested deeper than {_JSON_DEPTH} levels; fetch it again")
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a JSON {type(raw).__name__}, not an object; fetch it again")
    return raw


def _is_deeper(document: Any, levels: int) -> bool:
    """Whether the lists and objects of a JSON document are nested deeper than ``levels``."""
    nodes = [document]
    for _ in range(levels):
        nodes = [node for node in nodes if isinstance(node, dict | list)]
        nodes = [child for node in nodes for child in (node.values() if isinstance(node, dict) else node)]
    return any(isinstance(node, dict | list) for node in nodes)


def shorten(text: str) -> str:
    """Returns a text cut to at most 80 characters, for messages."""
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``folder`` when the block ends, and is removed if the block fails.

    If ``folder`` exists already, each new file atomically replaces the one of the same name; other files stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    fresh.mkdir()
    try:
        yield fresh
        if not folder.exists():
            fresh.rename(folder)
        else:
            for file in sorted(fresh.iterdir()):
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
