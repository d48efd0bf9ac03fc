"""Conclusions from measured constants: the rows and the plot of ``experiments.studies.theory_constants``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import _plots
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.theory import constants, spectrum

_BY_CLIENT = ("client_gradients", "noisy", "disparities")


class Conclusion(NamedTuple):
    """The conclusions from the constants. H and the gradients are those at the last checkpoint.

    Attributes:
        rows: rows of the table.
        smoothness: L = ‖H‖.
        rank: tr(H₊)/‖H₊‖.
        parameters: d.
        gradient: ‖∇f‖².
        noisy: E‖∇F‖², over all clients' batches.
        trace: tr(H).
        curvature: E ∇FᵀH∇F.
    """

    rows: list[dict[str, Any]]
    smoothness: float
    rank: float
    parameters: int
    gradient: float
    noisy: float
    trace: float
    curvature: float


def conclude(run: RunConfig, measured: dict[str, Any]) -> Conclusion:
    """Returns the constants, with the conditions, schedule and rates that follow from them."""
    checkpoints = measured["at"]
    last, d = checkpoints[-1], checkpoints[-1]["parameters"]
    probes = [spectrum.Probe(**probe) for probe in last["probes"]]
    n, h, t = run.clients, run.local_steps, run.rounds
    smoothness = max(max(probe["norm"] for probe in checkpoint["probes"]) for checkpoint in checkpoints)
    trace, ranks = spectrum.estimate([probe.trace for probe in probes]), spectrum.effective_ranks(probes)
    r = ranks["positive"]
    client_gradients, noise, disparities = (
        np.concatenate([checkpoint[name] for checkpoint in checkpoints]) for name in _BY_CLIENT
    )
    c_g, sigma_g = constants.envelope(client_gradients, noise, 1.0)
    c_h, sigma_h = constants.envelope(np.repeat([checkpoint["gradient"] for checkpoint in checkpoints], n), disparities)
    limits = constants.rate_limits(smoothness, c_g, d, n, h)
    schedule = constants.schedule(r, n, h, t)
    non_iid, subtracted = constants.rate_non_iid(r, n, h, t, c_h, sigma_h**0.5)
    iid, paper = constants.rate_iid(r, n, h, t), constants.rate_iid(r, 3, 30, 500)
    largest = max(checkpoint["gradient"] for checkpoint in checkpoints)

    def verdict(bound: float) -> str:
        comparison = "vacuous: above" if bound >= largest else "below"
        return f"{comparison} the largest ‖∇f‖² on the path, {largest:.2g}"

    rows = [
        _line("constants", "L = ‖H‖, largest on the path", smoothness),
        _line(
            "constants",
            "L from gradients a stretch of the path apart",
            max(checkpoint.get("path_smoothness", 0) for checkpoint in checkpoints),
        ),
        _line("constants", "tr(H)", *trace),
        _line("constants", "r = tr(H₊)/‖H₊‖", r, remark=f"tr(H)/‖H‖ = {ranks['plain']:.3g}; d = {d:,}"),
        _line("constants", "γ", constants.gamma(d, r)),
        _line("constants", "ζ", constants.zeta(d, r)),
        _line("constants", "c_g", c_g, remark="1 or more"),
        _line("constants", "σ_g²", sigma_g),
        _line("constants", "c_h", c_h),
        _line("constants", "σ_h²", sigma_h),
        _line("conditions", "η ≤ 1/(3HL√(c_g d))", limits.by_dimension, remark=f"η in use: {run.learning_rate:g}"),
        _line("conditions", "η ≤ N/(3 c_g H L)", limits.by_clients),
        _line("conditions", "η ≤ 1/H²", limits.by_steps),
        _line(
            "conditions", "η of the rate, (NH)^½(rT)^-½", schedule.learning_rate, remark=_met(schedule[0], min(limits))
        ),
        _line(
            "conditions",
            "μ of the rate, (NH)^¼ r^-½",
            schedule.perturbation_scale,
            remark=f"in use: {run.perturbation_scale:g}",
        ),
        _line("rates", "i.i.d., r^{3/2}(NHT)^-½, hidden constant taken as 1", iid, remark=verdict(iid)),
        _line("rates", "the same at N=3, H=30, T=500", paper, remark=verdict(paper)),
        _line("rates", "non-i.i.d., r^{3/2}(c̃_h NHT)^-½", non_iid, remark=verdict(non_iid)),
        _line("rates", "what it subtracts, σ_h²/(c_h N)", subtracted),
    ]
    noisy, curvature = float(np.mean(last["noisy"])), float(np.mean(last["curvature"]))
    norm = max(probe.norm for probe in probes)
    return Conclusion(rows, norm, r, d, last["gradient"], noisy, trace.mean, curvature)


def _met(rate: float, limit: float) -> str:
    return "the conditions allow it" if rate <= limit else f"{rate / limit:.2g} times what the conditions allow"


def descent_rows(conclusion: Conclusion, rates: Sequence[float], descent: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns observed and predicted changes of f per step and η, and the largest η for which a bound shows descent."""
    changes = np.array(descent["changes"])
    norms = (conclusion.gradient, conclusion.noisy)
    factors = [constants.gamma(conclusion.parameters, rank) for rank in (conclusion.rank, float(conclusion.parameters))]
    rows = []
    for i, rate in enumerate(rates):
        bound, bound_without_rank = (
            constants.descent_bound(rate, *norms, conclusion.smoothness, factor) for factor in factors
        )
        second = constants.descent_second_order(rate, *norms, conclusion.trace, conclusion.curvature)
        observed = spectrum.estimate(changes[:, i])
        remark = "bound vacuous: above 0" if bound >= 0 else ""
        row = _line("descent of one step, N = H = 1", f"η = {rate:g}", *observed, remark=remark)
        rows.append(row | {"second_order": second, "bound": bound, "bound_without_rank": bound_without_rank})
    for name, factor in zip(("with r", "with r = d"), factors, strict=True):
        limit = 2 * conclusion.gradient / (conclusion.smoothness * factor * conclusion.noisy)
        rows.append(_line("conditions", f"η up to which one step's bound, {name}, promises descent", limit))
    return sorted(rows, key=lambda row: row["part"])


def _line(part: str, quantity: str, value: float, error: float | None = None, remark: str = "") -> dict[str, Any]:
    """A row of the table; the last columns are for descents. An infinite value becomes None, as JSON has none."""
    row = {
        "part": part,
        "quantity": quantity,
        "value": value if np.isfinite(value) else None,
        "error": error,
        "remark": remark,
    }
    return row | dict.fromkeys(("second_order", "bound", "bound_without_rank"))


def plot(file: Path, table: Sequence[dict[str, Any]]) -> None:
    """Plots one step's change of f over η: observed, predicted and bound."""
    figure, axes = _plots.subplots(figsize=(6, 4))
    rows = [row for row in table if row["bound"] is not None]
    rates = [float(row["quantity"].removeprefix("η = ")) for row in rows]
    observed, error = ([row[name] for row in rows] for name in ("value", "error"))
    axes.errorbar(rates, observed, error, fmt="ko", markersize=4, label="observed")
    for name, label in (
        ("second_order", "second order, measured tr(H)"),
        ("bound", "bound, with r"),
        ("bound_without_rank", "bound, r = d"),
    ):
        axes.plot(rates, [row[name] for row in rows], label=label)
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set(xlabel="η", ylabel="f(θ′) − f(θ), nats", title="one step: below 0 is descent")
    axes.set_yscale("symlog", linthresh=max(np.abs(observed).min(), 1e-6))
    axes.grid(alpha=0.3)
    _plots.ticks_at(axes, rates, log=True)
    _plots.legend(figure, axes, columns=2)
    _plots.save(figure, file, dpi=90)
