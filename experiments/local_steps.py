"""How the number H of local steps matters (Fig. 3 and 9 of arXiv 2402.05926: more converge faster, 50 can surge).

python -m experiments.local_steps
"""

from __future__ import annotations

from experiments import common, study

PRESETS = study.three(
    study.fields_over("local_steps", (3, 10, 30), "H = {}"),
    study.fields_over("local_steps", (10, 30, 50), "H = {}"),
)


def main(config: study.Config) -> None:
    """Runs the study."""
    study.run(config, "local_steps", PRESETS, title="local steps H")


if __name__ == "__main__":
    common.run(main, study.Config, __doc__)
