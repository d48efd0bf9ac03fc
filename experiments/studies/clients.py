"""How the number N of clients matters (Fig. 7 and Tab. 6 of arXiv 2402.05926).

python -m experiments.studies.clients
"""

from __future__ import annotations

from dataclasses import replace

from experiments import _cli
from experiments.studies import runner

PRESETS = runner.standard_presets(
    runner.vary("clients", (2, 4, 8, 16), "N = {}"),
    runner.vary("clients", (3, 5, 9, 20, 40), "N = {}"),
    paper=replace(runner.PAPER, data="alpaca", learning_rate=1e-5),
    num_seeds=2,
)


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "clients", PRESETS, title="clients N")


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
