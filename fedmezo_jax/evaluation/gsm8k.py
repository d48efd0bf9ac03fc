"""GSM8K answers: the number that a solution states, and exact match of generated solutions with the given ones."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

_STATED = re.compile(r"the answer is", re.IGNORECASE)
# Digits with whatever commas and points lie between them. A minus is a sign where no number or word stands before it.
_NUMERAL = r"(?:(?<![\w.)])[-\u2212])?\$?(?:(?<![\w.,)])\.)?\d(?:\d|[.,](?=\d))*"
_NUMBER = re.compile(_NUMERAL)
_MARKED = re.compile(rf"####[ \t]*({_NUMERAL})")
_VALID = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?")


class Score(NamedTuple):
    """Exact match over a set of problems.

    Attributes:
        accuracy: share of solutions whose answer is the given one.
        stated: share of solutions that state an answer as the paper's data do.
        count: number of problems.
    """

    accuracy: float
    stated: float
    count: int


def answer(solution: str) -> Decimal | None:
    """The number that a solution gives as its answer, or None where it has none.

    The answer is, in this order of precedence,

    1. the number after the first ``####``, GSM8K's own marker;
    2. the first number after the first "The answer is", the convention of the paper's data: a model may well go on to
       another problem after it;
    3. where neither occurs, the last number, as in the paper's reference evaluation.

    A dollar sign does not count, U+2212 is a minus, and commas separate thousands: ``1,234.5`` is a number. Where the
    answer is written in any other way (``1,23``, ``3.4.5``) there is none, instead of a part of it.

    lm-evaluation-harness scores its two conventions apart. Its ``strict-match`` is the first rule alone, as is OpenAI's
    own scorer; its ``flexible-extract`` takes the last number, also where there is a marker. Both delete every comma
    (``1,23`` is 123), compare the digits as text (72.0 is not 72), and know no U+2212.
    """
    if marked := _MARKED.search(solution):
        return _number(marked[1])
    stated = _STATED.search(solution)
    numbers = _NUMBER.findall(solution, stated.end() if stated else 0)
    return _number(numbers[0 if stated else -1]) if numbers else None


def _number(numeral: str) -> Decimal | None:
    plain = numeral.replace("\u2212", "-").replace("$", "")
    return Decimal(plain.replace(",", "")) if _VALID.fullmatch(plain) else None


def score(solutions: Sequence[str], references: Sequence[str]) -> Score:
    """Exact match: a solution is right if its answer equals the reference's as a number (72.0 is 72).

    Args:
        solutions: generated texts, [n].
        references: the given solutions in the same order, [n]; each states its answer.
    """
    right = [
        (given := answer(reference)) is not None and answer(solution) == given
        for solution, reference in zip(solutions, references, strict=True)
    ]
    stated = [_STATED.search(solution) is not None for solution in solutions]
    return Score(sum(right) / len(right), sum(stated) / len(stated), len(right))
