"""Reading instruction data from JSON and JSON-lines files, every fault named by file and line."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedmezo_jax.data.examples import Example
from fedmezo_jax.errors import UserError

_DECODER = json.JSONDecoder()
_BLANKS = " \t\r\n"
# What each part of an example is called in the wild; the first name that a row has counts.
_NAMES = {
    "instruction": ("instruction", "question"),
    "input": ("input", "context"),
    "response": ("output", "response", "answer"),
    "category": ("category",),
}
_REQUIRED = ("instruction", "response")


def read(path: Path) -> list[Example]:
    """All examples of a file that holds a JSON list of objects or one JSON object a line.

    Raises:
        UserError: the file cannot be read, is empty or broken, or a row lacks a field; with file, line and field.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    records = _list_records(path, text) if text.lstrip(_BLANKS).startswith("[") else _line_records(path, text)
    examples = [example(record, f"{path}, line {line}") for line, record in records]
    if not examples:
        raise UserError(f"{path} holds no rows")
    return examples


def example(record: object, where: str) -> Example:
    """The example in one row; an absent or null input or category counts as empty.

    Raises:
        UserError: the row is no object, lacks a field, or has something other than text in it; `where` leads the line.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a row must be a JSON object with instruction and output, not {_kind(record)}")
    return Example(**{part: _part(record, part, where) for part in _NAMES})


def _part(record: Mapping, part: str, where: str) -> str:
    names = _NAMES[part]
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        if part not in _REQUIRED:
            return ""
        others = f" (or {', '.join(names[1:])})" if names[1:] else ""
        raise UserError(f"{where}: the field {names[0]}{others} is missing")
    if not isinstance(record[name], str):
        raise UserError(f"{where}: the field {name} must be text, not {_kind(record[name])}")
    if any("\ud800" <= character <= "\udfff" for character in record[name]):
        raise UserError(f"{where}: the field {name} holds half a character (a lone surrogate); remove it")
    return record[name]


def _line_records(path: Path, text: str) -> Iterator[tuple[int, object]]:
    # Not str.splitlines, which also breaks at characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip(_BLANKS):
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _broken(path, number, error) from None


def _list_records(path: Path, text: str) -> Iterator[tuple[int, object]]:
    """The elements of a JSON list with the lines on which they begin, which json.loads would not tell."""
    at = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    closed = text.startswith("]", at)
    at = _skip(text, at + closed)
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            record, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _broken(path, getattr(error, "lineno", line), error) from None
        yield line, record
        at = _skip(text, end)
        closed = text.startswith("]", at)
        if not closed and not text.startswith(",", at):
            raise _broken(path, text.count("\n", 0, at) + 1, "expected , or ] after a row")
        at = _skip(text, at + 1)
    if at < len(text):
        raise _broken(path, text.count("\n", 0, at) + 1, "text after the closing ]")


def _skip(text: str, at: int) -> int:
    """The next place from `at` on that is no blank."""
    while text[at : at + 1] and text[at] in _BLANKS:
        at += 1
    return at


def _broken(path: Path, line: int, reason: object) -> UserError:
    reason = reason.msg if isinstance(reason, json.JSONDecodeError) else reason
    return UserError(f"{path}, line {line}: broken JSON ({reason}); mend or remove this row")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "null")
