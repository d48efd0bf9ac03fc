"""Whether the best LoRA rank follows the Hessian's effective rank (Conjecture 3.8 of arXiv 2402.05926).

    python -m experiments.studies.effective_rank
    python -m experiments.studies.best_rank --effective-rank runs/effective_rank/results.json

FedMeZO at each LoRA rank and several learning rates, for the best rate depends on the rank; α = 2r. The conjecture has
the best LoRA rank at or above the effective rank, whose ``results.json`` the second command names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _cli, _plots
from experiments.studies import runner
from fedmezo_jax.errors import UserError


def _variants(ranks: Sequence[int], products: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Each rank at rates of these products η·r: the rates at which runs diverge fall about as 1/r."""
    return {
        f"r = {rank}, η = {product / rank:g}": {
            "lora_rank": rank,
            "lora_alpha": 2.0 * rank,
            "learning_rate": product / rank,
        }
        for rank in ranks
        for product in products
    }


PRESETS: dict[runner.PresetName, runner.Preset] = {
    "small": runner.Preset(
        replace(runner.SMALL, rounds=12), 3, 12, _variants((4, 16, 64, 128), (3.2e-3, 6.4e-3, 1.28e-2))
    ),
    "paper": runner.Preset(runner.PAPER, 3, 50, _variants((4, 8, 16, 32, 64, 128), (1.6e-3, 3.2e-3, 6.4e-3))),
    "smoke": runner.Preset(runner.SMOKE, 2, 2, _variants((2, 4), (4e-3, 8e-3))),
}


@dataclass(frozen=True)
class Config(runner.Config):
    """Which preset, and what of it to change."""

    effective_rank: Path | None = None
    """results.json of experiments.studies.effective_rank, of the same model and data"""


def main(config: Config) -> None:
    """Runs the study, with a plot of its own."""
    measured = _effective_ranks(config)
    out, outcomes = runner.run(
        config, "best_rank", PRESETS, title="best LoRA rank", conclude=partial(conclude, measured=measured)
    )
    plot(out / "best_rank.png", conclude(outcomes, measured), outcomes)


def conclude(outcomes: Sequence[runner.Outcome], measured: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a LoRA rank: the loss at its best η, and its gap to the best rank, paired by seed."""
    tuned = {rank: runner.best_of(own) for rank, own in _by_rank(outcomes).items()}
    winner = runner.best_of([best for best, _ in tuned.values()]).best
    rows = []
    for rank, (one, at_an_end) in tuned.items():
        gap = one.after - winner.after
        row = {
            "lora_rank": rank,
            "best_learning_rate": one.config.learning_rate,
            "at_an_end_of_the_sweep": at_an_end,
            "seeds": len(one.after),
            "loss_after": float(one.after.mean()),
            "band_90": runner.half_width(one.after),
            "above_the_best": float(gap.mean()),
            "above_band_90": runner.half_width(gap),
        }
        if measured:
            row |= {name: measured.get(rank, {}).get(name) for name in ("effective_rank", "effective_rank_positive")}
        rows.append(row)
    return rows


def _by_rank(outcomes: Sequence[runner.Outcome]) -> dict[int, list[runner.Outcome]]:
    ranks = dict.fromkeys(one.config.lora_rank for one in outcomes)
    return {rank: [one for one in outcomes if one.config.lora_rank == rank] for rank in ranks}


def _effective_ranks(config: Config) -> dict[int, dict[str, Any]]:
    """Rows of the whole Hessian after training, by LoRA rank; ``{}`` where no file is given."""
    if config.effective_rank is None:
        return {}
    run = PRESETS[config.preset].run
    wanted = (config.model or run.model, config.data or run.data, "trained", "all")
    try:
        rows = json.loads(config.effective_rank.read_text(encoding="utf-8"))["rows"]
        keys = ("model", "data", "state", "layer")
        return {row["lora_rank"]: row for row in rows if tuple(row[key] for key in keys) == wanted}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--effective-rank {config.effective_rank} is no results.json of experiments.studies.effective_rank"
        ) from None


def plot(file: Path, rows: Sequence[dict[str, Any]], outcomes: Sequence[runner.Outcome]) -> None:
    """Test loss over the LoRA rank, at each η and at each rank's best; the effective rank as a line of its own."""
    figure, axes = _plots.subplots(figsize=(6.4, 4.6))
    for i, rate in enumerate(dict.fromkeys(one.config.learning_rate for one in outcomes)):
        own = [one for one in outcomes if one.config.learning_rate == rate]
        ranks = [one.config.lora_rank for one in own]
        axes.plot(ranks, [one.after.mean() for one in own], ".:", color=f"C{i}", label=f"η = {rate:g}")
    ranks, after = ([row[name] for row in rows] for name in ("lora_rank", "loss_after"))
    band = [row["band_90"] or 0 for row in rows]
    axes.errorbar(ranks, after, band, fmt="ko-", capsize=3, label="at the rank's best η, 90 %")
    top = np.max([one.after.mean() for one in outcomes if one.config.learning_rate == rows[0]["best_learning_rate"]])
    axes.set(xlabel="LoRA rank", ylabel="test loss (nats/token)", ylim=(None, top + 0.3))
    _plots.ticks_at(axes, ranks, log=True)
    axes.set_title("best LoRA rank")
    axes.grid(alpha=0.3)
    shown = [axes]
    if any("effective_rank_positive" in row for row in rows):
        other = axes.twinx()
        shown.append(other)
        other.plot(ranks, [row["effective_rank_positive"] for row in rows], "s-", color="0.6", label="tr H₊/‖H₊‖")
        other.set_ylabel("effective rank")
    _plots.legend(figure, *shown)
    _plots.save(figure, file, dpi=90)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
