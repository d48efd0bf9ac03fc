"""How the batch of a local step matters (Tab. 7 of arXiv 2402.05926).

python -m experiments.studies.batch_size
"""

from __future__ import annotations

from dataclasses import replace

from experiments import _cli
from experiments.studies import runner

PRESETS = runner.standard_presets(
    runner.vary("batch_size", (1, 2, 4), "B = {}"),
    runner.vary("batch_size", (1, 3, 5), "B = {}"),
    paper=replace(runner.PAPER, data="dolly", partition="meta", learning_rate=1e-5),
)


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "batch_size", PRESETS, title="batch size B")


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
