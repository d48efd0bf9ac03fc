"""Whether a forecast held, and what stands in a row that could not be measured."""

from __future__ import annotations

MEMORY, TIME = 0.10, 2.0
"""How far a measurement may be off: relative to the compiler's bytes, and as a multiple of the roofline's seconds."""


def memory_off(measured: int | None, forecast: int | None) -> bool | None:
    """Whether a peak is more than a tenth from the compiler's plan; None where one of them is unknown."""
    return None if not measured or not forecast else abs(measured / forecast - 1) > MEMORY


def time_off(measured: float, forecast: float) -> bool:
    """Whether a time is more than twice its roofline, or less than half of it."""
    return not 1 / TIME <= measured / forecast <= TIME


def error_line(error: Exception) -> str:
    """An exception as one line of at most 300 characters."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
