"""Pictures of results, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from fedmezo_jax.config import RunConfig

mpl.use("Agg")
import matplotlib.pyplot as plt


def plot_loss(file: Path, loss_before: float, metrics: Sequence[dict[str, Any]], config: RunConfig) -> None:
    """Training and test loss over rounds, as a PNG."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    rounds = [record["round"] for record in metrics]
    axes.plot(rounds, [record["train_loss"] for record in metrics], color="0.65", label="training, mean over clients")
    measured = [(record["round"], record["test_loss"]) for record in metrics if record["test_loss"] is not None]
    x, y = zip((0, loss_before), *measured, strict=True)
    axes.plot(x, y, "o-", color="C0", label="test")
    axes.set(xlabel="round", ylabel="loss (nats a token)", title=f"{config.algorithm}: {config.model} on {config.data}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)
