"""Federated zeroth-order fine-tuning of LLaMA models in JAX (FedMeZO, arXiv 2402.05926).

The whole run, as ``python -m experiments.fedmezo`` does it, and its adapter made again from the ledger that it leaves::

    import fedmezo_jax as fmz

    result = fmz.fine_tune(fmz.RunConfig(model="tiny", rounds=5), out="runs/mine")
    print(result.loss_before, result.loss_after)
    adapter = fmz.replay("runs/mine/run.ledger").params

The algorithm alone, which trains any pytree of parameters on any loss:

>>> import jax, jax.numpy as jnp, numpy as np
>>> import fedmezo_jax as fmz
>>> def loss(params, batch):
...     x, y = batch
...     return jnp.mean((x @ params["w"] - y) ** 2)
>>> clients, local_steps, batch_size = 4, 10, 8
>>> rng, truth = np.random.default_rng(0), np.array([1, -2, 3], np.float32)
>>> x = rng.standard_normal((clients, local_steps, batch_size, 3), np.float32)
>>> cohort = fmz.Cohort(ids=np.arange(clients), weights=np.ones(clients), batches=(x, x @ truth))
>>> init, round = fmz.federated(fmz.mezo_client(fmz.MezoConfig()), fmz.RateConfig(learning_rate=0.03))
>>> state, pair_loss = init({"w": jnp.zeros(3)}, clients), jax.tree_util.Partial(fmz.pair_loss_of(loss))
>>> for _ in range(20):
...     state, report = round(state, pair_loss, cohort, fmz.run_key(seed=0))
>>> bool(np.abs(state.params["w"] - truth).max() < 0.05)
True

Names of the algorithm are imported at once; those of whole runs, which need more libraries, when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedmezo_jax.core.client import mezo_client, sgd_client
from fedmezo_jax.core.federated import Cohort, federated
from fedmezo_jax.core.mezo import MezoConfig, pair_loss_of
from fedmezo_jax.core.personalization import RateConfig
from fedmezo_jax.core.random import run_key
from fedmezo_jax.core.task import Task
from fedmezo_jax.errors import UserError

if TYPE_CHECKING:
    from fedmezo_jax.run.config import RunConfig, paper_config
    from fedmezo_jax.run.job import fine_tune
    from fedmezo_jax.run.loop import RunResult
    from fedmezo_jax.run.replay import Replay, replay

__all__ = [
    "Cohort",
    "MezoConfig",
    "RateConfig",
    "Replay",
    "RunConfig",
    "RunResult",
    "Task",
    "UserError",
    "federated",
    "fine_tune",
    "mezo_client",
    "pair_loss_of",
    "paper_config",
    "replay",
    "run_key",
    "sgd_client",
]
__version__ = "0.2.0"

_LATER = {
    "RunConfig": "fedmezo_jax.run.config",
    "paper_config": "fedmezo_jax.run.config",
    "fine_tune": "fedmezo_jax.run.job",
    "RunResult": "fedmezo_jax.run.loop",
    "Replay": "fedmezo_jax.run.replay",
    "replay": "fedmezo_jax.run.replay",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
