"""Pictures of results, drawn without a display."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

if TYPE_CHECKING:
    from fedmezo_jax.run.config import RunConfig
    from fedmezo_jax.run.context import RunContext

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def subplots(*shape: int, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes: ``plt.subplots`` with a layout that leaves room for all labels."""
    return plt.subplots(*shape, layout="constrained", **options)


def save(figure: Figure, file: Path | str, dpi: int = 100) -> None:
    """Writes the figure as a PNG and closes it."""
    figure.savefig(file, dpi=dpi)
    plt.close(figure)


def plot_loss(file: Path, loss_before: float, metrics: Sequence[dict[str, Any]], config: RunConfig) -> None:
    """Training and test loss over rounds, as a PNG."""
    figure, axes = subplots(figsize=(6.4, 4))
    rounds = [record["round"] for record in metrics]
    axes.plot(rounds, [record["train_loss"] for record in metrics], color="0.65", label="training, mean over clients")
    measured = [(record["round"], record["test_loss"]) for record in metrics if record["test_loss"] is not None]
    x, y = zip((0, loss_before), *measured, strict=True)
    axes.plot(x, y, "o-", color="C0", label="test")
    axes.set(xlabel="round", ylabel="loss (nats/token)", title=f"{config.algorithm}: {config.model} on {config.data}")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, file, dpi=120)


def plot_partition(file: Path, setup: RunContext) -> None:
    """Rows of each client as a bar stacked by category, as a PNG; beyond 19 categories the smaller ones are one."""
    totals = Counter(setup.categories).most_common()
    shown = [name for name, _ in totals[: 19 if len(totals) > 20 else 20]]
    counts = [Counter(setup.categories[row] for row in part) for part in setup.task.parts]
    stacks = [(name, [count[name] for count in counts]) for name in sorted(shown)]
    if len(totals) > len(shown):
        stacks.append(("all others", [count.total() - sum(count[name] for name in shown) for count in counts]))
    figure, axes = subplots(figsize=(7.2, 4))
    bottom = [0] * len(counts)
    for i, (name, heights) in enumerate(stacks):
        axes.bar(range(len(counts)), heights, 0.85, bottom, label=name, color=plt.get_cmap("tab20")(i))
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.set(xlabel="client", ylabel="training rows", title=f"{setup.config.data}, {setup.config.partition} partition")
    axes.set_title(f"mean TV distance {setup.heterogeneity:.3f}", loc="right", fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper", fontsize="x-small")
    save(figure, file, dpi=120)
