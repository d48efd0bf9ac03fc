"""Multiple choice by likelihood, for files like MMLU's: a question, its choices, and which of them is right."""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase as LETTERS
from typing import NamedTuple

import numpy as np

from fedmezo_jax.data.examples import Example
from fedmezo_jax.data.files import Record
from fedmezo_jax.errors import UserError


class Question(NamedTuple):
    """A multiple-choice question.

    Attributes:
        text: what is asked.
        choices: the answers to choose from, 2 to 26.
        answer: index of the right one.
        category: its subject; empty where the data have none.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    category: str


def question(record: Record) -> Question:
    """The question in one row with `question`, `choices` and `answer`, and perhaps `subject` or `category`.

    The answer is an index from 0, a letter, or the right choice word for word.

    Raises:
        UserError: a field is missing or holds something else, with the row.
    """
    row, where = record.value, record.where
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a row must be an object with question, choices and answer")
    if lacking := [name for name in ("question", "choices", "answer") if row.get(name) is None]:
        how = "null" if all(name in row for name in lacking) else "missing"
        raise UserError(f"{where}: the field {' and '.join(lacking)} is {how}; multiple choice needs it")
    text, choices, answer = row["question"], row["choices"], row["answer"]
    if not isinstance(text, str):
        raise UserError(f"{where}: question must be text")
    if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices) or not 2 <= len(choices) <= 26:
        raise UserError(f"{where}: choices must be a list of 2 to 26 texts")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str):
        if answer in choices:
            answer = choices.index(answer)
        elif len(answer.strip()) == 1 and answer.strip() in letters:
            answer = letters.index(answer.strip())
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise UserError(
            f"{where}: answer must be an index from 0 to {len(choices) - 1}, a letter from A to {letters[-1]}, "
            f"or one of the choices, not {answer!r}"
        )
    category = row.get("subject") or row.get("category") or ""
    return Question(text, tuple(choices), answer, str(category))


def candidates(question: Question) -> list[Example]:
    """One example a choice: the question with its choices listed by letter, answered with that choice's letter."""
    listed = "\n".join([question.text, *map("{}. {}".format, LETTERS, question.choices)])
    return [
        Example(listed, "", letter, question.category) for letter, _ in zip(LETTERS, question.choices, strict=False)
    ]


def accuracy(questions: Sequence[Question], losses: np.ndarray) -> float:
    """Share of questions whose right choice is the likeliest; a tie goes to the first.

    Args:
        questions: [n].
        losses: negative log-likelihood of every candidate, those of the first question first, [sum of choices].
    """
    ends = np.cumsum([len(one.choices) for one in questions])
    picked = [int(np.argmin(some)) for some in np.split(losses, ends[:-1])]
    return float(np.mean([pick == one.answer for pick, one in zip(picked, questions, strict=True)]))
