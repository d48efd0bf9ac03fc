"""The constants of the paper's assumptions, and the bounds of its theorems (Sec. 3 of arXiv 2402.05926).

d is the number of trained parameters, r the effective rank of Assumption 1, L the smoothness constant, N clients, H
local steps, T rounds, n directions per step.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats


class Envelope(NamedTuple):
    """The line y = slope·x + intercept on or above all measured points.

    Attributes:
        slope: c.
        intercept: σ².
    """

    slope: float
    intercept: float


def envelope(x: Any, y: Any, least_slope: float = 0.0) -> Envelope:
    """Returns the bound y ≤ c·x + σ² on measured points with the least total slack, c ≥ ``least_slope`` and σ² ≥ 0.

    For the gradient error this is E‖∇F_i‖² ≤ c_g‖∇f_i‖² + σ_g² (with c_g ≥ 1, as the left-hand side contains ‖∇f_i‖²),
    and for the heterogeneity ‖∇f − ∇f_i‖² ≤ c_h‖∇f‖² + σ_h².

    Args:
        x: ``[points]``.
        y: ``[points]``.
        least_slope: lower bound on the slope.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    scale_x, scale_y = np.abs(x).max() or 1.0, np.abs(y).max() or 1.0
    coefficients = np.stack([x / scale_x, np.ones_like(x)], axis=1)
    least_scaled_slope = least_slope * scale_x / scale_y
    solution = optimize.linprog(
        coefficients.sum(axis=0), -coefficients, -y / scale_y, bounds=[(least_scaled_slope, None), (0, None)]
    )
    slope, intercept = solution.x
    return Envelope(float(slope * scale_y / scale_x), float(intercept * scale_y))


def gamma(d: int, r: float, n: int = 1) -> float:
    """Returns γ = (dr + d − 2)/(n(d + 2)), which multiplies the quadratic term of a step; about (r + 1)/n."""
    return (d * r + d - 2) / (n * (d + 2))


def zeta(d: int, r: float, n: int = 1) -> float:
    """Returns ζ = (d + 2)n²/((dr + d − 2)(d + n − 1)), about n/(rd)."""
    return (d + 2) * n**2 / ((d * r + d - 2) * (d + n - 1))


class RateLimits(NamedTuple):
    """The largest η that each of the proofs' three conditions allows.

    Attributes:
        by_dimension: 1/(3HL√(c_g d)).
        by_clients: N/(3 c_g H L).
        by_steps: 1/H².
    """

    by_dimension: float
    by_clients: float
    by_steps: float


def rate_limits(smoothness: float, c_g: float, d: int, clients: int, steps: int) -> RateLimits:
    """Returns the limits of η ≤ 1/(3HL√(c_g d)), η ≤ N/(3 c_g H L) and η ≤ 1/H²."""
    return RateLimits(
        1 / (3 * steps * smoothness * math.sqrt(c_g * d)), clients / (3 * c_g * steps * smoothness), steps**-2
    )


class Schedule(NamedTuple):
    """The η and μ for which a convergence rate is proved.

    Attributes:
        learning_rate: η.
        perturbation_scale: μ.
    """

    learning_rate: float
    perturbation_scale: float


def schedule(r: float, clients: int, steps: int, rounds: int) -> Schedule:
    """Returns η = (NH)^½(rT)^−½ and μ = (NH)^¼ r^−½, for which the i.i.d. rate holds."""
    client_steps = clients * steps
    return Schedule(math.sqrt(client_steps / (r * rounds)), client_steps**0.25 / math.sqrt(r))


def rate_iid(r: float, clients: int, steps: int, rounds: int) -> float:
    """Returns r^{3/2}(NHT)^{−½}, the i.i.d. bound on the mean of ‖∇f‖², without its hidden constant."""
    return r**1.5 / math.sqrt(clients * steps * rounds)


def rate_non_iid(r: float, clients: int, steps: int, rounds: int, c_h: float, sigma_h: float) -> tuple[float, float]:
    """Returns r^{3/2}(c̃_h NHT)^{−½} with c̃_h = c_h + N, and the subtracted term σ_h²(c_h N)^{−1} (inf at c_h = 0)."""
    subtracted = sigma_h**2 / (c_h * clients) if c_h else math.inf
    return r**1.5 / math.sqrt((c_h + clients) * clients * steps * rounds), subtracted


def descent_bound(rate: Any, gradient: float, noisy: float, smoothness: float, factor: float) -> Any:
    """Returns one step's bound E f(θ') − f(θ) ≤ −η‖∇f‖² + ½η²·L·γ·E‖∇F‖² (Theorem 1 of MeZO, arXiv 2305.17333).

    Args:
        rate: η, scalar or array.
        gradient: ‖∇f‖².
        noisy: E‖∇F‖² over mini-batches.
        smoothness: L, here ‖H‖.
        factor: γ with the effective rank r, or with r = d if no low rank is assumed.
    """
    return -rate * gradient + rate**2 * smoothness * factor * noisy / 2


def descent_second_order(rate: Any, gradient: float, noisy: float, trace: float, curvature: float) -> Any:
    """Returns E f(θ') − f(θ) of one step exactly, for a quadratic f, unbiased batches and z ~ N(0, I).

    It is −η‖∇f‖² + ½η²(tr(H)·E‖∇F‖² + 2·E ∇FᵀH∇F), by the fourth moments of z.

    Args:
        rate: η, scalar or array.
        gradient: ‖∇f‖².
        noisy: E‖∇F‖².
        trace: tr(H).
        curvature: E ∇FᵀH∇F.
    """
    return -rate * gradient + rate**2 * (trace * noisy + 2 * curvature) / 2


class PowerLaw(NamedTuple):
    """The fit y ∝ x^slope.

    Attributes:
        slope: the exponent.
        error: its standard error.
    """

    slope: float
    error: float


def power_law(x: Any, y: Any) -> PowerLaw:
    """Fits log y over log x by least squares; needs at least three points."""
    fit: Any = stats.linregress(np.log(np.asarray(x, np.float64)), np.log(np.asarray(y, np.float64)))
    return PowerLaw(float(fit.slope), float(fit.stderr))
