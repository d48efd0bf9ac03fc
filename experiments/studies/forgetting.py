"""How near does a replay that leaves a client out come to a run that never had it?

    python -m experiments.studies.forgetting

Three adapters of each seed: of the whole run, of its replay without client 0 (``experiments.replay --without 0``), and
of the same run in which client 0 never answered. The replay takes no data and no forward pass, but the others measured
their numbers at a θ that client 0 had moved. For each adapter: the loss on the client's training examples, on the other
clients' and on test examples; its distance from the run that never had the client, relative to how far that run moved;
and how well the client's examples can be told from test examples by how much the adapter lowered their losses (AUC; 0.5
is by chance).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import _cli, _plots
from experiments.studies import result_cache, runner
from experiments.studies.example_losses import auc, example_losses
from fedmezo_jax.core import federated, random
from fedmezo_jax.core.mezo import Params
from fedmezo_jax.data.batches import take
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext, build, round_examples
from fedmezo_jax.run.prepare import prepare

FORGOTTEN = 0
WHOLE, LEFT_OUT, NEVER = "the whole run", "left out in a replay", "never there"


class Preset(NamedTuple):
    """One scale of the study.

    Attributes:
        run: configuration of all its runs.
        partitions: of the data.
        num_seeds: number of seeds.
    """

    run: RunConfig
    partitions: Sequence[str]
    num_seeds: int


_FAST: dict[str, Any] = {
    **runner.Q_AND_V,
    "learning_rate": 5e-3,
    "directions": 4,
    "length_buckets": 1,
    "batch_size": 1,
    "precision": "float32",
}
PRESETS: Mapping[runner.PresetName, Preset] = MappingProxyType(
    {
        "small": Preset(RunConfig(**_FAST, rounds=20), ("iid", "dirichlet", "meta"), 5),
        "paper": Preset(replace(runner.PAPER, clients=8), ("iid", "dirichlet"), 3),
        "smoke": Preset(replace(runner.SMOKE, clients=3), ("iid",), 2),
    }
)


@dataclass(frozen=True)
class Config(runner.Config):
    """The preset, and changes to it."""


def main(config: Config) -> None:
    """Makes the three adapters of each partition and seed, prints the table and draws it."""
    preset = runner.preset_of(PRESETS, config.preset)
    base = runner.changed(config, preset.run)
    out = config.out or Path("runs") / f"forgetting-{config.preset}"
    seeds = range(config.seed, config.seed + (config.num_seeds or preset.num_seeds))
    points = [
        {"run": asdict(replace(base, partition=partition, seed=seed))}
        for partition in preset.partitions
        for seed in seeds
    ]
    found, seconds = result_cache.measure(out / "points", points, lambda point: _measure(RunConfig(**point["run"])))
    table = conclude(points, found)
    _cli.write_folder(replace(config, out=out), table, seconds, run=asdict(base))
    plot(out / "forgetting.png", table)
    _cli.print_table("a client left out afterwards, and one that was never there", table)


def adapters(context: RunContext) -> tuple[dict[str, Params], dict[str, float]]:
    """The three adapters by name, and the seconds that the last two took."""
    config, key = context.config, random.run_key(context.config.seed)
    (init, round), loss = build(context)

    def cohort(t: int) -> federated.Cohort:
        ids, picks = round_examples(config, context.task, t)
        return federated.Cohort(ids, np.ones(len(ids), np.float32), take(context.task.train, picks))

    def run(weight: float) -> tuple[federated.FederatedState, list[tuple[np.ndarray, federated.RoundReport]]]:
        state, reports = init(context.params, config.clients), []
        for t in range(config.rounds):
            clients = cohort(t)
            ids = np.asarray(clients.ids)
            report = jax.device_get(round.work(state, loss, clients, key))
            state = round.apply(state, ids, np.where(ids == FORGOTTEN, weight, 1), report, key)
            reports.append((ids, report))
        return state, reports

    whole, reports = run(1.0)
    begun = time.perf_counter()
    left_out = init(context.params, config.clients)
    for ids, report in reports:
        left_out = round.apply(left_out, ids, np.where(ids == FORGOTTEN, 0.0, 1.0), report, key)
    jax.block_until_ready(left_out)
    replayed = time.perf_counter()
    never, _ = run(0.0)
    jax.block_until_ready(never)
    seconds = {LEFT_OUT: replayed - begun, NEVER: time.perf_counter() - replayed}
    return {WHOLE: whole.params, LEFT_OUT: left_out.params, NEVER: never.params}, seconds


def _measure(config: RunConfig) -> dict[str, dict[str, float]]:
    context = prepare(config)
    task, start = context.task, context.params
    made, seconds = adapters(context)
    mine = task.parts[FORGOTTEN]
    others = np.concatenate([part for i, part in enumerate(task.parts) if i != FORGOTTEN])
    rows = {"client": take(task.train, mine), "others": take(task.train, others), "test": task.test}
    before = {name: example_losses(task, start, some) for name, some in rows.items()}
    moved = _distance(made[NEVER], start)

    def measures(name: str, params: Params) -> dict[str, float]:
        losses = {name: example_losses(task, params, some) for name, some in rows.items()}
        lowered = {name: before[name] - losses[name] for name in rows}
        return {
            **{f"loss_{name}": float(np.mean(loss)) for name, loss in losses.items()},
            "distance": _distance(params, made[NEVER]) / moved,
            "auc": auc(lowered["client"], lowered["test"]),
            "seconds": seconds.get(name, 0.0),
        }

    start_losses = {f"loss_{name}": float(np.mean(loss)) for name, loss in before.items()}
    return {"start": start_losses} | {name: measures(name, params) for name, params in made.items()}


def _distance(one: Params, other: Params) -> float:
    squares = [
        np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    ]
    return float(np.sqrt(sum(squares)))


def conclude(points: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each partition and adapter: means over seeds, with 90 % bands of what is compared.

    ``client_gap`` is how much lower the loss on the client's examples is than with the run that never had it, seed by
    seed: what of the client is left in the adapter.
    """
    table = []
    for partition in dict.fromkeys(point["run"]["partition"] for point in points):
        seeds = [result for point, result in zip(points, found, strict=True) if point["run"]["partition"] == partition]
        for name in (WHOLE, LEFT_OUT, NEVER):
            values = {key: np.array([seed[name][key] for seed in seeds]) for key in seeds[0][name]}
            gaps = np.array([seed[NEVER]["loss_client"] - seed[name]["loss_client"] for seed in seeds])
            table.append(
                {
                    "partition": partition,
                    "adapter": name,
                    "seeds": len(seeds),
                    "loss_client_before": float(np.mean([seed["start"]["loss_client"] for seed in seeds])),
                    **{key: float(np.mean(values[key])) for key in ("loss_client", "loss_others", "loss_test")},
                    "client_gap": float(np.mean(gaps)),
                    "client_gap_band_90": runner.half_width(gaps),
                    "distance": float(np.mean(values["distance"])),
                    "distance_band_90": runner.half_width(values["distance"]),
                    "auc": float(np.mean(values["auc"])),
                    "auc_band_90": runner.half_width(values["auc"]),
                    "seconds": float(np.median(values["seconds"])),
                }
            )
    return table


def plot(file: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Draws what is left of the client, the distance and the AUC of each adapter, by partition."""
    partitions = list(dict.fromkeys(row["partition"] for row in table))
    panels = (
        ("client_gap", "loss on the client's examples\nbelow that without it (nats/token)", 0.0),
        ("distance", "distance from the run without it,\nrelative to how far that moved", 0.0),
        ("auc", "AUC of its examples\nagainst test examples", 0.5),
    )
    figure, all_axes = _plots.subplots(1, len(panels), figsize=(10, 3.6))
    for axes, (key, label, neutral) in zip(all_axes, panels, strict=True):
        for i, name in enumerate((WHOLE, LEFT_OUT, NEVER)):
            rows = [row for row in table if row["adapter"] == name]
            axes.errorbar(
                np.arange(len(partitions)) + 0.15 * (i - 1),
                [row[key] for row in rows],
                [row.get(f"{key}_band_90") or 0 for row in rows],
                fmt="o",
                capsize=3,
                label=name,
            )
        axes.axhline(neutral, color="0.7", linewidth=1)
        axes.set_xticks(range(len(partitions)), partitions)
        axes.set_ylabel(label)
    _plots.legend(figure, all_axes[0])
    _plots.save(figure, file, dpi=110)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
