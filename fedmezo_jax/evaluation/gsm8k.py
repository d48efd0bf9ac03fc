"""GSM8K answers: the number that a solution states, and exact match of generated solutions with references."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

_STATED = re.compile(r"the answer is", re.IGNORECASE)
# Digits with commas and points between them. A minus is a sign unless a number or word comes before it.
_NUMERAL = r"(?:(?<![\w.)])[-\u2212])?\$?(?:(?<![\w.,)])\.)?\d(?:\d|[.,](?=\d))*"
_NUMBER = re.compile(_NUMERAL)
_MARKED = re.compile(rf"####[ \t]*({_NUMERAL})")
_VALID = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?")


class Score(NamedTuple):
    """Exact match over a set of problems.

    Attributes:
        accuracy: share of solutions with the reference's answer.
        stated: share of solutions that state an answer in the words of the paper's data.
        count: number of problems.
    """

    accuracy: float
    stated: float
    count: int


def answer(solution: str) -> Decimal | None:
    """Returns the number that a solution gives as its answer, or None if it has none.

    The answer is, in this order of precedence,

    1. the number after the first ``####``, GSM8K's own marker;
    2. the first number after the first "The answer is", the convention of the paper's data (a model may continue with
       another problem after it);
    3. if neither occurs, the last number, as in the paper's reference evaluation.

    Dollar signs are ignored, U+2212 is a minus, and commas separate thousands: ``1,234.5`` is a number. If the answer
    is written in any other way (``1,23``, ``3.4.5``), the result is None and not a part of it.

    lm-evaluation-harness scores its two conventions separately. Its ``strict-match`` is the first rule alone, as is
    OpenAI's scorer; its ``flexible-extract`` takes the last number even if there is a marker. Both delete every comma
    (``1,23`` is 123), compare the digits as text (72.0 is not 72), and do not recognise U+2212.
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
    """Returns exact match: a solution is right if its answer equals the reference's as a number (72.0 is 72).

    Args:
        solutions: generated texts, [n].
        references: the reference solutions in the same order, [n]; each states its answer.
    """
    is_right = [
        (expected := answer(reference)) is not None and answer(solution) == expected
        for solution, reference in zip(solutions, references, strict=True)
    ]
    stated = [_STATED.search(solution) is not None for solution in solutions]
    return Score(sum(is_right) / len(is_right), sum(stated) / len(stated), len(is_right))
