"""A LLaMA's run from its configuration: the one file of ``run/`` that knows the model's wing.

:func:`prepare` loads model and data for a run, :func:`base_of_ledger` the model for a replay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fedmezo_jax.core import federated, mezo
from fedmezo_jax.core.random import init_key
from fedmezo_jax.core.task import Task
from fedmezo_jax.data.batches import TOKENS_AT_ONCE
from fedmezo_jax.data.buckets import Widths, lengths, packed_widths, widths
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.data.table import Table, data_named, deal, tabulate
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import leaves
from fedmezo_jax.llama.checkpoints.stored_base import StoredBase
from fedmezo_jax.llama.checkpoints.weights import sixteen_bit
from fedmezo_jax.llama.checks import check_ids
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import init_lora, lora_shapes, trained_layers
from fedmezo_jax.llama.model import Base, Llama
from fedmezo_jax.llama.precision import WARN_ABOVE, default_precision, expected_error
from fedmezo_jax.llama.quantised import held_as
from fedmezo_jax.llama.registry import cache_folder, load_tokenizer, resolve, resolve_local
from fedmezo_jax.llama.task import LlamaTask
from fedmezo_jax.llama.tokenizers.lazy import LazyTokenizer
from fedmezo_jax.parallel import sharding
from fedmezo_jax.run.automatic_rate import VALIDATION
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.config_parts import DataConfig, LoraConfig, ModelConfig
from fedmezo_jax.run.context import RunContext, round_examples


def prepare(
    config: RunConfig, mesh: Mesh | None = None, notify: Callable[[str], None] = lambda line: None
) -> RunContext[LlamaTask]:
    """Loads model and data and deals the rows to clients.

    Args:
        config: the run's.
        mesh: what to spread it over; the weights are read straight onto its devices.
        notify: called with a line about the progress of long work.

    Raises:
        UserError: anything about model, data, partition or mesh that does not fit.
    """
    config = resolve_defaults(config)
    model = open_model(config, mesh)
    table = table_of(config, config.seed, model.tokenizer)
    check_tokens(table.rows, model.llama, model.folder)
    kept, spared = spare(table.train, VALIDATION if config.learning_rate == "auto" else 0)
    train, validation, test = (
        TokenBatch(*(leaf[picked] for leaf in table.rows)) for picked in (kept, spared, table.test)
    )
    how = (config.clients, config.dirichlet_alpha, config.seed)
    with data_named(config.data):
        parts, categories = deal(config.partition, [table.examples[i] for i in kept], lengths(train), *how)

    examples = Examples(train, validation, test, parts, step_widths(config, train))
    task = task_of(config, model, *model.load(), examples, mesh)
    task = from_hidden_states(config, task, model, lambda: used_examples(config, task, mesh), notify)
    lora = sharding.replicate(mesh, task.init_params(init_key(config.seed)))
    return RunContext(config, task, lora, mesh, categories, table.skipped, table.truncated)


class OpenModel(NamedTuple):
    """A model before its weights are read.

    Attributes:
        folder: its files.
        llama: its configuration.
        trained: layers with an adapter; None means all.
        tokenizer: its own, opened when it is needed.
        stored: its weights, where they are stored.
    """

    folder: Path
    llama: LlamaConfig
    trained: tuple[int, ...] | None
    tokenizer: Any
    stored: StoredBase

    @property
    def first(self) -> int:
        """The first layer that the devices hold."""
        return self.trained[0] if self.trained else 0

    def load(self) -> tuple[Base, str]:
        """The weights from the first layer on, on the devices, and the hash of all."""
        return self.stored.load_from(self.first)


class Examples(NamedTuple):
    """The data of a task, see :class:`LlamaTask`.

    Attributes:
        train: training rows.
        validation: rows for the validation loss.
        test: test rows.
        parts: for each client the indices of its rows.
        widths: at which steps run.
    """

    train: TokenBatch
    validation: TokenBatch
    test: TokenBatch
    parts: list[np.ndarray]
    widths: Widths


def open_model(config: RunConfig, mesh: Mesh | None = None) -> OpenModel:
    """Finds the model of a configuration that is settled.

    Raises:
        UserError: there is none, or the configuration or the mesh does not fit it.
    """
    folder = resolve(config.model)
    llama = LlamaConfig.from_json(folder)
    sharding.check_mesh(mesh, llama)
    if config.max_length > llama.max_position_embeddings:
        raise UserError(
            f"--max-length {config.max_length}: the model takes {llama.max_position_embeddings} tokens at most"
        )
    assert config.precision
    stored = StoredBase(folder, llama, *held_as(config), sharding.base_sharding(mesh))
    return OpenModel(folder, llama, trained_layers(config.layers, llama), LazyTokenizer(folder, load_tokenizer), stored)


def task_of(
    config: RunConfig, model: OpenModel, base: Base, base_hash: str, examples: Examples, mesh: Mesh | None = None
) -> LlamaTask:
    """The task of a run on these examples, as tokens: see :func:`from_hidden_states`."""
    assert config.precision
    return LlamaTask(
        Llama(
            model.llama,
            config.lora_alpha / config.lora_rank,
            config.precision,
            eight_bit=config.eight_bit_products,
            trained=model.trained,
        ),
        base,
        base_hash,
        config.model,
        config.lora_rank,
        config.lora_alpha,
        config.target_names,
        *examples,
        config.batch_size,
        config.pack,
        -(-config.participants // (1 if mesh is None else mesh.shape[federated.CLIENTS])),
        jax.device_put if mesh is None else partial(sharding.replicate, mesh),
    )


def from_hidden_states(
    config: LoraConfig,
    task: LlamaTask,
    model: OpenModel,
    used: Callable[[], np.ndarray],
    notify: Callable[[str], None] = lambda line: None,
) -> LlamaTask:
    """The task from the first trained layer on, where there are others below, for the examples that are used.

    See :meth:`LlamaTask.from_hidden_states`.
    """
    if not model.first:
        return task
    return task.from_hidden_states(model.stored, cache_folder() / "hidden", used(), config.hidden_states, notify)


def step_widths(config: RunConfig, rows: TokenBatch) -> Widths:
    """At which widths the steps of a run with these examples go."""
    if not config.pack:
        return widths(rows, config.length_buckets)
    at_once = max(1, TOKENS_AT_ONCE // (config.batch_size * rows.tokens.shape[1]))
    return packed_widths(rows, config.batch_size, min(config.participants, at_once), config.length_buckets)


def resolve_defaults(config: RunConfig, notify: Callable[[str], None] = lambda notice: None) -> RunConfig:
    """The configuration with a precision, chosen for the model's stored weights and this device where none is given.

    Args:
        config: the run's.
        notify: called with what was chosen and why, where none was given.

    Raises:
        UserError: there is no such model, or its files do not fit together.
    """
    if config.precision:
        return config
    folder = resolve(config.model)
    sixteen = sixteen_bit(folder, LlamaConfig.from_json(folder)) if config.base is None else config.base != "float32"
    differentiated = config.algorithm == "fedmezo" and config.estimator != "two-point"
    precision, reason = default_precision(sixteen, differentiated)
    notify(f"precision {precision}: {reason}")
    return replace(config, precision=precision)


def precision_warnings(config: RunConfig) -> Iterator[str]:
    """What to say where the products of a LLaMA are likely too coarse for μ."""
    if config.estimator != "two-point":
        return  # a derivative's rounding is relative to the derivative
    if config.precision is None or (error := expected_error(config.precision, config.perturbation_scale)) <= WARN_ABOVE:
        return
    size = f"{error:.0%}" if error < 10 else "more than 1000%"
    yield (
        f"at --precision {config.precision}, --perturbation-scale {config.perturbation_scale:g} the projected gradient "
        f"is likely off by {size}: choose paired or float32, or measure it with experiments.benchmarks.precision"
    )


def used_examples(config: RunConfig, task: Task, mesh: Mesh | None = None) -> np.ndarray:
    """Indices of the training examples that this process's clients work on, sorted.

    Further attempts at a round and the check of the learning rate may need a few others.
    """
    used = np.zeros(len(task.train.labels), bool)
    for t in range(config.rounds):
        ids, picks = round_examples(config, task, t)
        used[picks[sharding.own_positions(mesh, len(ids))]] = True
        if used.all():
            break
    return np.flatnonzero(used)


def spare(train: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Training examples, and ``count`` evenly spaced ones that are kept from them (at most a quarter)."""
    places = np.linspace(0, len(train) - 1, min(count, max(1, len(train) // 4)) if count else 0).astype(int)
    return np.delete(train, places), train[places]


def table_of(config: DataConfig, seed: int, tokenizer: Any) -> Table:
    """The rows that these options mean, tokenised, and split by the seed (which also generates ``bundled``)."""
    return tabulate(
        config.data,
        tokenizer,
        data_dir=config.data_dir,
        fields=config.fields,
        style=config.prompt_style,
        max_length=config.max_length,
        overlong=config.overlong,
        test_examples=config.test_examples,
        seed=seed,
        cache=cache_folder() / "tokens",
    )


def check_tokens(rows: TokenBatch, llama: LlamaConfig, folder: Path) -> None:
    """Refuses rows with a token beyond the model's vocabulary.

    Padding with such a token, as many a tokenizer has been given, is harmless: no loss depends on it.
    """
    inside = np.arange(rows.tokens.shape[1]) < lengths(rows)[:, None]
    check_ids(int(np.max(rows.tokens, where=inside, initial=0)), llama, folder)


def base_of_ledger(
    file: Path, config: RunConfig, model: str | None
) -> tuple[LlamaConfig, str, Callable[[jax.Array], mezo.Params]]:
    """The base model of a ledger's run: its configuration, the hash of its weights, and how θ begins, from a key.

    Args:
        file: the ledger, for messages.
        config: the run's.
        model: the model, fetched where that is needed; None means the one that the run names, if it is here.

    Raises:
        UserError: it is not on this machine, or the ledger's adapter is larger than the model.
    """
    folder = _local_folder(file, config, model)
    llama = LlamaConfig.from_json(folder)
    _check_rank(config, llama, file)
    stored = StoredBase(folder, llama, *held_as(config))
    base_hash = stored.load_from(llama.num_hidden_layers)[1]
    return llama, base_hash, partial(_init_lora, config, llama)


def _init_lora(config: LoraConfig, llama: LlamaConfig, key: jax.Array) -> mezo.Params:
    return init_lora(key, llama, config.lora_rank, config.target_names, trained_layers(config.layers, llama))


def _local_folder(file: Path, config: ModelConfig, model: str | None) -> Path:
    """The folder of the base model. A ledger alone does not make this machine fetch anything."""
    if model is not None:
        return resolve(model)
    folder = resolve_local(config.model)
    if folder is None:
        raise UserError(
            f"{file}: its base model {config.model} is not on this machine: to fetch it, give --model {config.model}; "
            "or give --model FOLDER"
        )
    return folder


def _check_rank(config: LoraConfig, llama: LlamaConfig, file: Path) -> None:
    """Refuses an adapter that is larger than its base and than a gigabyte, before there is room made for it."""
    shapes = lora_shapes(llama, config.lora_rank, config.target_names, trained_layers(config.layers, llama))
    size = sum(math.prod(shape) for half in shapes.values() for shape in half.values())
    base = sum(map(math.prod, leaves(llama).values()))
    if size > max(base, 2**28):
        raise UserError(f"{file}: lora_rank {config.lora_rank} means {size:,} parameters, more than the model has")
