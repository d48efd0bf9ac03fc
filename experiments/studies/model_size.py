"""How the size of the base model matters (Tab. 8 of arXiv 2402.05926).

python -m experiments.studies.model_size
"""

from __future__ import annotations

from experiments import _cli
from experiments.studies import runner

PRESETS = runner.standard_presets(
    runner.vary("model", ("tiny", "smollm2-135m"), "{}"),
    runner.vary("model", ("openlm-research/open_llama_3b_v2", "openlm-research/open_llama_7b_v2"), "{}"),
    num_seeds=2,
    rounds=4,
    precision="paired",
)
PRESETS["smoke"] = PRESETS["smoke"]._replace(variants=runner.vary("lora_rank", (2, 3), "tiny, rank {}"))


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "model_size", PRESETS, title="base model")


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
