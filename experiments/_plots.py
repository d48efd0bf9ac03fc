"""Plots of results, drawn without a display.

Matplotlib is imported when the first plot is drawn; it would take a fifth of a command's start-up time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedmezo_jax.run.config import RunConfig
    from fedmezo_jax.run.context import RunContext


def subplots(*shape: int, figsize: tuple[float, float] | None = None, **options: Any) -> tuple[Figure, Any]:
    """Returns a figure and its axes like ``plt.subplots``, with a layout that leaves room for all labels.

    The figure does not belong to pyplot, so it needs no display and is freed like any other object.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def ticks_at(axes: Any, values: Iterable[float], *, log: bool = False) -> None:
    """Puts the ticks of the x axis at the values that were run, and nowhere else."""
    if log:
        axes.set_xscale("log")
    run_values = sorted(set(values))
    axes.set_xticks(run_values, [f"{value:g}" for value in run_values])
    axes.set_xticks([], minor=True)


def whole_rounds(axes: Any) -> None:
    """Names the x axis, and puts its ticks at whole numbers."""
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True)


def legend(figure: Figure, *axes: Any, columns: int = 3) -> None:
    """Puts one legend for these axes below the figure, where it covers no data, in as many columns as have room."""
    labels = [axis.get_legend_handles_labels() for axis in axes]
    handles, names = (
        [entry for entries in entries_by_axis for entry in entries] for entries_by_axis in zip(*labels, strict=True)
    )
    column_inches = 0.6 + 0.075 * max(map(len, names))
    room = max(1, int(figure.get_figwidth() / column_inches))
    figure.legend(handles, names, loc="outside lower center", ncols=min(columns, len(names), room), fontsize="small")


def save(figure: Figure, file: Path | str, dpi: int = 100) -> None:
    """Writes the figure as a PNG."""
    figure.savefig(file, dpi=dpi)


def plot_loss(file: Path, loss_before: float, metrics: Sequence[dict[str, Any]], config: RunConfig) -> None:
    """Plots training and test loss over rounds, as a PNG."""
    figure, axes = subplots(figsize=(6.4, 4))
    rounds = [record["round"] for record in metrics]
    axes.plot(rounds, [record["train_loss"] for record in metrics], color="0.65", label="training, mean over clients")
    measured = [(record["round"], record["test_loss"]) for record in metrics if record["test_loss"] is not None]
    x, y = zip((0, loss_before), *measured, strict=True)
    axes.plot(x, y, "o-", color="C0", label="test")
    whole_rounds(axes)
    axes.set(ylabel="loss (nats/token)", title=f"{config.algorithm}: {config.model} on {config.data}")
    axes.grid(alpha=0.3)
    legend(figure, axes)
    save(figure, file, dpi=120)


def plot_partition(file: Path, setup: RunContext) -> None:
    """Plots examples per client as bars stacked by category, as a PNG; small categories beyond 19 are merged."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    totals = Counter(setup.categories).most_common()
    shown = [name for name, _ in totals[: 19 if len(totals) > 20 else 20]]
    counts = [Counter(setup.categories[row] for row in part) for part in setup.task.parts]
    stacks = [(name, [count[name] for count in counts]) for name in sorted(shown)]
    if len(totals) > len(shown):
        stacks.append(("all others", [count.total() - sum(count[name] for name in shown) for count in counts]))
    figure, axes = subplots(figsize=(7.2, 4))
    bottom = [0] * len(counts)
    for i, (name, heights) in enumerate(stacks):
        axes.bar(range(len(counts)), heights, 0.85, bottom, label=name, color=colormaps["tab20"](i))
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.set(
        xlabel="client", ylabel="training examples", title=f"{setup.config.data}, {setup.config.partition} partition"
    )
    axes.set_title(f"mean TV distance {setup.heterogeneity:.3f}", loc="right", fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper", fontsize="x-small")
    save(figure, file, dpi=120)
