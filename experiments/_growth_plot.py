"""The plot of ``experiments.memory --sweep``: peak bytes of each program over the option that is varied."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

from experiments import _plots
from fedmezo_jax.planning.hardware import GIB

STYLES = {
    "forward": "k--",
    "fedmezo": "C2v-",
    "forward_gradient": "C4D-",
    "backprop": "C3^-",
    "backprop_checkpointed": "C1s-",
}


def plot_growth(file: Path, rows: Sequence[dict[str, Any]], field: str, memory: float, title: str) -> None:
    """Plots the peak GiB of each program over ``field``, and the device's memory as a line, as a PNG."""
    figure, axes = _plots.subplots(figsize=(6.8, 4.2))
    values = list(dict.fromkeys(row[field] for row in rows))
    for what, precision in dict.fromkeys((row["what"], row["precision"]) for row in rows):
        program_rows = [row for row in rows if (row["what"], row["precision"]) == (what, precision)]
        style = "C0o-" if precision == "paired" else STYLES[what]
        label = f"{what.replace('_', ', ')}, {precision}"
        axes.plot(range(len(values)), [(row["peak_bytes"] or nan) / GIB for row in program_rows], style, label=label)
    axes.axhline(memory / GIB, color="0.6", linewidth=1, label="memory of the device")
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.set(xlabel=field.replace("_", " "), ylabel="peak GiB", yscale="log")
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3, which="both")
    _plots.legend(figure, axes)
    _plots.save(figure, file, dpi=120)
