"""From a data set's name to tokenised rows, split into training and test, and dealt to clients."""

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
        examples: what each row was made from, [N].
        rows: all rows.
        train: indices of the training rows, ascending.
        test: indices of the held-out rows, ascending.
        skipped: number of examples left out for their length.
        truncated: number of rows that lost their end.
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
    """Loads, tokenises and splits a data set; the same arguments give the same rows and the same split.

    Args:
        name: as for :func:`sources.load`.
        tokenizer: of the model.
        data_dir: folder with local copies, or None.
        fields: a field map as on the command line, or "".
        style: style of the prompt.
        max_length: most tokens in a row.
        overlong: whether longer ones are skipped or truncated.
        test_examples: examples held out, their share of each category; 0 for all rows.
        seed: seed of generated data and of the split.
        cache: folder for tokens kept from one run to the next.

    Raises:
        UserError: anything about the data that does not fit.
    """
    examples = load(name, data_dir=data_dir, fields=parse_fields(fields), seed=seed)
    encoded = encode(
        examples, tokenizer, max_length, style=style, overlong=overlong, cache=cache, source=f"--data {name}"
    )
    kept = [examples[i] for i in encoded.kept]
    if test_examples:
        with data_named(name):
            train, test = partition.hold_out(len(kept), test_examples, seed, [example.category for example in kept])
    else:
        train, test = np.arange(0), np.arange(len(kept))
    return Table(kept, encoded.rows, train, test, encoded.skipped, encoded.truncated)  # pyright: ignore[reportArgumentType]


@contextmanager
def data_named(name: str) -> Iterator[None]:
    """Puts the name of a data set before the error messages of the block."""
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
    """Deals rows to clients, and says by which classes they may be told apart.

    Args:
        kind: iid (at random), dirichlet (shares of each category), meta (whole categories), quantity (at random in
            unequal sizes), length (a stretch of lengths each), clusters (Dirichlet shares of clusters of like texts).
        examples: what each row was made from, [n].
        lengths: tokens of each row, [n].
        clients: number of clients.
        alpha: concentration of the Dirichlet shares, of categories, clusters or sizes.
        seed: seed of the deal.

    Returns:
        The partition and the class of each row, [n]: its length for `length`, its cluster for `clusters`, and else its
        category, or its length where the data have no categories.

    Raises:
        UserError: the kind does not fit the data, or there are more clients than rows.
    """
    given = [example.category for example in examples]
    classes = given if any(given) else partition.length_classes(lengths)
    if kind == "iid":
        return partition.iid(len(given), clients, seed), classes
    if kind == "quantity":
        return partition.quantity(len(given), clients, alpha, seed), classes
    if kind == "length":
        return partition.by_length(lengths, clients, seed), partition.length_classes(lengths)
    if kind == "clusters":
        classes = clusters([_asked(example) for example in examples], seed)
        return partition.dirichlet(classes, clients, alpha, seed), classes
    if kind == "meta":
        return partition.meta(given, clients, seed), given
    return partition.dirichlet(given, clients, alpha, seed), given


def _asked(example: Example | Chat) -> str:
    """What an example is about, in its own words."""
    if isinstance(example, Example):
        return f"{example.instruction}\n{example.input}"
    return "\n".join(message.content for message in example.messages if message.role == "user")
