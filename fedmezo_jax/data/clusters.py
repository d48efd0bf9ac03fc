"""Categories for data that have none: clusters of texts that share their words."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedmezo_jax.data.seeding import generator
from fedmezo_jax.errors import UserError

CLUSTERS = 8
"""As many as Dolly-15k has categories."""
_WORDS = 1024
_ITERATIONS = 25
_STARTS = 4


def clusters(texts: Sequence[str], seed: int, count: int = CLUSTERS) -> list[str]:
    """The cluster of each text, named by the three words that tell it best from the rest: ``"eggs, dozen, bakes"``.

    Spherical k-means on TF-IDF (Dhillon and Modha 2001): a text is a unit vector over words with weights
    (1 + log tf)·log(n/df), a centre the unit vector along its texts' sum, and each text goes to the centre of the
    largest product. The words are the 1024 that occur in most texts, those in more than half of them left out.

    Args:
        texts: [n], n at least `count`.
        seed: seed of the first centres, drawn as k-means++ does; the best of four starts counts.
        count: number of clusters; fewer come out where some stay empty.

    Raises:
        UserError: fewer texts than clusters, or no two texts that share a word.
    """
    if len(texts) < count:
        raise UserError(f"{len(texts)} rows cannot form {count} text clusters: choose another partition")
    words, vectors = _tf_idf(texts)
    rng = generator(seed, "clusters")
    centres, nearest = max((_k_means(vectors, count, rng) for _ in range(_STARTS)), key=lambda found: found[2])[:2]
    mean = vectors.mean(axis=0)
    names = [", ".join(words[word] for word in np.argsort(mean - centre, kind="stable")[:3]) for centre in centres]
    return [names[i] for i in nearest]


def _k_means(vectors: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Centres [count, words], the nearest one of each vector [n], and the sum of their products, to be large."""
    centres = vectors[rng.integers(len(vectors))][None]
    while len(centres) < count:
        distance = np.clip(1 - (vectors @ centres.T).max(axis=1), 0, None)
        total = distance.sum()
        odds = distance / total if total > 0 else None
        centres = np.concatenate([centres, vectors[rng.choice(len(vectors), p=odds)][None]])
    nearest = np.full(len(vectors), -1)
    for _ in range(_ITERATIONS):
        before, nearest = nearest, np.argmax(vectors @ centres.T, axis=1)
        if (nearest == before).all():
            break
        for i in np.unique(nearest):  # the centre of an empty cluster stays where it is
            centres[i] = _unit(vectors[nearest == i].sum(axis=0)[None])[0]
    return centres, nearest, float(np.sum(vectors * centres[nearest], dtype=np.float64))


def _tf_idf(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Words, and float32 unit vectors over them, [n, words]; a text without any of the words is zero."""
    counted = [Counter(re.findall(r"[^\W\d_]{3,}", text.lower())) for text in texts]
    frequency = Counter(word for counts in counted for word in counts)
    ranked = sorted(frequency.items(), key=lambda item: (-item[1], item[0]))  # ties by name, not by first occurrence
    words = [word for word, texts_with in ranked if 2 <= texts_with <= len(texts) / 2][:_WORDS]
    if not words:
        raise UserError("the texts share no words, so they form no clusters: choose another partition")
    column = {word: i for i, word in enumerate(words)}
    vectors = np.zeros((len(texts), len(words)), np.float32)
    for row, counts in zip(vectors, counted, strict=True):
        known = [(column[word], count) for word, count in counts.items() if word in column]
        if known:
            at, count = np.array(known).T
            row[at] = 1 + np.log(count)
    vectors *= np.log(len(texts) / np.array([frequency[word] for word in words], np.float32))
    return words, _unit(vectors)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
