"""The picture of ``experiments.memory --sweep``: peak bytes of each program as something grows."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

GIB = 2**30


def plot_growth(file: Path, rows: Sequence[dict[str, Any]], field: str, memory: float, title: str) -> None:
    """Peak GiB of each program over ``field``, and the device's memory as a line, as a PNG."""
    figure, axes = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
    values = list(dict.fromkeys(row[field] for row in rows))
    names = list(dict.fromkeys(row["what"] for row in rows))
    for name, style in zip(names, ("k--", "C0o-", "C3^-", "C1s-"), strict=True):
        peaks = [(row["peak_bytes"] or nan) / GIB for row in rows if row["what"] == name]
        axes.plot(range(len(values)), peaks, style, label=name.replace("_", ", "))
    axes.axhline(memory / GIB, color="0.6", linewidth=1, label="memory of the device")
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.set(xlabel=field.replace("_", " "), ylabel="peak GiB", yscale="log")
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
