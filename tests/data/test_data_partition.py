from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_jax.data.examples import Chat, Example, Message
from fedmezo_jax.data.partition import (
    by_length,
    category_distances,
    dirichlet,
    heterogeneity,
    hold_out,
    iid,
    length_classes,
    meta,
    quantity,
)
from fedmezo_jax.data.table import deal
from fedmezo_jax.errors import UserError

seeds = st.integers(0, 2**32)
alphas = st.one_of(st.floats(1e-300, 1.7e308), st.just(1.7e308))


@st.composite
def rows_and_clients(draw):
    categories = draw(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60))
    return categories, draw(st.integers(1, len(categories)))


def partitions(categories, clients, alpha, seed):
    return {
        "iid": iid(len(categories), clients, seed),
        "dirichlet": dirichlet(categories, clients, alpha, seed),
        "meta": meta(categories, clients, seed),
        "quantity": quantity(len(categories), clients, alpha, seed),
        "length": by_length([ord(category) for category in categories], clients, seed),
    }


@given(rows_and_clients(), alphas, seeds)
def test_every_partitioner_gives_every_row_to_exactly_one_client_and_leaves_no_client_empty(case, alpha, seed):
    categories, clients = case
    for parts in partitions(categories, clients, alpha, seed).values():
        assert len(parts) == clients
        assert all(len(part) > 0 for part in parts)
        assert all((np.diff(part) > 0).all() and np.issubdtype(part.dtype, np.integer) for part in parts)
        assert sorted(np.concatenate(parts)) == list(range(len(categories)))


@given(rows_and_clients(), alphas, seeds)
def test_every_partitioner_is_a_function_of_its_arguments(case, alpha, seed):
    first, second = (partitions(*case, alpha, seed) for _ in range(2))
    for name in first:
        assert [part.tolist() for part in first[name]] == [part.tolist() for part in second[name]]


def test_the_seed_matters():
    categories = list("abcdefgh") * 20
    for name in ("iid", "dirichlet", "meta", "quantity", "length"):
        drawn = {str([part.tolist() for part in partitions(categories, 4, 0.5, seed)[name]]) for seed in range(8)}
        assert len(drawn) > 4


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), seeds)
def test_iid_sizes_differ_by_at_most_one(case, seed):
    sizes = [len(part) for part in iid(*case, seed)]
    assert max(sizes) - min(sizes) <= 1


@given(rows_and_clients(), seeds)
def test_meta_deals_whole_categories_or_gives_each_client_a_single_one(case, seed):
    categories, clients = case
    held = [{categories[row] for row in part} for part in meta(categories, clients, seed)]
    if len(set(categories)) >= clients:
        assert sum(map(len, held)) == len(set(categories))  # no category on two clients
        assert max(map(len, held)) - min(map(len, held)) <= 1
    else:
        assert all(len(kinds) == 1 for kinds in held)


def test_meta_gives_large_categories_more_clients():
    categories = ["large"] * 80 + ["small"] * 20
    parts = meta(categories, 5, 0)
    assert sorted(len(part) for part in parts) == [20, 20, 20, 20, 20]


CATEGORIES = [f"category {i}" for i in range(10) for _ in range(300)]


def test_a_large_alpha_approaches_iid_and_a_small_one_a_category_on_one_client():
    def mean(alpha):
        return np.mean([heterogeneity(dirichlet(CATEGORIES, 6, alpha, seed), CATEGORIES) for seed in range(5)])

    measured = [mean(alpha) for alpha in (1e-3, 0.1, 0.5, 5.0, 1e6)]
    assert measured == sorted(measured, reverse=True)
    assert measured[-1] < 0.01
    # In the limit each category lies whole on one client; a client with k of ten equal categories is at 1 - k/10.
    assert measured[0] > 0.7
    assert mean(1.7e308) < 0.01  # sums of larger gamma draws than this overflow
    for part in dirichlet(CATEGORIES, 6, 1e6, 0):
        counts = np.unique([CATEGORIES[row] for row in part], return_counts=True)[1]
        assert counts.tolist() == [50] * 10


def test_dirichlet_proportions_have_the_moments_of_the_distribution():
    # p_1 of Dirichlet(a, ..., a) over K clients: mean 1/K, variance (K-1) / (K^2 (K a + 1)).
    clients, alpha = 4, 0.5
    categories = [f"{i:04d}" for i in range(1000) for _ in range(100)]
    parts = dirichlet(categories, clients, alpha, 0)
    shares = np.bincount([int(categories[row]) for row in parts[0]], minlength=1000) / 100
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert abs(shares.mean() - 1 / clients) < 4 * np.sqrt(variance / 1000)
    assert abs(shares.var() / variance - 1) < 0.2


def test_quantity_shares_have_the_moments_of_the_distribution_and_its_parts_are_random_draws():
    # p_1 of Dirichlet(a, ..., a) over K clients: mean 1/K, variance (K-1) / (K^2 (K a + 1)).
    clients, alpha, n = 4, 0.5, 400
    parts = [quantity(n, clients, alpha, seed) for seed in range(1000)]
    shares = np.array([len(part[0]) / n for part in parts])
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert abs(shares.mean() - 1 / clients) < 4 * np.sqrt(variance / 1000)
    assert abs(shares.var() / variance - 1) < 0.2
    # Each part is spread over the rows: the mean of its indices is that of all, to within its standard error.
    scores = [(part[0].mean() - (n - 1) / 2) / (n / np.sqrt(12 * len(part[0]))) for part in parts if len(part[0]) > 20]
    assert abs(np.mean(scores)) < 5 / np.sqrt(len(scores))
    assert [len(part) for part in quantity(n, clients, 1e9, 0)] == [100] * 4


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80).flatmap(
    lambda rows: st.tuples(st.just(rows), st.integers(1, len(rows)))
), seeds)  # fmt: skip
def test_by_length_gives_each_client_a_stretch_of_lengths_and_equal_sizes(case, seed):
    lengths, clients = case
    parts = by_length(lengths, clients, seed)
    held = sorted(([lengths[row] for row in part] for part in parts), key=lambda part: (min(part), max(part)))
    assert all(max(first) <= min(second) for first, second in pairwise(held))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_length_classes_are_quarters_by_hand():
    assert length_classes([8, 9, 10, 11, 12, 90, 91, 100]) == [
        *["  8-  9 tokens"] * 2,
        *[" 10- 11 tokens"] * 2,
        *[" 12- 90 tokens"] * 2,
        *[" 91-100 tokens"] * 2,
    ]
    assert length_classes([7, 7, 7, 7, 9]) == ["7-7 tokens"] * 4 + ["9-9 tokens"]
    assert length_classes([5]) == ["5-5 tokens"]


def rows(categories):
    """Examples in two vocabularies, alternating."""
    words = ("oven flour butter sugar", "mast wind harbour rope")
    return [Example(words[i % 2], "", "x", category) for i, category in enumerate(categories)]


LENGTHS = np.arange(80) % 40 + 10


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "meta", "quantity"])
def test_dealing_goes_by_the_categories_of_the_data(kind):
    categories = ["a", "b", "c", "d"] * 20
    parts, classes = deal(kind, rows(categories), LENGTHS, 4, 0.1, 0)
    assert classes == categories
    assert sorted(np.concatenate(parts)) == list(range(80))
    expected = {"iid": (0, 0.3), "quantity": (0, 0.5), "dirichlet": (0.3, 1), "meta": (0.75, 0.75)}[kind]
    assert expected[0] <= heterogeneity(parts, classes) <= expected[1]


@pytest.mark.parametrize("kind", ["iid", "quantity", "length", "clusters"])
def test_data_without_categories_are_told_apart_by_length_or_by_words(kind):
    parts, classes = deal(kind, rows([""] * 80), LENGTHS, 4, 0.05, 0)
    assert sorted(np.concatenate(parts)) == list(range(80))
    if kind == "clusters":
        assert [len(set(classes[i::2])) for i in (0, 1)] == [1, 1]  # a cluster for each vocabulary
        assert len(set(classes)) == 2
        assert heterogeneity(parts, classes) > 0.2
    else:
        assert classes == length_classes(LENGTHS)
        assert (heterogeneity(parts, classes) == 0.75) == (kind == "length")  # each client has one quarter alone


def test_the_length_partition_goes_by_length_even_where_there_are_categories():
    parts, classes = deal("length", rows(["a", "b"] * 40), LENGTHS, 4, 0.5, 0)
    assert classes == length_classes(LENGTHS)
    assert heterogeneity(parts, classes) == 0.75


def test_chats_form_clusters_by_what_the_user_says():
    chats = [
        Chat((Message("user", example.instruction), Message("assistant", "same words for all of them")), "")
        for example in rows([""] * 80)
    ]
    assert deal("clusters", chats, LENGTHS, 4, 0.5, 0)[1] == deal("clusters", rows([""] * 80), LENGTHS, 4, 0.5, 0)[1]


def test_heterogeneity_by_hand():
    categories = ["a", "a", "b", "b"]
    assert heterogeneity([np.array([0, 2]), np.array([1, 3])], categories) == 0
    assert heterogeneity([np.array([0, 1]), np.array([2, 3])], categories) == 0.5
    assert heterogeneity([np.array([0]), np.array([1, 2, 3])], categories) == pytest.approx((1 / 2 + 1 / 6) / 2)


@given(
    st.lists(st.sampled_from("abcd"), min_size=2, max_size=80).flatmap(
        lambda rows: st.tuples(st.just(rows), st.integers(1, len(rows) - 1))
    ),
    seeds,
    st.booleans(),
)
def test_hold_out_splits_exactly_and_by_category_to_within_one_row(case, seed, stratified):
    categories, test_examples = case
    train, test = hold_out(len(categories), test_examples, seed, categories if stratified else None)
    assert len(test) == test_examples
    assert sorted([*train, *test]) == list(range(len(categories)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    if stratified:
        for category in set(categories):
            due = test_examples * categories.count(category) / len(categories)
            assert abs(sum(categories[row] == category for row in test) - due) < 1 + 1e-9


def test_hold_out_draws_other_rows_with_another_seed():
    assert len({str(hold_out(100, 10, seed)[1]) for seed in range(10)}) == 10


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: iid(3, 4, 0), "4 clients but only 3 rows"),
        (lambda: iid(3, 0, 0), "at least one client"),
        (lambda: dirichlet(["a"] * 3, 4, 0.5, 0), "4 clients but only 3 rows"),
        (lambda: meta(["a"] * 3, 4, 0), "4 clients but only 3 rows"),
        (lambda: dirichlet([""] * 9, 2, 0.5, 0), "no categories, which a Dirichlet partition needs"),
        (lambda: meta([""] * 9, 2, 0), "no categories, which a meta partition needs"),
        (lambda: quantity(3, 4, 0.5, 0), "4 clients but only 3 rows"),
        (lambda: by_length([7] * 3, 4, 0), "4 clients but only 3 rows"),
        (lambda: quantity(9, 2, 0.0, 0), "must be a positive number, not 0.0"),
        (lambda: dirichlet(["a"] * 9, 2, 0.0, 0), "must be a positive number, not 0.0"),
        (lambda: dirichlet(["a"] * 9, 2, float("nan"), 0), "must be a positive number, not nan"),
        (lambda: dirichlet(["a"] * 9, 2, float("inf"), 0), "must be a positive number, not inf"),
        (lambda: iid(9, 2, -1), "seed must be 0 or larger, not -1"),
        (lambda: hold_out(9, 9, 0), "9 test examples of 9"),
        (lambda: hold_out(9, 0, 0), "0 test examples of 9"),
    ],
)
def test_bad_input_gets_one_clear_line(call, words):
    with pytest.raises(UserError) as caught:
        call()
    assert words in str(caught.value)


def test_category_distances_by_hand():
    categories = ["a"] * 4 + ["b"] * 4
    parts = [np.array([0, 1]), np.array([4, 5, 6]), np.array([2, 3, 7])]
    assert category_distances(parts, categories).tolist() == pytest.approx([0.5, 0.5, 2 / 3 - 0.5])
