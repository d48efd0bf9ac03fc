"""Turns records into examples: finds the instruction, input, response and category among a row's fields."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from fedmezo_jax.data.examples import Chat, Example, Message
from fedmezo_jax.data.files import Record
from fedmezo_jax.errors import UserError

# Common names of each part; the first name that a row has is used.
_NAMES = {
    "instruction": ("instruction", "question"),
    "input": ("input", "context"),
    "response": ("output", "response", "answer"),
    "category": ("category",),
    "messages": ("messages", "conversations"),
}
_REQUIRED = ("instruction", "response")
_SHAREGPT = {"from": "role", "value": "content"}
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; all others stay

Fields: TypeAlias = Mapping[str, str]
"""Maps a part (instruction, input, response, category, messages) to the name of its field; "" means an empty part."""


def parse_fields(text: str) -> dict[str, str]:
    """Parses a field map such as ``instruction=question,response=answer`` and returns it as a dict.

    Raises:
        UserError: wrong syntax, an unknown part, or a part given twice.
    """
    fields: dict[str, str] = {}
    for pair in filter(None, (pair.strip() for pair in text.split(","))):
        part, equals, name = (piece.strip() for piece in pair.partition("="))
        if not equals or part not in _NAMES:
            raise UserError(f"--fields: {pair!r} is not PART=NAME with PART one of {', '.join(_NAMES)}")
        if part in fields:
            raise UserError(f"--fields names {part} twice")
        if not name and part in _REQUIRED:
            raise UserError(f"--fields: {part} cannot be left empty; name its field")
        fields[part] = name
    if fields.get("messages") and fields.keys() - {"messages", "category"}:
        raise UserError("--fields: chat data have messages and category alone; name no other part beside them")
    return fields


def field_names(fields: Fields) -> tuple[str, ...]:
    """Returns every field name that is looked for in a row."""
    return tuple(name for part in _NAMES for name in _names(part, fields))


def examples(records: Sequence[Record], fields: Fields | None = None) -> list[Example] | list[Chat]:
    """Returns one example per record, or one chat per record if the first has messages (then all must).

    Raises:
        UserError: as :func:`example`, or a field named in ``fields`` occurs in no record.
    """
    fields = fields or {}
    rows = [record.value for record in records if isinstance(record.value, Mapping)]
    for part, name in fields.items():
        if name and rows and not any(name in row for row in rows):
            known = ", ".join(map(str, rows[0]))
            raise UserError(f"{records[0].where}: --fields {part}={name}, but no row has {name}; it has {known}")
    if rows and _is_chat(rows[0], fields):
        return [chat(record, fields) for record in records]
    return [example(record, fields) for record in records]


def example(record: Record, fields: Fields | None = None) -> Example:
    """Returns the example in one record. A missing or null input or category is empty; a category may be a number.

    Raises:
        UserError: the record is not an object, lacks a part, or a part is not text.
    """
    row = _row(record, "instruction and output")
    return Example(*(_text(row, part, record.where, fields or {}) for part in Example._fields))


def chat(record: Record, fields: Fields | None = None) -> Chat:
    """Returns the chat in one record: a list of ``{"role": ..., "content": ...}``, at least one by the assistant.

    ShareGPT's ``{"from": "human" | "gpt" | "system", "value": ...}`` means the same. A content may also be a list of
    parts ``{"type": "text", "text": ...}``, which are joined.

    Raises:
        UserError: the record has no such list, or a message has a part that is not text.
    """
    fields = fields or {}
    row = _row(record, "messages")
    name = _name(row, "messages", fields)
    if name is None:
        field = _names("messages", fields)[0]
        raise UserError(f"{record.where}: the field {field} is {'null' if field in row else 'missing'}")
    turns = row[name]
    if not isinstance(turns, Iterable) or isinstance(turns, str | Mapping):
        raise UserError(f"{record.where}: {name} must be a list of messages, not {_kind(turns)}")
    if not len(list(turns)):
        raise UserError(f"{record.where}: {name} is empty; remove this row")
    messages = [_message(turn, f"{name}[{number}]", record.where) for number, turn in enumerate(turns)]
    if not any(message.role == "assistant" for message in messages):
        raise UserError(f"{record.where}: no message in {name} is by the assistant, so there is nothing to learn")
    return Chat(tuple(messages), _text(row, "category", record.where, fields))


def _message(turn: object, what: str, where: str) -> Message:
    if isinstance(turn, Mapping):
        turn = turn if "role" in turn else {_SHAREGPT.get(key, key): value for key, value in turn.items()}
        role, content = turn.get("role"), _joined_parts(turn.get("content"), what, where)
        if isinstance(role, str) and isinstance(content, str):
            return Message(*(_valid_text(text, what, where) for text in (_SPEAKERS.get(role, role), content)))
    raise UserError(f'{where}: {what} must be {{"role": "...", "content": "..."}} with text in both')


def _joined_parts(content: object, what: str, where: str) -> object:
    """The text of a content that is a list of parts; any other content as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            shown = f"of type {kind}" if isinstance(kind, str) and kind != "text" else "without a text"
            raise UserError(f"{where}: part {number} of {what} is {shown}: only text can be learned; remove this row")
        texts.append(text)
    return "".join(texts)


def _is_chat(row: Mapping, fields: Fields) -> bool:
    """Whether a row is a chat: it has messages, or a null messages field and no instruction."""
    if fields.keys() & set(_REQUIRED):
        return False
    if _name(row, "messages", fields):
        return True
    return any(name in row for name in _names("messages", fields)) and not _name(row, "instruction", fields)


def _row(record: Record, wanted: str) -> Mapping:
    if not isinstance(record.value, Mapping):
        raise UserError(f"{record.where}: a row must be a JSON object with {wanted}, not {_kind(record.value)}")
    return record.value


def _names(part: str, fields: Fields) -> tuple[str, ...]:
    if part in fields:
        return (fields[part],) if fields[part] else ()
    return _NAMES[part]


def _name(row: Mapping, part: str, fields: Fields) -> str | None:
    """The name of the field of this row that holds the part, or None."""
    return next((name for name in _names(part, fields) if row.get(name) is not None), None)


def _text(row: Mapping, part: str, where: str, fields: Fields) -> str:
    name = _name(row, part, fields)
    if name is None:
        if part not in _REQUIRED:
            return ""
        if null_fields := [name for name in _names(part, fields) if name in row]:
            raise UserError(f"{where}: the field {null_fields[0]} is null; give it a text or remove this row")
        first, *other_names = _names(part, fields)
        or_others = f" (or {', '.join(other_names)})" if other_names else ""
        raise UserError(
            f"{where}: the field {first}{or_others} is missing; the row has {', '.join(map(str, row)) or 'no field'} "
            f"(--fields {part}=NAME takes another)"
        )
    value = row[name]
    if part == "category" and isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: the field {name} must be text, not {_kind(value)}")
    return _valid_text(value, f"the field {name}", where)


def _valid_text(text: str, what: str, where: str) -> str:
    """Returns the text, or raises ``UserError`` for a lone surrogate, which no tokenizer accepts."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: {what} holds half a character (a lone surrogate); remove it")
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")
