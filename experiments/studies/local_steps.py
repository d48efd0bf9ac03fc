"""How the number H of local steps matters (Fig. 3 and 9 of arXiv 2402.05926).

python -m experiments.studies.local_steps
"""

from __future__ import annotations

from experiments import _cli
from experiments.studies import runner

PRESETS = runner.standard_presets(
    runner.vary("local_steps", (3, 10, 30), "H = {}"),
    runner.vary("local_steps", (10, 30, 50), "H = {}"),
)


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "local_steps", PRESETS, title="local steps H")


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
