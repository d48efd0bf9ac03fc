"""Loads a data set by name, tokenises it, splits it into training and test, and partitions it over clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from fedmezo_jax.data import partition
from fedmezo_jax.data.clusters import clusters
from fedmezo_jax.data.encode import Overlong, encode
from fedmezo_jax.data.examples import Chat, Example, TokenBatch
from fedmezo_jax.data.partition import Partition
from fedmezo_jax.data.prompts import Style
from fedmezo_jax.data.records import parse_fields
from fedmezo_jax.data.sources import load
from fedmezo_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PartitionKind: TypeAlias = Literal["iid", "dirichlet", "meta", "quantity", "length", "clusters"]


class Table(NamedTuple):
    """A data set, tokenised and split.

    Attributes:
        examples: the text of each example in ``rows``, [N].
        rows: all examples, tokenised.
        train: indices of the training examples, ascending.
        test: indices of the held-out examples, ascending.
        skipped: number of examples left out for their length.
        truncated: number of examples that lost their end.
    """

    examples: list[Example] | list[Chat]
    rows: TokenBatch
    train: np.ndarray
    test: np.ndarray
    skipped: int
    truncated: int


def tabulate(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    data_dir: str | None,
    fields: str,
    style: Style,
    max_length: int,
    overlong: Overlong,
    test_examples: int,
    seed: int,
    cache: Path | None = None,
) -> Table:
    """Loads, tokenises and splits a data set; the same arguments give the same tokens and split.

    Args:
        name: as for :func:`sources.load`.
        tokenizer: the model's tokenizer.
        data_dir: folder with local copies, or None.
        fields: a field map as on the command line, or "".
        style: style of the prompt.
        max_length: most tokens in an example.
        overlong: whether longer examples are skipped or truncated.
        test_examples: examples to hold out, in proportion from each category; 0 takes all examples as test examples.
        seed: seed of generated data and of the split.
        cache: folder in which tokens are kept between runs.

    Raises:
        UserError: the data cannot be loaded, tokenised or split.
    """
    examples = load(name, data_dir=data_dir, fields=parse_fields(fields), seed=seed)
    encoded = encode(
        examples, tokenizer, max_length, style=style, overlong=overlong, cache=cache, source=f"--data {name}"
    )
    kept_examples = [examples[i] for i in encoded.kept]
    if test_examples:
        with data_named(name):
            train, test = partition.hold_out(
                len(kept_examples), test_examples, seed, [example.category for example in kept_examples]
            )
    else:
        train, test = np.arange(0), np.arange(len(kept_examples))
    return Table(kept_examples, encoded.rows, train, test, encoded.skipped, encoded.truncated)  # pyright: ignore[reportArgumentType]


@contextmanager
def data_named(name: str) -> Iterator[None]:
    """Prefixes the error messages of the block with the name of the data set."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--data {name}: {error}") from None


def deal(
    kind: PartitionKind,
    examples: Sequence[Example] | Sequence[Chat],
    lengths: np.ndarray,
    clients: int,
    alpha: float,
    seed: int,
) -> tuple[Partition, list[str]]:
    """Partitions examples over clients, and returns the class of each example.

    Args:
        kind: iid (at random), dirichlet (shares of each category), meta (whole categories), quantity (at random in
            unequal sizes), length (similar lengths), clusters (Dirichlet shares of clusters of similar texts).
        examples: the examples, [n].
        lengths: tokens of each example, [n].
        clients: number of clients.
        alpha: concentration of the Dirichlet shares, of categories, clusters or sizes.
        seed: seed of the draw.

    Returns:
        The partition and the class of each example, [n]: its length for ``length``, its cluster for ``clusters``, and
        else its category, or its length if the data have no categories.

    Raises:
        UserError: the kind does not fit the data, or there are more clients than examples.
    """
    categories = [example.category for example in examples]
    classes = categories if any(categories) else partition.length_classes(lengths)
    if kind == "iid":
        return partition.iid(len(categories), clients, seed), classes
    if kind == "quantity":
        return partition.quantity(len(categories), clients, alpha, seed), classes
    if kind == "length":
        return partition.by_length(lengths, clients, seed), partition.length_classes(lengths)
    if kind == "clusters":
        classes = clusters([_request_text(example) for example in examples], seed)
        return partition.dirichlet(classes, clients, alpha, seed), classes
    if kind == "meta":
        return partition.meta(categories, clients, seed), categories
    return partition.dirichlet(categories, clients, alpha, seed), categories


def _request_text(example: Example | Chat) -> str:
    """The text of an example without the response."""
    if isinstance(example, Example):
        return f"{example.instruction}\n{example.input}"
    return "\n".join(message.content for message in example.messages if message.role == "user")
