"""What measured constants come to: the rows and the plot of ``experiments.studies.theory_constants``."""

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
    """What the constants come to.

    Attributes:
        rows: of the table.
        smoothness: L = ‖H‖ at the last checkpoint.
        rank: tr(H₊)/‖H₊‖ there.
        parameters: d.
        gradient: ‖∇f‖² there.
        noisy: E‖∇F‖² there, over all clients' batches.
        trace: tr(H) there.
        curvature: E ∇FᵀH∇F there.
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
    """Constants, and what conditions, schedule and rates they give."""
    at = measured["at"]
    last, d = at[-1], at[-1]["parameters"]
    probes = [spectrum.Probe(**probe) for probe in last["probes"]]
    n, h, t = run.clients, run.local_steps, run.rounds
    smoothness = max(max(probe["norm"] for probe in one["probes"]) for one in at)
    trace, ranks = spectrum.estimate([probe.trace for probe in probes]), spectrum.effective_ranks(probes)
    r = ranks["positive"]
    own, noise, apart = (np.concatenate([one[name] for one in at]) for name in _BY_CLIENT)
    c_g, sigma_g = constants.envelope(own, noise, 1.0)
    c_h, sigma_h = constants.envelope(np.repeat([one["gradient"] for one in at], n), apart)
    limits = constants.rate_limits(smoothness, c_g, d, n, h)
    schedule = constants.schedule(r, n, h, t)
    non_iid, subtracted = constants.rate_non_iid(r, n, h, t, c_h, sigma_h**0.5)
    iid, paper = constants.rate_iid(r, n, h, t), constants.rate_iid(r, 3, 30, 500)
    largest = max(one["gradient"] for one in at)

    def judged(bound: float) -> str:
        word = "vacuous: above" if bound >= largest else "below"
        return f"{word} the largest ‖∇f‖² on the path, {largest:.2g}"

    rows = [
        _line("constants", "L = ‖H‖, largest on the path", smoothness),
        _line(
            "constants",
            "L from gradients a stretch of the path apart",
            max(one.get("path_smoothness", 0) for one in at),
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
        _line("rates", "i.i.d., r^{3/2}(NHT)^-½, hidden constant taken as 1", iid, remark=judged(iid)),
        _line("rates", "the same at N=3, H=30, T=500", paper, remark=judged(paper)),
        _line("rates", "non-i.i.d., r^{3/2}(c̃_h NHT)^-½", non_iid, remark=judged(non_iid)),
        _line("rates", "what it subtracts, σ_h²/(c_h N)", subtracted),
    ]
    noisy, curvature = float(np.mean(last["noisy"])), float(np.mean(last["curvature"]))
    norm = max(probe.norm for probe in probes)
    return Conclusion(rows, norm, r, d, last["gradient"], noisy, trace.mean, curvature)


def _met(rate: float, limit: float) -> str:
    return "the conditions allow it" if rate <= limit else f"{rate / limit:.2g} times what the conditions allow"


def descent_rows(found: Conclusion, rates: Sequence[float], descent: dict[str, Any]) -> list[dict[str, Any]]:
    """Observed and predicted change of f in a step of each η, and up to which η the bounds promise descent."""
    changes = np.array(descent["changes"])
    given = (found.gradient, found.noisy)
    factors = [constants.gamma(found.parameters, rank) for rank in (found.rank, float(found.parameters))]
    rows = []
    for i, rate in enumerate(rates):
        bound, without = (constants.descent_bound(rate, *given, found.smoothness, factor) for factor in factors)
        second = constants.descent_second_order(rate, *given, found.trace, found.curvature)
        observed = spectrum.estimate(changes[:, i])
        remark = "bound vacuous: above 0" if bound >= 0 else ""
        row = _line("descent of one step, N = H = 1", f"η = {rate:g}", *observed, remark=remark)
        rows.append(row | {"second_order": second, "bound": bound, "bound_without_rank": without})
    for name, factor in zip(("with r", "with r = d"), factors, strict=True):
        limit = 2 * found.gradient / (found.smoothness * factor * found.noisy)
        rows.append(_line("conditions", f"η up to which one step's bound, {name}, promises descent", limit))
    return sorted(rows, key=lambda row: row["part"])


def _line(part: str, quantity: str, value: float, error: float | None = None, remark: str = "") -> dict[str, Any]:
    """A row of the table; the last columns are for descents. An infinite value, which JSON cannot say, is left out."""
    row = {
        "part": part,
        "quantity": quantity,
        "value": value if np.isfinite(value) else None,
        "error": error,
        "remark": remark,
    }
    return row | dict.fromkeys(("second_order", "bound", "bound_without_rank"))


def plot(file: Path, table: Sequence[dict[str, Any]]) -> None:
    """One step's change of f over η: observed, predicted and bounded."""
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
