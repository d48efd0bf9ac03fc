"""The answer of an experiment's rows to the paper's question: the main figures, and whether they agree with the paper.

Means differ if their 90 % intervals do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple

from experiments.studies.paper import QUESTIONS

Rows = Sequence[dict[str, Any]]

AGREES, DIFFERS, NO_DIFFERENCE = "as in the paper", "not as in the paper", "no difference seen"
OPEN, NOT_COMPARABLE = "open in the paper", "not comparable"
LITTLE = 0.02
"""Losses differ little if the largest exceeds the smallest by at most this share."""


class Finding(NamedTuple):
    """The summary of a result.

    Attributes:
        here: the figures.
        verdict: how they compare with the paper's finding.
    """

    here: str
    verdict: str


def finding(name: str, rows: Rows) -> Finding:
    """Returns the finding of an experiment by the name of its module; "see the table" for incomplete rows."""
    try:
        return _RULES[name](rows)
    except (KeyError, TypeError, ValueError, IndexError, StopIteration):
        return Finding("see the table", "-")


def _loss(row: dict[str, Any]) -> str:
    if row["loss_after"] is None:
        return "diverged"
    return f"{row['loss_after']:.3f}" + ("" if row["band_90"] is None else f" ± {row['band_90']:.3f}")


def _losses(rows: Rows) -> str:
    return "; ".join(f"{row['variant']}: {_loss(row)}" for row in rows)


def _change(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Difference of two mean losses; 0 if their intervals overlap. A single seed has no interval."""
    means = [inf if row["loss_after"] is None else row["loss_after"] for row in (before, after)]
    difference = means[1] - means[0]
    return difference if abs(difference) > before["band_90"] + after["band_90"] else 0.0


def _verdict(change: float) -> str:
    """The verdict if the paper's finding is a change below 0."""
    return AGREES if change < 0 else DIFFERS if change > 0 else NO_DIFFERENCE


def _falls(rows: Rows) -> Finding:
    return Finding(_losses(rows), _verdict(_change(rows[0], rows[-1])))


def _rises(rows: Rows) -> Finding:
    return Finding(_losses(rows), _verdict(_change(rows[-1], rows[0])))


def _flat(rows: Rows) -> Finding:
    losses = [row["loss_after"] for row in rows]
    return Finding(_losses(rows), AGREES if max(losses) <= (1 + LITTLE) * min(losses) else DIFFERS)


def _open(rows: Rows) -> Finding:
    return Finding(_losses(rows), OPEN)


def _convergence(rows: Rows) -> Finding:
    best = {row["variant"].rpartition(", η = ")[0]: row for row in rows if row["best"]}
    return Finding(_losses(list(best.values())), _verdict(_change(best["FedAvg, SGD"], best["FedMeZO"])))


def _model_size(rows: Rows) -> Finding:
    if all(row["variant"] in QUESTIONS["model_size"].by_variant for row in rows):
        return _rises(rows)
    return Finding(_losses(rows), NOT_COMPARABLE)  # other models, with tokenizers of their own


def _divergence(rows: Rows) -> Finding:
    rounds: dict[float, list[float]] = {}
    for row in rows:
        rounds.setdefault(row["learning_rate"], []).append(row["first_divergence"] or inf)
    medians = [sorted(first_rounds)[len(first_rounds) // 2] for _, first_rounds in sorted(rounds.items())]
    here = "; ".join(
        f"η = {rate:g}: {', '.join('never' if t == inf else f'{t:.0f}' for t in first_rounds)}"
        for rate, first_rounds in sorted(rounds.items())
    )
    is_earlier = medians == sorted(medians, reverse=True)
    verdict = NO_DIFFERENCE if len(set(medians)) == 1 else AGREES if is_earlier else DIFFERS
    return Finding(f"first round of divergence: {here}", verdict)


def _personalised_rates(rows: Rows) -> Finding:
    by_variant = {row["variant"]: row for row in rows}
    model_diff = by_variant["model-diff"]
    here = f"{_losses([by_variant['frozen'], model_diff])}; paired p = {model_diff['p_paired']:.2f}"
    return Finding(here, _verdict(model_diff["over_frozen"] if model_diff["p_paired"] < 0.05 else 0.0))


def _heterogeneity_index(rows: Rows) -> Finding:
    correlations = [abs(row["to_gradient"]) for row in rows if row["index"] == "model-diff"]
    return Finding(f"model-diff and gradient disparity: Spearman's |ρ| is at most {max(correlations):.2f}", OPEN)


def _effective_rank(rows: Rows) -> Finding:
    ranks: dict[str, list[float]] = {}
    for row in rows:
        if row["state"] == "trained" and row["layer"] == "all":
            ranks.setdefault(f"{row['model']}, {row['data']}", []).append(row["effective_rank"])
    return Finding("; ".join(f"{name}: {_range(values, '.1f')}" for name, values in ranks.items()), OPEN)


def _best_rank(rows: Rows) -> Finding:
    here = "; ".join(f"r = {row['lora_rank']}: {_loss(row)}" for row in rows)
    best = min(rows, key=lambda row: row["loss_after"])
    if not any(row["above_the_best"] > row["above_band_90"] for row in rows if row is not best):
        return Finding(here, NO_DIFFERENCE)
    return Finding(here, AGREES if best["lora_rank"] >= best["effective_rank"] else DIFFERS)


def _theory_constants(rows: Rows) -> Finding:
    vacuous = [row["remark"].startswith("vacuous") for row in rows if row["part"] == "rates" and row["remark"]]
    return Finding(f"{sum(vacuous)} of {len(vacuous)} bounds on whole runs are vacuous", OPEN)


def _convergence_rate(rows: Rows) -> Finding:
    fits = [row for row in rows if "slope" in row]
    here = "; ".join(f"{row['varied']}: {row['slope']:+.2f} ± {row['error']:.2f}" for row in fits)
    agrees = all(abs(row["slope"] - row["theorem"]) <= 2 * row["error"] for row in fits)
    return Finding(f"log-log slopes: {here}", AGREES if agrees else "not confirmed; the theorem is an upper bound")


def _task_metrics(rows: Rows) -> Finding:
    first, last = rows[0], rows[-1]
    matches = (
        100 * row[name] for row, name in ((first, "exact_match"), (last, "exact_match"), (last, "standard_error"))
    )
    gain, error = last["exact_match"] - first["exact_match"], last["standard_error"]
    here = "{:.1f} → {:.1f} ± {:.1f} % right; ".format(*matches)
    return Finding(
        f"{here}test loss {first['test_loss']:.3f} → {last['test_loss']:.3f}", _verdict(-gain * (abs(gain) > 2 * error))
    )


def _communication(rows: Rows) -> Finding:
    sent = {row["sent"]: row["uplink_bytes"] for row in rows}
    lora, weights = sent["LoRA, float16"], sent["all weights, 16 bits (counted)"]
    here = f"LoRA in float16 {lora / 1e6:.2f} MB, coefficients {sent['coefficients, per-client directions']} bytes"
    if abs(weights / 6.39e9 - 1) > 0.1:
        return Finding(here, NOT_COMPARABLE)  # another model
    return Finding(here, AGREES if abs(lora / 80.45e6 - 1) <= 0.1 else DIFFERS)


def _memory(rows: Rows) -> Finding:
    ratios = {
        program: [row["over_forward"] for row in rows if row["what"] == program and row["over_forward"]]
        for program in ("fedmezo", "backprop")
    }
    here = "of a forward pass: step {}, back-propagation {} times".format(
        *(_range(values, ".2f") for values in ratios.values())
    )
    return Finding(here, AGREES if max(ratios["fedmezo"]) < min(ratios["backprop"]) else DIFFERS)


def _step(rows: Rows) -> Finding:
    here = f"{_range([row['step_over_two_forwards'] for row in rows], '.2f')} times two forward passes"
    speedups = [row["speedup_over_peer"] for row in rows if row["speedup_over_peer"]]
    return Finding(here + (f"; {_range(speedups, '.2f')} times as fast as PyTorch" if speedups else ""), NOT_COMPARABLE)


def _range(values: Sequence[float], form: str) -> str:
    low, high = (format(end, form) for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


_RULES: dict[str, Callable[[Rows], Finding]] = {
    "convergence": _convergence,
    "perturbation_scale": _rises,
    "local_steps": _falls,
    "batch_size": _rises,
    "clients": _flat,
    "partitioners": _falls,
    "lora_rank": _open,
    "model_size": _model_size,
    "divergence": _divergence,
    "personalised_rates": _personalised_rates,
    "heterogeneity_index": _heterogeneity_index,
    "effective_rank": _effective_rank,
    "best_rank": _best_rank,
    "theory_constants": _theory_constants,
    "convergence_rate": _convergence_rate,
    "task_metrics": _task_metrics,
    "communication": _communication,
    "memory": _memory,
    "step": _step,
}
"""Module → function from its rows to the finding, for each question that the paper treats."""
