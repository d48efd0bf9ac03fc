"""Directions of each client's own (the paper) against directions that all clients of a round share.

python -m experiments.studies.shared_directions

Both spend the same forward passes. Shared directions let the server average scalars, and keep downlink and rebuilding
as small for a thousand clients as for one; but a round explores H directions and not N·H.
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
