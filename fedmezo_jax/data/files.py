"""Reading JSON, JSON-lines and Parquet files as plain records, every fault reported with file and line."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fedmezo_jax.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")

_DECODER = json.JSONDecoder()
_BLANKS = " \t\r\n"


class Record(NamedTuple):
    """One row as it stands in its file or hub set.

    Attributes:
        where: file and line, or data set and row; error messages begin with it.
        value: the parsed row; an object unless the data are faulty.
    """

    where: str
    value: object


def read(path: Path, rows_of: tuple[str, ...] = ()) -> list[Record]:
    """Reads all rows of a file.

    JSON may be one object per line (whatever the suffix), a list of objects, or one object that holds one such list
    (``{"data": [...]}``), over any number of lines.

    Args:
        path: a file whose name ends in .parquet, or else JSON.
        rows_of: names of fields. A file with a single object that has one of these fields is itself a row.

    Raises:
        UserError: the file cannot be read, is empty or broken; the message has file and line.
    """
    try:
        rows = _parquet(path) if path.suffix == ".parquet" else list(_json(path, rows_of))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows


def _parquet(path: Path) -> list[Record]:
    from pyarrow import ArrowException, parquet  # needed for Parquet alone

    with path.open("rb") as stream:
        try:
            rows = parquet.read_table(stream).to_pylist()
        except (ArrowException, ValueError, OSError) as error:
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(
                f"{path}: is no Parquet file that can be read ({reason}); fetch or write it again"
            ) from None
    return [Record(f"{path}, row {number}", row) for number, row in enumerate(rows)]


def _json(path: Path, rows_of: tuple[str, ...]) -> Iterator[Record]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    start = _skip(text, 0)
    if text.startswith("[", start):
        at = yield from _list_records(path, text, start)
        if at < len(text):
            raise _broken(path, _line(text, at), "text after the closing ]")
    elif _is_one_value(text, start):
        yield from _object_records(path, text, start, rows_of)
    else:
        yield from _line_records(path, text)


def _is_one_value(text: str, start: int) -> bool:
    """Whether the text is one JSON value over any number of lines, and not one value per line.

    For broken text the first two lines decide: if neither is an object by itself, the text is one value.
    """
    try:
        end = _DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        lines = [line for line in text[start:].split("\n", 50) if line.strip(_BLANKS)]
        return len(lines) > 1 and not any(map(_is_object, lines[:2]))
    return "\n" in text[start:end] or _skip(text, end) == len(text)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _line_records(path: Path, text: str) -> Iterator[Record]:
    # Not str.splitlines, which also breaks at characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip(_BLANKS):
            try:
                yield Record(f"{path}, line {number}", json.loads(line))
            except (ValueError, RecursionError) as error:
                raise _broken(path, number, error) from None


def _object_records(path: Path, text: str, start: int, rows_of: tuple[str, ...]) -> Iterator[Record]:
    """The rows of a file with one value: those of the only list of objects inside it, or the value itself."""
    value, end = _decode(path, text, start)
    if (at := _skip(text, end)) < len(text):
        raise _broken(path, _line(text, at), "text after the first object: give one object a line, or a list of them")
    lists = {}
    if isinstance(value, Mapping) and not value.keys() & set(rows_of):
        lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows}
        lists = {key: rows for key, rows in lists.items() if all(isinstance(row, Mapping) for row in rows)}
    if len(lists) > 1:
        raise UserError(
            f"{path}: holds several lists of rows ({', '.join(lists)}); keep one of them in a file of its own"
        )
    if not lists:
        yield Record(f"{path}, line {_line(text, start)}", value)
        return
    at = _skip(text, start + 1)
    while True:  # find where the list begins, so that its rows have line numbers
        key, at = _decode(path, text, at)
        at = _skip(text, _skip(text, at) + 1)
        if key in lists:
            break
        at = _skip(text, _skip(text, _decode(path, text, at)[1]) + 1)
    yield from _list_records(path, text, at)


def _list_records(path: Path, text: str, at: int) -> Iterator[Record]:
    """The elements of the JSON list at ``at``, with their line numbers; returns the position after it."""
    line, counted_to = 1, 0
    at = _skip(text, at + 1)
    closed = text.startswith("]", at)
    while not closed:
        line, counted_to = line + text.count("\n", counted_to, at), at
        record, end = _decode(path, text, at, line)
        yield Record(f"{path}, line {line}", record)
        at = _skip(text, end)
        closed = text.startswith("]", at)
        if not closed:
            if not text.startswith(",", at):
                raise _broken(path, _line(text, at), "expected , or ] after a row")
            at = _skip(text, at + 1)
    return _skip(text, at + 1)


def _decode(path: Path, text: str, at: int, line: int = 1) -> tuple[object, int]:
    """The value at ``at`` and the position after it. ``line`` is reported for errors that carry no line."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise _broken(path, getattr(error, "lineno", line), error) from None


def _skip(text: str, at: int) -> int:
    """The first position from ``at`` on that is not blank."""
    while text[at : at + 1] and text[at] in _BLANKS:
        at += 1
    return at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _broken(path: Path, line: int, reason: object) -> UserError:
    reason = reason.msg if isinstance(reason, json.JSONDecodeError) else reason
    return UserError(f"{path}, line {line}: broken JSON ({reason}); mend or remove this row")
