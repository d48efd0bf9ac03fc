"""How the LoRA rank r matters (Sec. 6 of arXiv 2402.05926); α = 2r.

python -m experiments.studies.lora_rank
"""

from __future__ import annotations

from experiments import _cli
from experiments.studies import runner

PRESETS = runner.standard_presets(
    {f"r = {rank}": {"lora_rank": rank, "lora_alpha": 2.0 * rank} for rank in (2, 8, 32)},
    {f"r = {rank}": {"lora_rank": rank, "lora_alpha": 2.0 * rank} for rank in (32, 64, 128)},
)


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "lora_rank", PRESETS, title="LoRA rank r")


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
