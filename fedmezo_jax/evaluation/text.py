"""How near generated texts are to given ones, for answers of any kind, such as code."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple


class Score(NamedTuple):
    """Means over a set of answers. White space counts as one space between words.

    Attributes:
        exact: share of texts that are the given one.
        similarity: twice the number of words that both have in the same order, over the words of both: 1 for equal
            texts (``difflib``, Ratcliff and Obershelp's matching).
        first_word: share of texts whose first word is that of the given one: whether the answer has its form.
        count: number of answers.
    """

    exact: float
    similarity: float
    first_word: float
    count: int


def score(texts: Sequence[str], given: Sequence[str]) -> Score:
    """Compares texts with given ones word by word.

    Args:
        texts: generated texts, [n].
        given: the given ones in the same order, [n].
    """
    pairs = [(text.split(), right.split()) for text, right in zip(texts, given, strict=True)]
    exact = sum(words == right for words, right in pairs)
    similarity = sum(SequenceMatcher(None, words, right, autojunk=False).ratio() for words, right in pairs)
    first_word = sum(words[:1] == right[:1] for words, right in pairs)
    return Score(exact / len(pairs), similarity / len(pairs), first_word / len(pairs), len(pairs))
