import os
import subprocess
import sys

import numpy as np
import pytest

from fedmezo_jax.data.clusters import clusters
from fedmezo_jax.errors import UserError

PIPED = {"stdout": subprocess.PIPE, "text": True, "check": True}
TOPICS = {
    "cooking": ["oven", "flour", "butter", "sugar", "bake", "dough", "recipe", "pan"],
    "sailing": ["mast", "wind", "harbour", "rope", "sail", "anchor", "deck", "tide"],
    "algebra": ["matrix", "vector", "kernel", "basis", "proof", "lemma", "field", "ring"],
}


def texts(count=60):
    """Texts of three vocabularies that share only everyday words, and the topic of each."""
    draw = np.random.default_rng(0)
    topics = [topic for topic in TOPICS for _ in range(count)]
    return [f"How does the {' and the '.join(draw.permutation(TOPICS[topic])[:4])} work?" for topic in topics], topics


def test_texts_of_a_vocabulary_of_their_own_are_a_cluster():
    given, topics = texts()
    for seed in range(5):
        found = clusters(given, seed, count=3)
        assert len(set(zip(found, topics, strict=True))) == 3  # one cluster a topic
        assert len(set(found)) == 3
        for name, topic in set(zip(found, topics, strict=True)):
            assert set(name.split(", ")) <= set(TOPICS[topic])  # named by its own words


def test_clusters_are_a_function_of_texts_and_seed():
    given, _ = texts()
    assert clusters(given, 1) == clusters(given, 1)
    assert len({tuple(clusters(given, seed)) for seed in range(5)}) > 1
    shuffled = np.random.default_rng(1).permutation(len(given))
    topics = texts()[1]
    found = clusters([given[i] for i in shuffled], 0, count=3)
    assert len({(name, topics[i]) for name, i in zip(found, shuffled, strict=True)}) == 3


def test_texts_that_are_alike_or_empty_do_not_break_it():
    assert len(set(clusters(["one two words", "two words more"] * 10 + [""] * 10, 0))) >= 2


@pytest.mark.parametrize(
    ("given", "words"), [(["a b c"] * 3, "3 rows cannot form 8"), (["", "9"] * 9, "share no words")]
)
def test_texts_that_form_no_clusters_are_a_clear_error(given, words):
    with pytest.raises(UserError, match=words):
        clusters(given, 0)


def test_another_process_finds_the_same_clusters():
    given, _ = texts(20)
    program = f"from fedmezo_jax.data.clusters import clusters; print(clusters({given!r}, 3))"
    outputs = {
        subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, **PIPED).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{clusters(given, 3)}\n"}


def test_fewer_texts_that_differ_than_clusters_are_a_cluster_each():
    given = ["apples grow here", "pears grow there", "plums ripen late", "plums ripen soon"]
    found = clusters(given * 5, 0)
    assert [found.index(name) for name in found] == [0, 1, 2, 3] * 5
