"""How the perturbation scale μ matters (Fig. 2 and 8 of arXiv 2402.05926: smaller is slightly better).

python -m experiments.perturbation_scale
"""

from __future__ import annotations

from experiments import common, study

PRESETS = study.three(
    study.fields_over("perturbation_scale", (2e-4, 1e-3, 5e-3, 2e-2), "μ = {:g}"),
    study.fields_over("perturbation_scale", (2e-4, 1e-3, 5e-3), "μ = {:g}"),
)


def main(config: study.Config) -> None:
    """Runs the study."""
    study.run(config, "perturbation_scale", PRESETS, title="perturbation scale μ")


if __name__ == "__main__":
    common.run(main, study.Config, __doc__)
