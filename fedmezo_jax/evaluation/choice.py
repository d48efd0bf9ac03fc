"""Multiple choice by likelihood, for data such as MMLU: a question, its choices, and the right one."""

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
        text: the question.
        choices: the answers to choose from, 2 to 26.
        answer: index of the right choice.
        category: its subject; empty if the data have none.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    category: str


def question(record: Record) -> Question:
    """Returns the question in a record with ``question``, ``choices`` and ``answer``.

    The answer is an index from 0, a letter, or the text of the right choice. ``subject`` or ``category`` is optional.

    Raises:
        UserError: a field is missing or has another type; the message names the row.
    """
    row, where = record.value, record.where
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a row must be an object with question, choices and answer")
    if lacking := [name for name in ("question", "choices", "answer") if row.get(name) is None]:
        fault = "null" if all(name in row for name in lacking) else "missing"
        raise UserError(f"{where}: the field {' and '.join(lacking)} is {fault}; multiple choice needs it")
    text, choices, answer = row["question"], row["choices"], row["answer"]
    if not isinstance(text, str):
        raise UserError(f"{where}: question must be text")
    if (
        not isinstance(choices, list)
        or not all(isinstance(choice, str) for choice in choices)
        or not 2 <= len(choices) <= 26
    ):
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
    """Returns one example per choice: the question with lettered choices, answered with this choice's letter."""
    prompt = "\n".join([question.text, *map("{}. {}".format, LETTERS, question.choices)])
    return [
        Example(prompt, "", letter, question.category) for letter, _ in zip(LETTERS, question.choices, strict=False)
    ]


def accuracy(questions: Sequence[Question], losses: np.ndarray) -> float:
    """Returns the share of questions whose right choice is the most likely one; the first choice wins a tie.

    Args:
        questions: [n].
        losses: negative log-likelihood of every candidate, question by question, [sum of choices].
    """
    ends = np.cumsum([len(question.choices) for question in questions])
    predictions = [int(np.argmin(choice_losses)) for choice_losses in np.split(losses, ends[:-1])]
    return float(
        np.mean([prediction == question.answer for prediction, question in zip(predictions, questions, strict=True)])
    )
