"""Each party's own examples, from a file of its own; and the files of a simulated run, dealt out.

A party's file holds what JSON lines of instructions or chats hold (``docs/data.md``), under the usual names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedmezo_jax.data.buckets import Width, lengths
from fedmezo_jax.data.examples import Chat, Example, TokenBatch
from fedmezo_jax.data.table import data_named, deal, tabulate
from fedmezo_jax.deploy.agreement import blank_examples
from fedmezo_jax.deploy.envelopes import Enrolment, Plan
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.model import Base
from fedmezo_jax.llama.registry import cache_folder
from fedmezo_jax.llama.task import LlamaTask
from fedmezo_jax.run.automatic_rate import VALIDATION
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.prepare import (
    Examples,
    OpenModel,
    check_tokens,
    from_hidden_states,
    open_model,
    resolve_defaults,
    spare,
    step_widths,
    table_of,
    task_of,
)

TEST, VALIDATION_FILE = "test.jsonl", "validation.jsonl"


def read_rows(config: RunConfig, model: OpenModel, file: Path) -> TokenBatch:
    """All examples of a file as rows of tokens.

    Raises:
        UserError: the file cannot be read or tokenised.
    """
    settings = {"style": config.prompt_style, "max_length": config.max_length, "overlong": config.overlong}
    rows = tabulate(
        str(file),
        model.tokenizer,
        data_dir=None,
        fields="",
        test_examples=0,
        seed=config.seed,
        cache=cache_folder() / "tokens",
        **settings,
    ).rows
    check_tokens(rows, model.llama, model.folder)
    return rows


def shape_of(*tables: TokenBatch) -> Width:
    """The shape that holds the rows of all tables."""
    return Width(max(rows.tokens.shape[-1] for rows in tables), max(rows.labels.shape[-1] for rows in tables))


def widened(rows: TokenBatch, shape: Width, padding: int) -> TokenBatch:
    """The rows in a table of another shape, padded as :func:`encode.encode` pads.

    Raises:
        UserError: the table is too narrow.
    """
    missing = [size - leaf.shape[-1] for size, leaf in zip(shape, (rows.tokens, rows.labels), strict=True)]
    if min(missing) < 0:
        raise UserError(f"the examples need a table of {shape_of(rows)}, and {shape} was agreed on")
    tokens = np.pad(rows.tokens, [(0, 0), (0, missing[0])], constant_values=padding)
    return TokenBatch(tokens, *(np.pad(leaf, [(0, 0), (0, missing[1])]) for leaf in rows[1:]))


@dataclass(frozen=True, eq=False)
class OwnExamples:
    """A party's model and examples, before it is known what the others have.

    Attributes:
        config: the run's, settled.
        model: the model.
        base: its weights from the first trained layer on.
        base_hash: names all its weights.
        tables: the rows of each of its files; none of a file that it does not have.
    """

    config: RunConfig
    model: OpenModel
    base: Base
    base_hash: str
    tables: Sequence[TokenBatch]

    def task(self, examples: Examples, group_size: int, used: np.ndarray, notify: Callable[[str], None]) -> LlamaTask:
        """The task on these examples, of which some are trained on here, by so many clients at once."""
        task = replace(task_of(self.config, self.model, self.base, self.base_hash, examples), group_size=group_size)
        return from_hidden_states(self.config, task, self.model, lambda: used, notify)

    def widened(self, rows: TokenBatch, shape: Width) -> TokenBatch:
        """Rows of its own in the table that was agreed on."""
        tokenizer = self.model.tokenizer
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return widened(rows, shape, padding)


def read_own(config: RunConfig, files: Iterable[Path], model: str | None = None) -> OwnExamples:
    """A party's model and examples.

    Args:
        config: the run's.
        files: a client's one, or the server's test and validation files.
        model: the model as it is called on this machine; by default as the run calls it.

    Raises:
        UserError: the model or a file cannot be read, or they do not fit together.
    """
    here = resolve_defaults(config if model is None else replace(config, model=model))
    settled, opened = replace(here, model=config.model), open_model(here)
    tables = [read_rows(settled, opened, file) for file in files]
    return OwnExamples(settled, opened, *opened.load(), tables)


def client_task(own: OwnExamples, client: int, plan: Plan, notify: Callable[[str], None]) -> LlamaTask:
    """A client's task: its own examples, and neither test examples nor other clients'.

    Raises:
        UserError: no run with these options has such a plan, or the examples do not fit it.
    """
    most, together = own.config.max_length, max(2, own.config.participants)
    if plan.shape.tokens > most or plan.shape.labels > most + 8 or not 1 <= plan.at_once <= together:
        raise UserError(
            f"the server's plan has a table of {plan.shape} and {plan.at_once} clients at once, and --max-length "
            f"{most} and the round allow no more than {together} of them and {most} tokens"
        )
    (rows,) = own.tables
    train = own.widened(rows, plan.shape)
    nothing = TokenBatch(*(leaf[:0] for leaf in train))
    all_of_them, none = np.arange(len(train.tokens)), np.arange(0)
    parts = [all_of_them if i == client else none for i in range(own.config.clients)]
    return own.task(Examples(train, nothing, nothing, parts, plan.widths), plan.at_once, all_of_them, notify)


def server_task(own: OwnExamples, enrolments: list[Enrolment], notify: Callable[[str], None]) -> LlamaTask:
    """The server's task: test and validation examples of its own, and blanks for the clients'."""
    shape = shape_of(*own.tables)
    shape = Width(*(max(sizes) for sizes in zip(shape, *(each.shape for each in enrolments), strict=True)))
    test, *rest = (own.widened(rows, shape) for rows in own.tables)
    validation = rest[0] if rest else TokenBatch(*(leaf[:0] for leaf in test))
    train, parts = blank_examples(enrolments, shape)
    examples = Examples(train, validation, test, parts, step_widths(own.config, train))
    return own.task(examples, own.config.participants, np.arange(0), notify)


def write_examples(file: Path, examples: Iterable[Example | Chat]) -> None:
    """Writes examples as JSON lines."""
    file.write_text("".join(json.dumps(_record(example)) + "\n" for example in examples), encoding="utf-8")


def _record(example: Example | Chat) -> dict[str, object]:
    if isinstance(example, Chat):
        return {"messages": [turn._asdict() for turn in example.messages], "category": example.category}
    return dict(zip(("instruction", "input", "output", "category"), example, strict=True))


def deal_out(config: RunConfig, folder: Path) -> None:
    """Writes each party's file of a simulated run: ``client-0.jsonl`` and so on, and the server's.

    Raises:
        UserError: model or data cannot be read, or the partition does not fit.
    """
    config = resolve_defaults(config)
    table = table_of(config, config.seed, open_model(config).tokenizer)
    kept, spared = spare(table.train, VALIDATION if config.learning_rate == "auto" else 0)
    chosen, rows = [table.examples[i] for i in kept], TokenBatch(*(leaf[kept] for leaf in table.rows))
    with data_named(config.data):
        how = (config.clients, config.dirichlet_alpha, config.seed)
        parts, _ = deal(config.partition, chosen, lengths(rows), *how)
    folder.mkdir(parents=True, exist_ok=True)
    for client, part in enumerate(parts):
        write_examples(folder / f"client-{client}.jsonl", [chosen[i] for i in part])
    write_examples(folder / TEST, [table.examples[i] for i in table.test])
    if len(spared):
        write_examples(folder / VALIDATION_FILE, [table.examples[i] for i in spared])
