"""How the perturbation scale μ matters (Fig. 2 and 8 of arXiv 2402.05926).

python -m experiments.studies.perturbation_scale
"""

from __future__ import annotations

from experiments import _cli
from experiments.studies import runner

PRESETS = runner.standard_presets(
    runner.vary("perturbation_scale", (2e-4, 1e-3, 5e-3, 2e-2), "μ = {:g}"),
    runner.vary("perturbation_scale", (2e-4, 1e-3, 5e-3), "μ = {:g}"),
)


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "perturbation_scale", PRESETS, title="perturbation scale μ")


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
