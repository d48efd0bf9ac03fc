"""The paper's bounds with measured constants, compared with runs (Sec. 3 of arXiv 2402.05926).

    python -m experiments.studies.theory_constants

Measures the constants of the assumptions on a real loss, computes the learning rates, convergence rates and schedules
that follow, and compares the predicted descent of one step with the observed one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from experiments import _cli
from experiments.studies import runner
from experiments.studies import theory_bounds as bounds
from experiments.studies.result_cache import measure
from fedmezo_jax.core import mezo, random
from fedmezo_jax.core.equal_partial import EqualPartial
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.batches import take
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.llama.loss import loss_of, pair_loss_of
from fedmezo_jax.llama.task import unpaired
from fedmezo_jax.run.config import RunConfig, paper_config
from fedmezo_jax.run.context import RunContext
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.theory import spectrum
from fedmezo_jax.theory.heterogeneity import gradients


class Preset(NamedTuple):
    """One scale of the study.

    Attributes:
        run: model, data and partition; its N, H and T enter the conditions.
        checkpoints: points along a path of back-propagated Adam at which the constants are measured, its start first.
        between: steps from one checkpoint to the next.
        client_batches: batches per client; f_i is their mean loss.
        probes: Lanczos runs at the last checkpoint.
        rates: η of the single steps from the last checkpoint.
        draws: number of single steps, each with its own direction and batch.
    """

    run: RunConfig
    checkpoints: int
    between: int
    client_batches: int
    probes: int
    rates: tuple[float, ...]
    draws: int


_SMALL = Preset(
    paper_config(clients=4, local_steps=5, rounds=8, length_buckets=1, precision="float32"),
    *(3, 40, 8, 6),
    (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    64,
)
PRESETS: dict[runner.PresetName, Preset] = {
    "small": _SMALL,
    "paper": Preset(
        replace(runner.PAPER, data="dolly", partition="meta"), 5, 100, 16, 16, (1e-6, 3e-6, 1e-5, 3e-5, 1e-4), 512
    ),
    "smoke": Preset(
        replace(_SMALL.run, clients=2, local_steps=1, rounds=2, batch_size=1, lora_rank=2, test_examples=8),
        *(2, 2, 2, 2, (1e-3, 1e-2), 4),
    ),
}


@dataclass(frozen=True)
class Config:
    """What to measure."""

    preset: runner.PresetName = "small"
    """small: minutes on two CPU cores; paper: the paper's model and data; smoke: seconds"""
    data_dir: str | None = None
    """folder with local copies of the data sets; without it they come from the hub"""
    seed: int = 0
    """the first seed"""
    out: Path = Path("runs/theory_constants")
    """folder for config.json, results.json, the plot and finished points, which are not measured again"""


def main(config: Config) -> None:
    """Measures, prints the table and writes the folder."""
    preset = runner.preset_of(PRESETS, config.preset)
    run = replace(preset.run, data_dir=config.data_dir, seed=config.seed)
    path = {name: getattr(preset, name) for name in ("checkpoints", "between", "client_batches", "probes")}
    step = {"rates": preset.rates, "draws": preset.draws}
    points = [
        {"kind": "constants", **path, "run": asdict(run)},
        {"kind": "descent", **path, **step, "run": asdict(run)},
    ]
    (measured, descent), seconds = measure(config.out / "points", points, _measure)
    conclusion = bounds.conclude(run, measured)
    table = [*conclusion.rows, *bounds.descent_rows(conclusion, preset.rates, descent)]
    _cli.write_folder(config, table, seconds, run=asdict(run))
    bounds.plot(config.out / "theory_constants.png", table)
    for part in dict.fromkeys(row["part"] for row in table):
        part_rows = [
            {key: value for key, value in row.items() if key != "part"} for row in table if row["part"] == part
        ]
        used_keys = [key for key in part_rows[0] if any(row[key] is not None for row in part_rows)]
        _cli.print_table(part, [{key: row[key] for key in used_keys} for row in part_rows])


def _measure(point: dict[str, Any]) -> dict[str, Any]:
    return _constants(point) if point["kind"] == "constants" else _descent(point)


def mean_loss(model: Any, base: Any) -> Any:
    """Returns ``f(lora, batches)``, the mean of the losses of ``[n, B]`` batches; a batch's loss is unbiased for it."""
    return jax.tree_util.Partial(EqualPartial(_mean_loss, (model,)), base)


def _mean_loss(model: Any, base: Any, lora: Any, batches: TokenBatch) -> jax.Array:
    return jnp.mean(jax.vmap(lambda rows: loss_of(model, base)(lora, rows))(batches))


@lru_cache(maxsize=1)
def _path(
    checkpoints: int, between: int, client_batches: int, run: RunConfig
) -> tuple[RunContext, TokenBatch, list[Any]]:
    """The setup, its clients' batches (leaves ``[N·n, B, …]``) and θ at the checkpoints."""
    setup = prepare(run)
    rng = np.random.default_rng(run.seed)
    picked = np.concatenate(
        [np.resize(rng.permutation(part), (client_batches, run.batch_size)) for part in setup.task.parts]
    )
    batches = TokenBatch(*(jnp.asarray(leaf[picked]) for leaf in setup.task.train))
    optimizer, loss = optax.adam(1e-3), mean_loss(unpaired(setup.task.model), setup.task.base)

    @jax.jit
    def step(loss, params, state, batches):
        updates, state = optimizer.update(jax.grad(loss)(params, batches), state)
        return optax.apply_updates(params, updates), state

    path, params, state = [setup.params], setup.params, optimizer.init(setup.params)
    for _ in range(checkpoints - 1):
        for _ in range(between):
            rows = rng.choice(len(setup.task.train.labels), (4, run.batch_size))
            batch = jax.tree.map(jnp.asarray, take(setup.task.train, rows))
            params, state = step(loss, params, state, batch)
        path.append(params)
    return setup, batches, path


def _at(point: dict[str, Any]) -> tuple[RunContext, TokenBatch, list[Any]]:
    return _path(*(point[name] for name in ("checkpoints", "between", "client_batches")), RunConfig(**point["run"]))


def _constants(point: dict[str, Any]) -> dict[str, Any]:
    """Squared norms of gradients at each checkpoint, the Hessian's spectrum at the last, norms at all."""
    setup, batches, path = _at(point)
    loss, clients = mean_loss(unpaired(setup.task.model), setup.task.base), setup.config.clients
    key = jax.random.fold_in(run_key(setup.config.seed), random.CONSTANTS)
    batch_gradients = jax.jit(gradients)

    @partial(jax.jit, static_argnums=4)
    def run_lanczos(loss, params, batches, key, steps):
        product = spectrum.hessian_product(loss, params, batches)
        return spectrum.lanczos(product, spectrum.random_signs(key, spectrum.layer_mask(params, None)), steps)

    @jax.jit
    def curvature(loss, params, batches, vectors):
        product = spectrum.hessian_product(loss, params, batches)
        return jax.lax.map(lambda v: v @ product(v), vectors)

    checkpoints: list[dict[str, Any]] = []
    one_batch, before = loss_of(unpaired(setup.task.model), setup.task.base), None
    for t, params in enumerate(path):
        flat = np.asarray(ravel_pytree(params)[0], np.float64)
        noisy_gradients = np.asarray(batch_gradients(one_batch, params, batches))
        client_gradients = noisy_gradients.reshape(clients, -1, flat.size).mean(axis=1)
        gradient = client_gradients.mean(axis=0)
        last = t + 1 == len(path)
        keys = jax.random.split(jax.random.fold_in(key, t), point["probes"] if last else 1)
        runs = [jax.device_get(run_lanczos(loss, params, batches, key, 12)) for key in keys]
        measured: dict[str, Any] = {
            "gradient": float(gradient @ gradient),
            "client_gradients": np.sum(client_gradients**2, axis=1).tolist(),
            "noisy": np.sum(noisy_gradients**2, axis=1).reshape(clients, -1).mean(axis=1).tolist(),
            "disparities": np.sum((client_gradients - gradient) ** 2, axis=1).tolist(),
            "probes": [spectrum.read(run, flat.size)._asdict() for run in runs],
            "parameters": flat.size,
        }
        if before is not None:
            changed, moved = gradient - before[1], flat - before[0]
            measured["path_smoothness"] = float(np.linalg.norm(changed) / np.linalg.norm(moved))
        if last:
            sample = noisy_gradients[np.linspace(0, len(noisy_gradients) - 1, 8).astype(int)]
            measured["curvature"] = np.asarray(curvature(loss, params, batches, jnp.asarray(sample))).tolist()
        checkpoints.append(measured)
        before = (flat, gradient)
    return {"at": checkpoints}


def _descent(point: dict[str, Any]) -> dict[str, Any]:
    """f(θ') − f(θ) of single steps from the last checkpoint, ``[draws][rates]``; steps share their direction."""
    setup, batches, path = _at(point)
    params, config = path[-1], setup.config
    settings = mezo.MezoConfig(config.perturbation_scale)
    rates = jnp.array(point["rates"])

    @jax.jit
    def change(loss, pair_loss, params, batches, key):
        before = loss(params, batches)
        count = jax.tree.leaves(batches)[0].shape[0]
        picked = jax.random.randint(jax.random.fold_in(key, 1), (), 0, count)
        batch = jax.tree.map(lambda leaf: leaf[picked], batches)

        def change_at(rate):
            moved = mezo.step(pair_loss, params, batch, jax.random.fold_in(key, 0), rate, settings).params
            return loss(moved, batches) - before

        return jax.lax.map(change_at, rates)

    losses = mean_loss(unpaired(setup.task.model), setup.task.base), pair_loss_of(setup.task.model, setup.task.base)
    keys = jax.random.split(jax.random.fold_in(run_key(config.seed), random.DESCENT), point["draws"])
    return {"changes": [change(*losses, params, batches, key).tolist() for key in keys]}


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
