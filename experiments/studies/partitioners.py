"""How the split of one data set over clients matters (Fig. 6 of arXiv 2402.05926).

python -m experiments.studies.partitioners
"""

from __future__ import annotations

from dataclasses import replace

from experiments import _cli
from experiments.studies import runner

PRESETS = runner.standard_presets(
    runner.vary("partition", ("iid", "dirichlet", "meta"), "{}"),
    paper=replace(runner.PAPER, data="dolly", learning_rate=1e-5),
)


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "partitioners", PRESETS, title="partition of the data")


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
