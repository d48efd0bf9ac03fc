"""How the number N of clients matters (Fig. 7 and Tab. 6 of arXiv 2402.05926: little, from 3 to 40 clients).

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
    seeds=2,
)
PAPER = {"N = 3": "1.51 (round 309)", "N = 9": "1.31 (round 500)", "N = 40": "1.32 (round 500)"}


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "clients", PRESETS, title="clients N", paper=PAPER)


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
