"""Own directions of each client (the paper) against directions that all clients of a round share.

python -m experiments.studies.shared_directions

Both use the same number of forward passes. With shared directions the server averages scalars, and downlink and
reconstruction cost the same for a thousand clients as for one; but a round explores H directions instead of N·H.
"""

from __future__ import annotations

from experiments import _cli
from experiments.studies import runner

VARIANTS = {"per-client": {"directions_shared": False}, "shared": {"directions_shared": True}}
PRESETS = runner.standard_presets(VARIANTS, num_seeds=5)


def main(config: runner.Config) -> None:
    """Runs the study."""
    runner.run(config, "shared_directions", PRESETS, title="directions of a round")


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
