"""Whether the best LoRA rank follows the Hessian's effective rank (Conjecture 3.8 of arXiv 2402.05926).

    python -m experiments.studies.effective_rank
    python -m experiments.studies.best_rank --effective-rank runs/effective_rank/results.json

Runs FedMeZO at each LoRA rank with several learning rates, because the best rate depends on the rank; α = 2r. According
to the conjecture the best LoRA rank is at least the effective rank, which the second command reads from a file.
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
    """Each rank at learning rates with these products η·r: runs diverge at rates that fall about as 1/r."""
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
    """The preset, and changes to it."""

    effective_rank: Path | None = None
    """results.json of experiments.studies.effective_rank, of the same model and data"""


def main(config: Config) -> None:
    """Runs the study and draws its plot."""
    measured = _effective_ranks(config)
    out, outcomes = runner.run(
        config, "best_rank", PRESETS, title="best LoRA rank", conclude=partial(conclude, measured=measured)
    )
    plot(out / "best_rank.png", conclude(outcomes, measured), outcomes)


def conclude(outcomes: Sequence[runner.Outcome], measured: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per LoRA rank: the loss at its best η, and its gap to the best rank, paired by seed."""
    tuned = {rank: runner.best_of(sweep) for rank, sweep in _by_rank(outcomes).items()}
    winner = runner.best_of([outcome for outcome, _ in tuned.values()]).best
    rows = []
    for rank, (best, at_an_end) in tuned.items():
        gap = best.after - winner.after
        row = {
            "lora_rank": rank,
            "best_learning_rate": best.config.learning_rate,
            "at_an_end_of_the_sweep": at_an_end,
            "seeds": len(best.after),
            "loss_after": float(best.after.mean()),
            "band_90": runner.half_width(best.after),
            "above_the_best": float(gap.mean()),
            "above_band_90": runner.half_width(gap),
        }
        if measured:
            row |= {name: measured.get(rank, {}).get(name) for name in ("effective_rank", "effective_rank_positive")}
        rows.append(row)
    return rows


def _by_rank(outcomes: Sequence[runner.Outcome]) -> dict[int, list[runner.Outcome]]:
    ranks = dict.fromkeys(outcome.config.lora_rank for outcome in outcomes)
    return {rank: [outcome for outcome in outcomes if outcome.config.lora_rank == rank] for rank in ranks}


def _effective_ranks(config: Config) -> dict[int, dict[str, Any]]:
    """Rows of the whole Hessian after training, by LoRA rank; ``{}`` if no file is given."""
    if config.effective_rank is None:
        return {}
    run = runner.preset_of(PRESETS, config.preset).run
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
    """Test loss over the LoRA rank, at each η and at each rank's best; the effective rank as a separate line."""
    figure, axes = _plots.subplots(figsize=(6.4, 4.6))
    for i, rate in enumerate(dict.fromkeys(outcome.config.learning_rate for outcome in outcomes)):
        at_rate = [outcome for outcome in outcomes if outcome.config.learning_rate == rate]
        ranks = [outcome.config.lora_rank for outcome in at_rate]
        axes.plot(ranks, [outcome.after.mean() for outcome in at_rate], ".:", color=f"C{i}", label=f"η = {rate:g}")
    ranks, after = ([row[name] for row in rows] for name in ("lora_rank", "loss_after"))
    band = [row["band_90"] or 0 for row in rows]
    axes.errorbar(ranks, after, band, fmt="ko-", capsize=3, label="at the rank's best η, 90 %")
    top = np.max(
        [outcome.after.mean() for outcome in outcomes if outcome.config.learning_rate == rows[0]["best_learning_rate"]]
    )
    axes.set(xlabel="LoRA rank", ylabel="test loss (nats/token)", ylim=(None, top + 0.3))
    _plots.ticks_at(axes, ranks, log=True)
    axes.set_title("best LoRA rank")
    axes.grid(alpha=0.3)
    all_axes = [axes]
    if any("effective_rank_positive" in row for row in rows):
        rank_axes = axes.twinx()
        all_axes.append(rank_axes)
        rank_axes.plot(ranks, [row["effective_rank_positive"] for row in rows], "s-", color="0.6", label="tr H₊/‖H₊‖")
        rank_axes.set_ylabel("effective rank")
    _plots.legend(figure, *all_axes)
    _plots.save(figure, file, dpi=90)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
