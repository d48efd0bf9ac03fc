"""How much of the best fixed learning rate's loss drop ``--learning-rate auto`` reaches, without a rate to tune.

    python -m experiments.studies.automatic_rate

For each choice of trained layers, LoRA rank and local steps there is a run with the automatic rate, and a search for
the best fixed one: rates a factor of two apart, until the best has a worse one on both sides. Every seed of a rate
counts, and a rate at which one of them diverges is not the best.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from experiments import _cli, _plots
from experiments.studies import rate_search, result_cache, runner
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.run.sweep import sweep


class Preset(NamedTuple):
    """One scale of the study.

    Attributes:
        run: configuration of all its runs.
        ranks: LoRA ranks r; α = 2r.
        local_steps: numbers H of local steps, by which layers are trained.
        num_seeds: number of seeds.
    """

    run: RunConfig
    ranks: Sequence[int]
    local_steps: Mapping[str, Sequence[int]]
    num_seeds: int


_SMALL = RunConfig(clients=4, rounds=10, length_buckets=1)
PRESETS: Mapping[runner.PresetName, Preset] = MappingProxyType(
    {
        "small": Preset(_SMALL, (2, 8, 32), {"last:2": (3, 10, 30), "all": (3, 10)}, 2),
        "smollm2": Preset(RunConfig(**runner.SMOLLM2, clients=4, rounds=10), (8,), {"last:2": (3,)}, 1),
        "paper": Preset(
            RunConfig(model=runner.PAPER.model, data="gsm8k"),
            (8,),
            dict.fromkeys(("last:2", "last:8", "all"), (10,)),
            3,
        ),
        "smoke": Preset(replace(_SMALL, clients=2, rounds=2, directions=2, test_examples=8), (2,), {"last:1": (2,)}, 1),
    }
)


@dataclass(frozen=True)
class Config(runner.Config):
    """The preset, and changes to it."""


def main(config: Config) -> None:
    """Measures every setting, prints the table and draws it."""
    preset = runner.preset_of(PRESETS, config.preset)
    base = runner.changed(config, preset.run)
    out = config.out or Path("runs") / f"automatic_rate-{config.preset}"
    seeds = list(range(config.seed, config.seed + (config.num_seeds or preset.num_seeds)))
    points = [
        {
            "run": asdict(
                replace(base, layers=layers, lora_rank=rank, lora_alpha=2.0 * rank, local_steps=steps, seed=seeds[0])
            ),
            "seeds": seeds,
        }
        for layers, numbers in preset.local_steps.items()
        for rank, steps in itertools.product(preset.ranks, numbers)
    ]
    found, seconds = result_cache.measure(
        out / "points", points, lambda point: _measure(RunConfig(**point["run"]), point["seeds"])
    )
    table = [row(point, each) for point, each in zip(points, found, strict=True)]
    _cli.write_folder(replace(config, out=out), table, seconds, run=asdict(base))
    plot(out / "automatic_rate.png", table)
    _cli.print_table("the automatic rate beside the best fixed one", table)


def _measure(config: RunConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Test losses of each seed: before, after the run with the automatic rate, and after those with fixed rates."""
    before, after, reached = [], [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            result = fine_tune(
                replace(config, seed=seed), Path(folder) / "run", eval_every=config.rounds, notify=lambda line: None
            )
        before.append(result.loss_before)
        after.append(result.loss_after)
        reached.append(max(result.metrics[-1]["learning_rates"]))

    def losses_at(rate: float) -> list[float]:
        runs = [replace(config, learning_rate=rate, seed=seed) for seed in seeds]
        return [curve.test_loss[-1] for curve in sweep([prepare(run) for run in runs], config.rounds)]

    start = float(2.0 ** np.round(np.log2(np.median(reached))))
    return {"before": before, "auto": after, "fixed": rate_search.search(losses_at, start)}


def row(point: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: the losses, and the share of the best fixed rate's loss drop that the automatic one has."""
    run, before = point["run"], np.asarray(found["before"])
    rate, best = rate_search.best(found["fixed"])
    shares = (before - np.asarray(found["auto"])) / np.mean(before - np.asarray(best))
    return {
        "layers": run["layers"],
        "lora_rank": run["lora_rank"],
        "local_steps": run["local_steps"],
        "seeds": len(before),
        "loss_before": float(np.mean(before)),
        "loss_auto": float(np.mean(found["auto"])),
        "worst_auto": float(np.max(found["auto"])),
        "best_fixed_rate": rate,
        "rates_tried": len(found["fixed"]),
        "loss_best_fixed": float(np.mean(best)),
        "share_of_the_drop": float(np.mean(shares)),
        "band_90": runner.half_width(shares),
    }


def plot(file: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Plots the share of the loss drop over the local steps, a line for each choice of layers and rank."""
    figure, axes = _plots.subplots(figsize=(6.4, 4))
    for layers, rank in dict.fromkeys((row["layers"], row["lora_rank"]) for row in table):
        rows = [row for row in table if (row["layers"], row["lora_rank"]) == (layers, rank)]
        steps, shares = ([row[name] for row in rows] for name in ("local_steps", "share_of_the_drop"))
        axes.plot(steps, shares, "o-" if layers == "all" else "s--", label=f"{layers}, r = {rank}")
    axes.axhline(1.0, color="0.5", linewidth=1)
    axes.set(xlabel="local steps", ylabel="share of the best fixed rate's loss drop", ylim=(0, None))
    _plots.ticks_at(axes, list(dict.fromkeys(row["local_steps"] for row in table)), log=True)
    axes.grid(alpha=0.3)
    _plots.legend(figure, axes, columns=3)
    _plots.save(figure, file, dpi=100)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
