"""Which projections should have an adapter, at equal compute and each at its best learning rate.

    python -m experiments.studies.projections

Compute is that of :mod:`experiments.studies.estimators`, and so is the paper's method, which adapts q and v of all
layers. Back-propagation of the same adapters stands beside the zeroth-order steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from experiments import _cli
from experiments.studies import estimators, runner

_FORWARD = {"estimator": "forward-gradient", "distribution": "rademacher", "directions": 10}
_RATES = (1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1)
TARGETS = {
    "q and v": "q_proj,v_proj",
    "all of attention": "q_proj,k_proj,v_proj,o_proj",
    "up": "up_proj",
    "down": "down_proj",
    "up and down": "up_proj,down_proj",
    "gate, up and down": "gate_proj,up_proj,down_proj",
    "all seven": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
}


def methods(last: int, few: int, scale: float) -> estimators.Methods:
    """The paper's method, and choices of projections in ``last`` or ``few`` layers; rates are times ``scale``."""
    table: dict[str, tuple[Mapping[str, Any], Sequence[float]]] = {
        estimators.PAPER_METHOD: ({}, (3e-4, 7e-4, 1e-3, 2e-3))
    }
    for label, targets in TARGETS.items():
        rates = (*_RATES, 3.2e-1) if label in ("up", "down") else _RATES
        table[f"{label}, last {last}"] = ({**_FORWARD, "layers": f"last:{last}", "targets": targets}, rates)
    for label in ("q and v", "up and down"):
        fields = {"layers": f"last:{few}", "targets": TARGETS[label]}
        table[f"{label}, last {few}"] = ({**_FORWARD, **fields}, _RATES)
        table[f"two-point, {label}, last {few}"] = (fields, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2))
        rates = (3e-2, 1e-1, 2e-1, 4e-1, 8e-1, 1.6)
        table[f"back-propagation, {label}, last {few}"] = ({"algorithm": "fedavg", **fields}, rates)
    table["up and down, all layers"] = (
        {**_FORWARD, "targets": TARGETS["up and down"]},
        (2e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
    )
    return {label: (fields, [rate * scale for rate in rates]) for label, (fields, rates) in table.items()}


_SMALL, _PAPER = methods(2, 1, 1.0), methods(8, 4, 0.03)
_SMOKE = {label: _SMALL[label] for label in (estimators.PAPER_METHOD, "up and down, last 1")}
PRESETS: dict[runner.PresetName, runner.Preset] = {
    "small": runner.Preset(runner.SMALL, 5, 2, estimators.variants(runner.SMALL, estimators.TINY, _SMALL)),
    "paper": runner.Preset(runner.PAPER, 3, 10, estimators.variants(runner.PAPER, estimators.OPEN_LLAMA_3B, _PAPER)),
    "smoke": runner.Preset(runner.SMOKE, 2, 1, estimators.variants(runner.SMOKE, estimators.TINY, _SMOKE)),
}


def main(config: runner.Config) -> None:
    """Runs the study."""
    decoder = estimators.OPEN_LLAMA_3B if config.preset == "paper" else estimators.TINY
    title = "projections at equal compute, each at its best rate"
    conclude = partial(estimators.conclude, decoder)
    out, outcomes = runner.run(config, "projections", PRESETS, title=title, conclude=conclude)
    chosen = {label: tuned.best for label, tuned in runner.tune(outcomes).items()}
    estimators.plot(str(out / "projections.png"), chosen, decoder)


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
