"""How the split of one data set over clients matters (Fig. 6 of arXiv 2402.05926: more heterogeneity, lower loss).

python -m experiments.splitters
"""

from __future__ import annotations

from dataclasses import replace

from experiments import common, study

PRESETS = study.three(
    study.fields_over("partition", ("iid", "dirichlet", "meta"), "{}"),
    paper=replace(study.PAPER, data="dolly", learning_rate=1e-5),
)


def main(config: study.Config) -> None:
    """Runs the study."""
    study.run(config, "splitters", PRESETS, title="data splitter")


if __name__ == "__main__":
    common.run(main, study.Config, __doc__)
