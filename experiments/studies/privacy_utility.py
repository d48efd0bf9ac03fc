"""What does differential privacy of clients cost, and what can be told about a client's data with and without it?

    python -m experiments.studies.privacy_utility

All clients draw the same directions. Two attacks ask whether an example was trained on. The first has the final adapter
and goes by how much it lowered the example's loss (a loss threshold). The second has the ledger: it computes the
example's own slopes along the directions of each round's first step, at the θ that a replay gives, and compares them
with what the clients sent, or with the mean where that is all the ledger holds. Members are the examples of those
steps, and non-members the test examples. An AUC of 0.5 is chance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import _cli, _plots
from experiments.studies import result_cache, runner
from experiments.studies.example_losses import auc, example_losses
from fedmezo_jax.core import random
from fedmezo_jax.core.estimators import Estimator
from fedmezo_jax.core.mezo import Params
from fedmezo_jax.data.batches import take
from fedmezo_jax.run import ledger, messages
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext, build, estimator_of, round_examples
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.privacy_plan import plan_of
from fedmezo_jax.run.replay import reconstruct

ATTACKED_ROUNDS = 5
"""Rounds whose first steps the second attack uses."""


class Preset(NamedTuple):
    """One scale of the study.

    Attributes:
        run: configuration of all its runs.
        settings: (clients, ε, number of seeds); None for ε is a run without privacy.
    """

    run: RunConfig
    settings: Sequence[tuple[int, float | None, int]]


_SMALL = RunConfig(
    **runner.Q_AND_V,
    rounds=10,
    local_steps=2,
    directions=4,
    directions_shared=True,
    batch_size=1,
    length_buckets=1,
    precision="float32",
    partition="iid",
)
PRESETS: Mapping[runner.PresetName, Preset] = MappingProxyType(
    {
        "small": Preset(
            _SMALL, (*((100, epsilon, 3) for epsilon in (None, 8.0, 4.0, 2.0, 1.0)), (1000, None, 1), (1000, 8.0, 1))
        ),
        "paper": Preset(
            replace(runner.PAPER, directions_shared=True, clients=100), ((100, None, 3), (100, 8.0, 3), (100, 1.0, 3))
        ),
        "smollm2": Preset(
            replace(_SMALL, **runner.SMOLLM2, layers="last:1", targets="up_proj,down_proj"),
            ((100, None, 1), (100, 8.0, 1), (100, 1.0, 1)),
        ),
        "smoke": Preset(replace(_SMALL, rounds=2, test_examples=8, lora_rank=2), ((4, None, 2), (4, 8.0, 2))),
    }
)


@dataclass(frozen=True)
class Config(runner.Config):
    """The preset, and changes to it."""


def main(config: Config) -> None:
    """Runs every ε, prints the table and draws it."""
    preset = runner.preset_of(PRESETS, config.preset)
    base = runner.changed(config, preset.run)
    out = config.out or Path("runs") / f"privacy_utility-{config.preset}"
    points = [
        {"run": asdict(replace(base, clients=clients, dp_epsilon=epsilon, seed=seed))}
        for clients, epsilon, seeds in preset.settings
        for seed in range(config.seed, config.seed + (config.num_seeds or seeds))
    ]
    found, seconds = result_cache.measure(out / "points", points, lambda point: _measure(RunConfig(**point["run"])))
    table = conclude(points, found)
    _cli.write_folder(replace(config, out=out), table, seconds, run=asdict(base))
    plot(out / "privacy_utility.png", table)
    _cli.print_table("loss and attacks by ε", table)


def _measure(config: RunConfig) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        last = config.rounds
        result = fine_tune(config, folder, eval_every=last, checkpoint_every=last, notify=lambda line: None)
        return {
            "loss_before": result.loss_before,
            "loss_after": result.loss_after,
            "auc_adapter": _attack_adapter(result.context, result.params),
            "auc_ledger": _attack_ledger(result.context, folder / "run.ledger"),
        }


def _first_examples(context: RunContext, t: int) -> np.ndarray:
    """``[P]`` indices of the examples that the clients of a round use in its first step (of each batch the first)."""
    return round_examples(context.config, context.task, t)[1][:, 0, 0]


def _attack_adapter(context: RunContext, params: Params) -> float:
    task = context.task
    used = np.unique(np.concatenate([_first_examples(context, t) for t in range(context.config.rounds)]))
    lowered = [
        example_losses(task, context.params, rows) - example_losses(task, params, rows)
        for rows in (take(task.train, used), task.test)
    ]
    return auc(*lowered)


def _attack_ledger(context: RunContext, file: Path) -> float:
    """The AUC over members and non-members of each example's best score over the rounds."""
    config, task, key = context.config, context.task, random.run_key(context.config.seed)
    attacked = range(min(ATTACKED_ROUNDS, config.rounds))
    used = np.unique(np.concatenate([_first_examples(context, t) for t in attacked]))
    candidates = jax.tree.map(lambda *leaves: np.concatenate(leaves), take(task.train, used), task.test)
    _, loss = build(context)
    scores = []
    for t, entry in zip(attacked, ledger.entries(file), strict=False):
        theta, _ = reconstruct(file, config, context.params, t)
        step_key = jax.random.fold_in(random.shared_key(key, t), 0)
        slopes = np.asarray(_slopes(estimator_of(config), loss, theta, candidates, step_key))
        scores.append(_scores(slopes, entry, config))
    best = np.max(scores, axis=0)
    return auc(best[: len(used)], best[len(used) :])


@partial(jax.jit, static_argnums=0)
def _slopes(estimator: Estimator, loss: Any, params: Params, rows: Any, key: jax.Array) -> jax.Array:
    """``[N, n]`` projected gradients of each example by itself."""

    def one(row):
        return estimator.estimate(loss, params, jax.tree.map(lambda leaf: leaf[None], row), key).projected_gradients

    return jax.lax.map(one, rows)


def _scores(slopes: np.ndarray, entry: ledger.Entry, config: RunConfig) -> np.ndarray:
    """``[N]`` how well each candidate's slopes fit what the ledger holds of the round's first step; higher is better.

    Against single clients' numbers: the least distance to one of them. Against a mean: the inner product with it.
    """
    if entry.mean is not None:
        return slopes @ entry.mean.reshape(config.local_steps, -1)[0]
    sent = [messages.unpack_update(update).projected_gradients[0] for update in entry.updates if update]
    distances = np.linalg.norm(slopes[:, None] - np.stack(sent), axis=2)
    return -np.min(distances, axis=1)


def conclude(points: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row for each number of clients and ε: means over seeds and their 90 % bands.

    ``drop_lost`` is the share of the loss drop of the run without privacy that is lost, seed by seed.
    """
    by_setting: dict[tuple[int, float | None], dict[int, Mapping[str, float]]] = {}
    for point, result in zip(points, found, strict=True):
        run = point["run"]
        by_setting.setdefault((run["clients"], run["dp_epsilon"]), {})[run["seed"]] = result
    runs = {(point["run"]["clients"], point["run"]["dp_epsilon"]): point["run"] for point in points}
    table = []
    for (clients, epsilon), seeds in by_setting.items():
        clear = by_setting[clients, None]
        drops = np.array([seed["loss_before"] - seed["loss_after"] for seed in seeds.values()])
        clear_drops = np.array([clear[seed]["loss_before"] - clear[seed]["loss_after"] for seed in seeds])
        lost = 1 - drops / clear_drops
        plan = plan_of(RunConfig(**runs[clients, epsilon]))
        row: dict[str, Any] = {
            "clients": clients,
            "epsilon": epsilon,
            "noise": plan.noise if plan else 0.0,
            "seeds": len(seeds),
            "loss_before": float(np.mean([seed["loss_before"] for seed in seeds.values()])),
            "loss_after": float(np.mean([seed["loss_after"] for seed in seeds.values()])),
            "drop_lost": float(np.mean(lost)),
            "drop_lost_band_90": runner.half_width(lost),
        }
        for name in ("auc_adapter", "auc_ledger"):
            values = np.array([seed[name] for seed in seeds.values()])
            row |= {name: float(np.mean(values)), f"{name}_band_90": runner.half_width(values)}
        table.append(row)
    return table


def plot(file: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Draws the share of the loss drop that is lost, and the AUC of both attacks, by ε."""
    figure, (left, right) = _plots.subplots(1, 2, figsize=(9, 3.6))
    order = sorted({row["epsilon"] for row in table}, key=lambda epsilon: epsilon or np.inf)
    for clients in dict.fromkeys(row["clients"] for row in table):
        rows = sorted((row for row in table if row["clients"] == clients), key=lambda row: order.index(row["epsilon"]))
        x = [order.index(row["epsilon"]) for row in rows]

        def draw(axes: Any, key: str, label: str, rows: Any = rows, x: Any = x) -> None:
            bands = [row[f"{key}_band_90"] or 0 for row in rows]
            axes.errorbar(x, [row[key] for row in rows], bands, marker="o", capsize=3, label=label)

        draw(left, "drop_lost", f"{clients:,} clients")
        draw(right, "auc_adapter", f"from the adapter, {clients:,} clients")
        draw(right, "auc_ledger", f"from the ledger, {clients:,} clients")
    for axes, label, neutral in ((left, "share of the loss drop that is lost", 0.0), (right, "AUC of the attack", 0.5)):
        axes.axhline(neutral, color="0.7", linewidth=1)
        axes.set_xticks(range(len(order)), ["∞" if epsilon is None else f"{epsilon:g}" for epsilon in order])
        axes.set(xlabel="ε", ylabel=label)
    _plots.legend(figure, left, right, columns=3)
    _plots.save(figure, file, dpi=110)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
