"""Folders of models and adapters: their JSON files, and writing that is never found half-done."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmezo_jax.errors import UserError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ``UserError`` naming the file where it is absent, broken or not an object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a model or adapter folder must hold it") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); fetch it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a JSON {type(raw).__name__}, not an object; fetch it again")
    return raw


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A fresh folder beside ``folder`` that takes its place when the block ends, and vanishes if it fails.

    Where ``folder`` is already there, the new files replace those of the same name, each at once; others stay.
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
