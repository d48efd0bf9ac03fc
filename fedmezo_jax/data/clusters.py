"""Categories for data that have none: clusters of texts that share their words."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedmezo_jax.data.seeding import generator
from fedmezo_jax.errors import UserError

CLUSTERS = 8
"""The number of categories in Dolly-15k."""
_WORDS = 1024
_ITERATIONS = 25
_STARTS = 4


def clusters(texts: Sequence[str], seed: int, count: int = CLUSTERS) -> list[str]:
    """Clusters texts by their words; a cluster is named by its three most distinctive words: ``"eggs, dozen, bakes"``.

    K-means on TF-IDF: a text is a unit vector over words with weights (1 + log tf)·log(n/df). The words are the 1024
    that occur in most texts, without those in more than half of them.

    Args:
        texts: [n], n at least ``count``.
        seed: seed of the first centres, which k-means++ draws. The best of four starts is used.
        count: number of clusters. There are fewer where fewer texts differ or some clusters become empty.

    Returns:
        The name of each text's cluster, [n].

    Raises:
        UserError: there are fewer texts than clusters, or no two texts share a word.
    """
    from scipy.cluster.vq import kmeans2  # takes a while to import, and few runs need it

    if len(texts) < count:
        raise UserError(f"{len(texts)} rows cannot form {count} text clusters: choose another partition")
    words, vectors = _tf_idf(texts)
    count = min(count, len({vector.tobytes() for vector in vectors}))
    rng = generator(seed, "clusters")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        starts = [kmeans2(vectors, count, _ITERATIONS, minit="++", rng=rng) for _ in range(_STARTS)]
    centres, nearest = min(starts, key=lambda start: np.sum((vectors - start[0][start[1]]) ** 2, dtype=np.float64))
    mean = vectors.mean(axis=0)
    names = [", ".join(words[word] for word in np.argsort(mean - centre, kind="stable")[:3]) for centre in centres]
    return [names[i] for i in nearest]


def _tf_idf(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Returns the words and float32 unit vectors over them, [n, words]; a text with none of the words gets zeros."""
    word_counts = [Counter(re.findall(r"[^\W\d_]{3,}", text.lower())) for text in texts]
    frequency = Counter(word for counts in word_counts for word in counts)
    ranked_words = sorted(
        frequency.items(), key=lambda item: (-item[1], item[0])
    )  # ties by name, not by first occurrence
    words = [word for word, texts_with in ranked_words if 2 <= texts_with <= len(texts) / 2][:_WORDS]
    if not words:
        raise UserError("the texts share no words, so they form no clusters: choose another partition")
    column = {word: i for i, word in enumerate(words)}
    vectors = np.zeros((len(texts), len(words)), np.float32)
    for vector, counts in zip(vectors, word_counts, strict=True):
        columns_and_counts = [(column[word], count) for word, count in counts.items() if word in column]
        if columns_and_counts:
            columns, counts_there = np.array(columns_and_counts).T
            vector[columns] = 1 + np.log(counts_there)
    vectors *= np.log(len(texts) / np.array([frequency[word] for word in words], np.float32))
    return words, vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
