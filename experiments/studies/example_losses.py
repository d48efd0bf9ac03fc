"""The loss of each example by itself, and what can be told from it: whether a model was trained on the example."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from scipy import stats

from fedmezo_jax.core.mezo import Params
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.llama.task import LlamaTask, unpaired


def example_losses(task: LlamaTask, params: Params, rows: Any) -> np.ndarray:
    """``[N]`` float64, the mean loss over each example's label tokens, in nats; ``rows`` has N examples."""
    return np.asarray(_losses(loss_of(unpaired(task.model), task.base), params, rows), np.float64)


@jax.jit
def _losses(loss: Any, params: Params, rows: Any) -> jax.Array:
    return jax.lax.map(lambda row: loss(params, jax.tree.map(lambda leaf: leaf[None], row)), rows)


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The probability that a member's score is above another's, ties counting half: the area under the ROC curve."""
    return float(stats.mannwhitneyu(members, others).statistic / (len(members) * len(others)))
