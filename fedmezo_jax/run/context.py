"""What a run works with: model, data, partition and the federated algorithm, put together from its configuration."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial

from fedmezo_jax.core import aggregation, client, federated, mezo, personalization
from fedmezo_jax.core.estimators import Estimator, ForwardGradient, TwoPoint
from fedmezo_jax.core.random import init_key
from fedmezo_jax.core.task import Task
from fedmezo_jax.core.tree_hash import tree_hash
from fedmezo_jax.data.batches import round_picks
from fedmezo_jax.data.buckets import lengths, widths
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.data.partition import heterogeneity
from fedmezo_jax.data.table import Table, data_named, deal, tabulate
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.checkpoints.weights import sixteen_bit
from fedmezo_jax.llama.checks import check_ids
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import trained_layers
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.precision import WARN_ABOVE, Precision, default_precision, expected_error
from fedmezo_jax.llama.registry import cache_folder, load_tokenizer, resolve
from fedmezo_jax.llama.task import LlamaTask
from fedmezo_jax.parallel import sharding
from fedmezo_jax.run.automatic_rate import VALIDATION
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.config_parts import DataConfig, LocalConfig, ServerConfig

ESTIMATORS = {"two-point": TwoPoint, "forward-gradient": ForwardGradient}
"""By their name on the command line."""
AnyTask = TypeVar("AnyTask", bound=Task)


class RunContext(NamedTuple, Generic[AnyTask]):
    """What a run works with, loaded and checked.

    Attributes:
        config: the run's, settled.
        task: model and data.
        lora: θ at the start.
        mesh: the devices it is spread over; None for one.
        categories: category of each training example, or what stands for it where the partition goes by something else.
        skipped: examples left out because they are longer than ``max_length``.
        truncated: examples that lost their end for it.
    """

    config: RunConfig
    task: AnyTask
    lora: mezo.Params
    mesh: Mesh | None
    categories: list[str]
    skipped: int = 0
    truncated: int = 0

    @property
    def heterogeneity(self) -> float:
        """Mean total-variation distance between a client's categories and all examples' categories."""
        return heterogeneity(list(self.task.parts), self.categories)


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
    tangents = config.algorithm == "fedmezo" and config.estimator == "forward-gradient"
    precision, reason = default_precision(sixteen_bit(folder, LlamaConfig.from_json(folder)), tangents)
    notify(f"precision {precision}: {reason}")
    return replace(config, precision=precision)


def precision_warnings(config: RunConfig) -> Iterator[str]:
    """What to say where the products of a LLaMA are likely too coarse for μ."""
    if config.estimator != "two-point":
        return  # a tangent's rounding is relative to the tangent
    if config.precision is None or (error := expected_error(config.precision, config.perturbation_scale)) <= WARN_ABOVE:
        return
    size = f"{error:.0%}" if error < 10 else "more than 1000%"
    yield (
        f"at --precision {config.precision}, --perturbation-scale {config.perturbation_scale:g} the projected gradient "
        f"is likely off by {size}: choose paired or float32, or measure it with experiments.benchmarks.precision"
    )


def stored_type(precision: Precision) -> Any:
    """The dtype that a run holds the frozen weights in."""
    return jnp.float32 if precision == "float32" else jnp.bfloat16


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
    assert config.precision
    folder = resolve(config.model)
    llama = LlamaConfig.from_json(folder)
    sharding.check_mesh(mesh, llama)
    if config.max_length > llama.max_position_embeddings:
        raise UserError(
            f"--max-length {config.max_length}: the model takes {llama.max_position_embeddings} tokens at most"
        )
    trained = trained_layers(config.layers, llama)
    tokenizer = load_tokenizer(folder)
    table = table_of(config, config.seed, tokenizer)
    check_tokens(table.rows, llama, folder)
    kept, spared = spare(table.train, VALIDATION if config.learning_rate == "auto" else 0)
    train, validation, test = (
        TokenBatch(*(leaf[picked] for leaf in table.rows)) for picked in (kept, spared, table.test)
    )
    how = (config.clients, config.dirichlet_alpha, config.seed)
    with data_named(config.data):
        parts, categories = deal(config.partition, [table.examples[i] for i in kept], lengths(train), *how)

    model = Llama(llama, config.lora_alpha / config.lora_rank, config.precision, trained=trained)
    load = partial(load_base, folder, llama, stored_type(config.precision), sharding.base_sharding(mesh))
    base = load()
    task = LlamaTask(
        model,
        base,
        tree_hash(base),
        config.model,
        config.lora_rank,
        config.lora_alpha,
        config.target_names,
        train,
        validation,
        test,
        parts,
        widths(train, config.length_buckets),
        config.batch_size,
        -(-config.participants // (1 if mesh is None else mesh.shape[federated.CLIENTS])),
        jax.device_put if mesh is None else partial(sharding.replicate, mesh),
    )
    if trained and trained[0]:
        task = task.from_hidden_states(cache_folder() / "hidden", used_examples(config, task), load, notify)
    lora = sharding.replicate(mesh, task.init_params(init_key(config.seed)))
    return RunContext(config, task, lora, mesh, categories, table.skipped, table.truncated)


def round_examples(config: RunConfig, task: Task, t: int, attempt: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A round's clients, ``[P]`` int32, and the training examples that they work on, ``[P, H, batch]`` int64."""
    ids = aggregation.sample_participants(config.seed, t, config.clients, config.participants, attempt)
    settings = {"seed": config.seed, "local_steps": config.local_steps, "batch_size": config.batch_size}
    return ids, round_picks(task.train, task.parts, ids, t, **settings, by_length=task.by_length)


def used_examples(config: RunConfig, task: Task) -> np.ndarray:
    """Indices of the training examples of all rounds, sorted.

    With several processes those of further attempts at a round are among them: no process can compute hidden states of
    its own clients' examples alone where the base is spread over all.
    """
    attempts = range(config.attempts if jax.process_count() > 1 else 1)
    used = np.zeros(len(task.train.labels), bool)
    for t, attempt in itertools.product(range(config.rounds), attempts):
        used[round_examples(config, task, t, attempt)[1]] = True
        if used.all():
            break
    return np.flatnonzero(used)


def spare(train: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Training examples, and ``count`` evenly spaced ones that are kept from them (at most a quarter)."""
    places = np.linspace(0, len(train) - 1, min(count, max(1, len(train) // 4)) if count else 0).astype(int)
    return np.delete(train, places), train[places]


def task_name(task: Task) -> str:
    """What stands for model and data in the configuration of a task's run."""
    return f"task:{type(task).__name__}"


def context_of(task: Task, config: RunConfig, mesh: Mesh | None = None) -> RunContext[Task]:
    """The same for a task that is given and not made from the configuration.

    Raises:
        UserError: the clients are not those of the task, or one of them has no examples.
    """
    if len(task.parts) != config.clients:
        raise UserError(f"clients={config.clients}: the task has parts for {len(task.parts)}")
    if empty := [i for i, part in enumerate(task.parts) if not len(part)]:
        raise UserError(f"client {empty[0]} has no examples: leave it out of the task's parts")
    lora = sharding.replicate(mesh, task.init_params(init_key(config.seed)))
    return RunContext(config, task, lora, mesh, [""] * sum(map(len, task.parts)))


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


def build(setup: RunContext) -> tuple[federated.Federated, Any]:
    """The run's ``(init, round)`` and the loss that its rounds take."""
    config, task = setup.config, setup.task
    if config.algorithm == "fedavg":
        loss = task.loss
    else:
        loss = task.pair_loss if config.estimator == "two-point" else task.point_loss
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    return algorithm(config, task.block_size, setup.mesh, task.least_width), loss


def algorithm(
    config: RunConfig, block_size: int | None = None, mesh: Mesh | None = None, least_width: int = 1
) -> federated.Federated:
    """The run's ``(init, round)``; its server's half needs neither model nor data."""
    if config.algorithm == "fedmezo":
        work = client.estimator_client(estimator_of(config))
    else:
        work = client.sgd_client(local_optimizer(config))
    rate = 1.0 if config.learning_rate == "auto" else config.learning_rate
    rates = personalization.RateConfig(rate, config.personalize, config.personalize_scale)
    return federated.federated(
        work, rates, server_optimizer(config), block_size, config.directions_shared, mesh, least_width
    )


def estimator_of(config: LocalConfig) -> Estimator:
    """The estimator of the local steps of fedmezo."""
    settings = (config.perturbation_scale, config.directions, config.distribution, config.weight_decay)
    return ESTIMATORS[config.estimator](mezo.MezoConfig(*settings))


def local_optimizer(config: LocalConfig) -> Callable[[Any], optax.GradientTransformation]:
    """The optimizer of back-propagated local steps, made of a learning rate."""
    if config.local_optimizer == "adam":
        return partial(optax.adamw, weight_decay=config.weight_decay)
    return lambda rate: optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate))


def server_optimizer(config: ServerConfig) -> optax.GradientTransformation:
    """The server's, fed with the pseudo-gradient."""
    if config.server_optimizer == "adam":
        return optax.adam(config.server_learning_rate)
    return optax.sgd(config.server_learning_rate, 0.9 if config.server_optimizer == "momentum" else None)
