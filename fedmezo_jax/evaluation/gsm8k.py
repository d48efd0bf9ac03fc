"""GSM8K answers: the number that a solution states, and exact match of generated solutions with the given ones."""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import NamedTuple

_STATED = re.compile(r"the answer is", re.IGNORECASE)
# A minus is one where nothing stands before it that it could be taken from.
_NUMBER = re.compile(r"(?:(?<![\w.)])-\$?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+")


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

    By the convention of the paper's data that is the first number after the first "The answer is"; a model may well go
    on to another problem after it. A solution that does not say so is taken at its last number (which GSM8K's own
    "#### 72" ends with too), as the paper's reference evaluation does. Dollar signs and separating commas do not count.
    """
    mark = _STATED.search(solution)
    numbers = _NUMBER.findall(solution, mark.end() if mark else 0)
    if not numbers:
        return None
    return Decimal(re.sub(r"[$,]", "", numbers[0 if mark else -1]))


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


def evaluate(generate: Callable[[list[str]], list[str]], prompts: Sequence[str], references: Sequence[str]) -> Score:
    """Generates a solution to each prompt and scores it.

    Args:
        generate: from prompts to the texts that a model continues them with, in the same order.
        prompts: the problems, ready for the model, [n].
        references: as in :func:`score`.
    """
    return score(generate(list(prompts)), references)
