"""Seeded mutations of valid files: of their bytes, and of the values in a JSON document."""

import copy
import json
from collections import Counter

import numpy as np

from fedmezo_jax.errors import UserError

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**400),
    *("", "x", "2", "\0", "\ud800", "é" * 300, "../../x", "{{", "[", "(a+)+$", "</s>"),
    *([], {}, [[]], [None], [0, "x"], {"": None}, {"content": "x"}, {"content": 1}, {"type": "Zoo"}),
]


def mutated_bytes(whole, draw):
    """The bytes with one to three edits: bits, numbers, and slices cut out, doubled or swapped for noise."""
    data = bytearray(whole)
    for _ in range(draw.integers(1, 4)):
        at = int(draw.integers(max(len(data), 1)))
        if draw.random() < 0.5:  # a header is a small part of many a file
            at = min(at, int(draw.integers(1, 300)))
        width = int(draw.choice([1, 2, 4, 8, 50]))
        kind = draw.integers(7)
        if kind == 0 and data:
            data[at] ^= 1 << draw.integers(8)
        elif kind == 1:
            number = NUMBERS[draw.integers(len(NUMBERS))] % 2**64
            data[at : at + 8] = number.to_bytes(8, str(draw.choice(["big", "little"])))
        elif kind == 2:
            data[at : at + width] = draw.bytes(width)
        elif kind == 3:
            del data[at : at + width]
        elif kind == 4:
            data[at:at] = data[at : at + width]
        elif kind == 5:
            data[at:at] = draw.bytes(width)
        elif draw.random() < 0.3:
            del data[at:]
    return bytes(data)


def mutated_json(whole, draw):
    """The document with one or two values replaced, dropped or doubled, deeply nested, or mutated as bytes."""
    if draw.random() < 0.2:
        return mutated_bytes(whole, draw)
    document = copy.deepcopy(json.loads(whole))
    for _ in range(draw.integers(1, 3)):
        parent, depth = document, draw.integers(1, 5)
        while parent:
            key = draw.integers(len(parent)) if isinstance(parent, list) else list(parent)[draw.integers(len(parent))]
            child, depth = parent[key], depth - 1
            if depth and child and isinstance(child, dict | list):
                parent = child
                continue
            kind = draw.integers(5)
            if kind == 0:
                del parent[key]
            elif kind == 1 and isinstance(parent, dict):
                parent[str(key) + "x"] = parent.pop(key)
            elif kind == 2 and isinstance(parent, list):
                parent.append(copy.deepcopy(child))
            else:
                parent[key] = copy.deepcopy(VALUES[draw.integers(len(VALUES))])
            break
    text = json.dumps(document)
    if draw.random() < 0.02:
        depth = int(draw.choice([200, 900, 100_000]))
        text = '{"x": ' + "[" * depth + text + "]" * depth + "}"
    return text.encode()


def fuzz(file, parse, mutate, count, seed=0):
    """Parses ``count`` mutations of a file: how many were accepted and refused, and every other exception's repr.

    ``parse`` takes no argument and must accept the file as it is.
    """
    whole, draw = file.read_bytes(), np.random.default_rng(seed)
    parse()
    ends = Counter()
    for _ in range(count):
        file.write_bytes(mutate(whole, draw))
        try:
            parse()
            ends["accepted"] += 1
        except UserError as error:
            ends["refused" if "\n" not in str(error) else f"lines: {error}"] += 1
        except BaseException as error:  # a panic of Rust code is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            ends[f"{type(error).__name__}: {str(error)[:200]}"] += 1
    file.write_bytes(whole)
    return ends
