"""Data files as tests write them, and what a refusal must look like."""

import json

import pytest

from fedmezo_jax.errors import UserError

GOOD = {"instruction": "Add 1 and 1.", "output": "2"}


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def error_of(call):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message
