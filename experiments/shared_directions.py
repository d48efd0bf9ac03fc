"""Directions of each client's own (the paper) against directions that all clients of a round share.

python -m experiments.shared_directions

Both spend the same forward passes. Shared directions let the server average scalars, and keep downlink and rebuilding
as small for a thousand clients as for one; but a round explores H directions and not N·H.
"""

from __future__ import annotations

from experiments import common, study

PRESETS = study.three(study.fields_over("seeds", ("per-client", "shared"), "{}"), seeds=5)


def main(config: study.Config) -> None:
    """Runs the study."""
    study.run(config, "shared_directions", PRESETS, title="directions of a round")


if __name__ == "__main__":
    common.run(main, study.Config, __doc__)
