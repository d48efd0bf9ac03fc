"""How the size of the base model matters (Tab. 8 of arXiv 2402.05926: LLaMA-3B against 7B).

python -m experiments.studies.model_size
"""

from __future__ import annotations

from experiments import _cli
from experiments.studies import runner

PRESETS = runner.standard_presets(
    runner.vary("model", ("tiny", "smollm2-135m"), "{}"),
    runner.vary("model", ("openlm-research/open_llama_3b_v2", "openlm-research/open_llama_7b_v2"), "{}"),
    seeds=2,
    rounds=4,
    precision="paired",
)
PRESETS["smoke"] = PRESETS["smoke"]._replace(variants=runner.vary("lora_rank", (2, 3), "tiny, rank {}"))
PAPER = {
    "openlm-research/open_llama_3b_v2": "0.94 (GSM8K, round 309)",
    "openlm-research/open_llama_7b_v2": "1.01 (LLaMA2-7B, GSM8K, round 309)",
}


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "model_size", PRESETS, title="base model", paper=PAPER)


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
