"""The folder that a command writes into, made before the work and not after it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedmezo_jax.errors import UserError


@contextmanager
def out_folder(folder: Path) -> Iterator[None]:
    """Makes ``folder`` with its parents; where the block fails, what was made and is still empty goes again.

    Raises:
        UserError: it cannot be made or written into.
    """
    made: list[Path] = []
    try:
        try:
            for path in (*reversed(folder.parents), folder):
                if path.is_file():
                    raise UserError(f"--out {folder}: {path} is a file: give a folder")
                if not path.is_dir():
                    path.mkdir()
                    made.append(path)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--out {folder}: cannot be written to ({reason}): give another folder") from None
        yield
    except BaseException:
        with suppress(OSError):
            for path in reversed(made):
                path.rmdir()
        raise
