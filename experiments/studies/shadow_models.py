"""Whether shadow models tell what a run was trained on, with and without differential privacy of clients.

    python -m experiments.studies.shadow_models

Every run trains on a random half of the examples. The attacker has the final adapter of one run, and from all the
others, whose halves it knows, how much an adapter lowers each example's loss with and without that example: two normal
distributions for each example, and its score is their likelihood ratio (LiRA, arXiv 2112.03570, with one variance for
all examples). Each run is attacked in turn. Beside it stands the attack that goes by the lowered loss alone. An AUC of
0.5 is chance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from experiments import _cli, _plots
from experiments.studies import privacy_utility, result_cache, runner
from experiments.studies.example_losses import auc, example_losses
from fedmezo_jax.data.batches import take
from fedmezo_jax.data.seeding import generator
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.prepare import prepare


class Preset(NamedTuple):
    """One scale of the study.

    Attributes:
        run: configuration of all its runs.
        epsilons: ε of each group of runs; None for runs without privacy.
        num_runs: of each group.
    """

    run: RunConfig
    epsilons: Sequence[float | None]
    num_runs: int


_SMALL = replace(privacy_utility.PRESETS["small"].run, clients=100)
PRESETS: Mapping[runner.PresetName, Preset] = MappingProxyType(
    {
        "small": Preset(_SMALL, (None, 8.0), 16),
        "paper": Preset(privacy_utility.PRESETS["paper"].run, (None, 8.0), 16),
        "smoke": Preset(replace(_SMALL, clients=4, rounds=2, test_examples=8, lora_rank=2), (None, 8.0), 6),
    }
)


@dataclass(frozen=True)
class Config(runner.Config):
    """The preset, and changes to it; ``--num-seeds`` is the number of runs of each group."""


def main(config: Config) -> None:
    """Makes all runs, attacks each, prints the table and draws the scores."""
    preset = runner.preset_of(PRESETS, config.preset)
    base = replace(runner.changed(config, preset.run), seed=config.seed)
    out = config.out or Path("runs") / f"shadow_models-{config.preset}"
    points = [
        {"run": asdict(replace(base, dp_epsilon=epsilon)), "member_seed": seed}
        for epsilon in preset.epsilons
        for seed in range(config.seed, config.seed + (config.num_seeds or preset.num_runs))
    ]
    found, seconds = result_cache.measure(
        out / "points", points, lambda point: _measure(RunConfig(**point["run"]), point["member_seed"])
    )
    table = conclude(points, found)
    _cli.write_folder(replace(config, out=out), table, seconds, run=asdict(base))
    plot(out / "shadow_models.png", table)
    _cli.print_table("shadow models by ε", table)


@lru_cache(maxsize=1)
def _context(config: RunConfig) -> RunContext:
    return prepare(config)


def _measure(config: RunConfig, member_seed: int) -> dict[str, Any]:
    """Which examples a run was trained on, a random half, and how much it lowered the loss of each."""
    context = _context(replace(config, dp_epsilon=None))
    task = context.task
    order = generator(member_seed, "shadow models", len(task.train.labels)).permutation(len(task.train.labels))
    members = order[: len(order) // 2]
    parts = [np.sort(part) for part in np.array_split(members, config.clients)]
    run = replace(config, seed=member_seed)
    with tempfile.TemporaryDirectory() as place:
        settings: dict[str, Any] = {"eval_every": run.rounds, "checkpoint_every": run.rounds}
        own = replace(task, parts=parts)
        result = fine_tune(run, Path(place) / "run", task=own, notify=lambda line: None, **settings)
    rows = take(task.train, np.arange(len(order)))
    lowered = example_losses(task, context.params, rows) - example_losses(task, result.params, rows)
    return {
        "members": np.isin(np.arange(len(order)), members).tolist(),
        "lowered": lowered.tolist(),
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
    }


def scores(target: int, members: np.ndarray, lowered: np.ndarray) -> np.ndarray:
    """``[N]`` log likelihood ratio of each example having been in the target's half, from all other runs.

    Args:
        target: the attacked run.
        members: ``[runs, N]`` bool, whose row of the target is not looked at.
        lowered: ``[runs, N]``, how much each run lowered each example's loss.
    """
    others = np.arange(len(members)) != target
    inside, values = members[others], lowered[others]
    log_likelihood = []
    for chosen in (inside, ~inside):
        count = np.maximum(chosen.sum(axis=0), 1)
        mean = np.where(chosen, values, 0).sum(axis=0) / count
        deviations = np.where(chosen, values - mean, 0)
        variance = np.sum(deviations**2) / max(1, np.sum(count - 1))
        log_likelihood.append(-((lowered[target] - mean) ** 2) / (2 * variance) - 0.5 * np.log(variance))
    return log_likelihood[0] - log_likelihood[1]


def conclude(points: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each ε: the mean AUC of both attacks over the attacked runs, and their 90 % bands."""
    table = []
    for epsilon in dict.fromkeys(point["run"]["dp_epsilon"] for point in points):
        group = [each for point, each in zip(points, found, strict=True) if point["run"]["dp_epsilon"] == epsilon]
        members, lowered = (np.array([each[name] for each in group]) for name in ("members", "lowered"))
        row: dict[str, Any] = {
            "clients": points[0]["run"]["clients"],
            "epsilon": epsilon,
            "runs": len(group),
            "examples": members.shape[1],
            "loss_before": float(np.mean([each["loss_before"] for each in group])),
            "loss_after": float(np.mean([each["loss_after"] for each in group])),
        }
        attacks = {
            "auc_threshold": lowered,
            "auc_shadow": np.array([scores(target, members, lowered) for target in range(len(group))]),
        }
        for name, by_run in attacks.items():
            values = np.array(
                [auc(score[inside], score[~inside]) for score, inside in zip(by_run, members, strict=True)]
            )
            row |= {name: float(np.mean(values)), f"{name}_band_90": runner.half_width(values)}
        table.append(row)
    return table


def plot(file: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Draws the AUC of both attacks for each ε."""
    figure, axes = _plots.subplots(figsize=(5, 3.4))
    for shift, name, label in ((-0.08, "auc_threshold", "loss threshold"), (0.08, "auc_shadow", "shadow models")):
        values, bands = [row[name] for row in table], [row[f"{name}_band_90"] or 0 for row in table]
        axes.errorbar(np.arange(len(table)) + shift, values, bands, fmt="o", capsize=3, label=label)
    axes.axhline(0.5, color="0.7", linewidth=1)
    axes.set_xticks(range(len(table)), ["∞" if row["epsilon"] is None else f"{row['epsilon']:g}" for row in table])
    axes.set(xlabel="ε", ylabel="AUC of the attack", xlim=(-0.5, len(table) - 0.5))
    _plots.legend(figure, axes)
    _plots.save(figure, file, dpi=110)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
