"""Partitions of the examples over clients (random, by category, quantity or length), and how much the clients differ.

A partition is a list with one sorted int64 array of example indices per client. Every example belongs to exactly one
client, and no client is empty.
"""

from collections.abc import Sequence

import numpy as np

from fedmezo_jax.data.seeding import generator
from fedmezo_jax.errors import UserError

Partition = list[np.ndarray]


def iid(n: int, clients: int, seed: int) -> Partition:
    """Splits ``n`` examples at random into parts whose sizes differ by at most one.

    Raises:
        UserError: fewer than one client, or more clients than examples.
    """
    _check_clients(n, clients)
    return [np.sort(part) for part in np.array_split(generator(seed, "partition iid").permutation(n), clients)]


def dirichlet(categories: Sequence[str], clients: int, alpha: float, seed: int) -> Partition:
    """Splits each category over the clients by proportions p ~ Dirichlet(alpha, ..., alpha) (arXiv 1909.06335).

    A small ``alpha`` gives a client few categories, a large one makes all clients alike. A client that would stay empty
    takes an example from the largest client.

    Args:
        categories: the category of each example, [n].
        clients: number of clients, at most n.
        alpha: concentration, positive.
        seed: seed of the draw.

    Raises:
        UserError: no categories, a concentration that is not positive and finite, or more clients than examples.
    """
    _check_clients(len(categories), clients)
    rng = generator(seed, "partition dirichlet")
    owner = np.empty(len(categories), np.int64)
    for rows in _rows_by_category(categories, "Dirichlet"):
        _deal(owner, rows, clients, alpha, rng)
    return _none_empty(owner, clients, rng)


def meta(categories: Sequence[str], clients: int, seed: int) -> Partition:
    """Assigns whole categories to the clients in turn, in random order.

    With more clients than categories every client has a single category. The number of clients of a category is
    proportional to its examples (method of highest averages), which are split evenly among these clients.

    Args:
        categories: the category of each example, [n].
        clients: number of clients, at most n.
        seed: seed of the draw.

    Raises:
        UserError: no categories, fewer than one client, or more clients than examples.
    """
    _check_clients(len(categories), clients)
    rng = generator(seed, "partition meta")
    groups = _rows_by_category(categories, "meta")
    rng.shuffle(groups)
    if len(groups) >= clients:
        return [np.sort(np.concatenate(groups[client::clients])) for client in range(clients)]
    sizes = np.array([len(group) for group in groups])
    shares = np.ones(len(groups), np.int64)
    for _ in range(clients - len(groups)):
        shares[np.argmax(sizes / shares)] += 1  # its examples per client are above one, as clients <= n
    return [
        np.sort(part)
        for group, share in zip(groups, shares, strict=True)
        for part in np.array_split(rng.permutation(group), share)
    ]


def quantity(n: int, clients: int, alpha: float, seed: int) -> Partition:
    """Splits examples at random into parts of unequal size, with shares p ~ Dirichlet(alpha, ..., alpha).

    Only the sizes differ (arXiv 2102.02079): each part is a random draw from all examples. A client that would stay
    empty takes an example from the largest client.

    Args:
        n: number of examples.
        clients: number of clients, at most n.
        alpha: concentration, positive; the smaller, the more unequal.
        seed: seed of the draw.

    Raises:
        UserError: a concentration that is not positive and finite, or more clients than examples.
    """
    _check_clients(n, clients)
    rng = generator(seed, "partition quantity")
    owner = np.empty(n, np.int64)
    _deal(owner, np.arange(n), clients, alpha, rng)
    return _none_empty(owner, clients, rng)


def by_length(lengths: Sequence[int] | np.ndarray, clients: int, seed: int) -> Partition:
    """Splits examples into equal parts by length, so that each client has examples of similar length.

    The seed decides which client gets which part, and how examples of equal length are split.

    Args:
        lengths: tokens of each example, [n].
        clients: number of clients, at most n.
        seed: seed of the draw.

    Raises:
        UserError: fewer than one client, or more clients than examples.
    """
    _check_clients(len(lengths), clients)
    rng = generator(seed, "partition length")
    order = rng.permutation(len(lengths))
    order = order[np.argsort(np.asarray(lengths)[order], kind="stable")]
    parts = np.array_split(order, clients)
    return [np.sort(parts[i]) for i in rng.permutation(clients)]


def length_classes(lengths: Sequence[int] | np.ndarray) -> list[str]:
    """Returns the quartile of each example's length as a category, [n], for example ``"80-122 tokens"``."""
    lengths = np.asarray(lengths)
    # Each quartile is the length of an example, and the last length of its class.
    bounds = np.unique(np.quantile(lengths, (0.25, 0.5, 0.75, 1), method="inverted_cdf"))
    lowest = [lengths.min(), *(lengths[lengths > bound].min() for bound in bounds[:-1])]
    digits = len(str(bounds[-1]))
    names = [f"{low:{digits}}-{high:{digits}} tokens" for low, high in zip(lowest, bounds, strict=True)]
    return [names[i] for i in np.searchsorted(bounds, lengths)]


def category_distances(parts: Partition, categories: Sequence[str]) -> np.ndarray:
    """Returns the total-variation distance 1/2 sum_c |p_i(c) - p(c)| of each client from all examples, [clients].

    p_i is the distribution of categories on client i and p the one over all examples.
    """
    _, codes = np.unique(np.asarray(categories), return_inverse=True)
    overall = np.bincount(codes) / len(codes)
    shares = np.array([np.bincount(codes[part], minlength=len(overall)) / len(part) for part in parts])
    return np.abs(shares - overall).sum(axis=1) / 2


def heterogeneity(parts: Partition, categories: Sequence[str]) -> float:
    """Returns the mean over clients of :func:`category_distances`.

    It is 0 if all clients are alike, and approaches 1 if each client has categories that are rare elsewhere.
    """
    return float(np.mean(category_distances(parts, categories)))


def hold_out(
    n: int, test_examples: int, seed: int, categories: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits range(n) into sorted train and test indices, with ``test_examples`` test indices.

    With ``categories`` [n] each category's share of the test examples is exact to within one example: the examples are
    shuffled, sorted by category, and the test examples are taken at even distances.

    Raises:
        UserError: no test example is asked for, or none would be left for training.
    """
    if not 1 <= test_examples < n:
        raise UserError(f"{test_examples} test examples of {n}: choose at least 1 and leave at least one for training")
    order = generator(seed, "hold out").permutation(n)
    if categories is not None:
        order = order[np.argsort(np.asarray(categories)[order], kind="stable")]
    picked = np.zeros(n, bool)
    picked[order[(2 * np.arange(test_examples) + 1) * n // (2 * test_examples)]] = True
    return np.flatnonzero(~picked), np.flatnonzero(picked)


def _deal(owner: np.ndarray, rows: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> None:
    """Sets the owners of the examples ``rows`` by proportions p ~ Dirichlet(alpha, ..., alpha)."""
    if not 0 < alpha < float("inf"):
        raise UserError(f"the Dirichlet alpha must be a positive number, not {alpha}")
    # Beyond 1e12 the proportions are equal to rounding; larger values would overflow numpy's gamma draws.
    proportions = rng.dirichlet(np.full(clients, min(alpha, 1e12)))
    cuts = np.rint(np.cumsum(proportions)[:-1] * len(rows)).astype(np.int64)
    for client, part in enumerate(np.split(rng.permutation(rows), cuts)):
        owner[part] = client


def _none_empty(owner: np.ndarray, clients: int, rng: np.random.Generator) -> Partition:
    sizes = np.bincount(owner, minlength=clients)
    for client in np.flatnonzero(sizes == 0):
        donor = int(np.argmax(sizes))
        owner[rng.choice(np.flatnonzero(owner == donor))] = client
        sizes[donor] -= 1
        sizes[client] = 1
    return [np.flatnonzero(owner == client) for client in range(clients)]


def _rows_by_category(categories: Sequence[str], kind: str) -> list[np.ndarray]:
    """The example indices of each category, in the order of the categories' names."""
    names, codes = np.unique(np.asarray(categories), return_inverse=True)
    if len(names) == 1 and names[0] == "":
        raise UserError(
            f"these data have no categories, which a {kind} partition needs: choose another one, e.g. iid or clusters"
        )
    return [np.flatnonzero(codes == code) for code in range(len(names))]


def _check_clients(n: int, clients: int) -> None:
    if clients < 1:
        raise UserError(f"at least one client is needed, not {clients}")
    if clients > n:
        raise UserError(f"{clients} clients but only {n} rows: every client needs at least one, choose fewer clients")
