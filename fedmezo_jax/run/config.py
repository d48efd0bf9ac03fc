"""Everything that decides a run's numbers: one dataclass for the command line, ``config.json`` and a resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedmezo_jax.core.robust_rules import BY_NEAREST
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.config_parts import (
    DataConfig,
    FaultConfig,
    LocalConfig,
    LoraConfig,
    ModelConfig,
    PartitionConfig,
    PrivacyConfig,
    ServerConfig,
    fits,
    hints,
)


# A dataclass lists the fields of its last base first.
@dataclass(frozen=True)
class RunConfig(
    PrivacyConfig, FaultConfig, ServerConfig, LocalConfig, LoraConfig, PartitionConfig, DataConfig, ModelConfig
):
    """A fine-tuning run."""

    seed: int = 0
    """seed of the data split, the batches, the LoRA start and the directions"""

    def __post_init__(self):
        """Refuses values that no run can have."""
        super().__post_init__()
        self._require_counts("test_examples")
        self._require("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32")
        if self.algorithm == "fedavg":
            for name, refused, instead in (
                ("uplink", "coefficients", "lora"),
                ("on_divergence", "clip", "warn or rollback"),
            ):
                rule = f"{instead} with --algorithm fedavg, whose steps are no scalars"
                self._require(name, getattr(self, name) != refused, rule)
        if self.learning_rate == "auto" and self.on_divergence == "rollback":
            raise UserError("--on-divergence rollback: --learning-rate auto undoes rounds itself: leave it out")
        if self.directions_shared and self.algorithm == "fedavg":
            raise UserError("--directions-shared: --algorithm fedavg draws no directions: leave it out")
        if self.directions_shared and self.uplink == "lora":
            raise UserError(
                "--uplink lora: with --directions-shared the server averages coefficients: give --uplink coefficients"
            )
        if self.on_divergence == "clip" and self.uplink == "lora" and self.algorithm == "fedmezo":
            raise UserError(
                "--on-divergence clip bounds coefficients, which --uplink lora does not send: "
                "give --uplink coefficients"
            )
        if self.aggregation == "norm-clip" and not self.sends_coefficients:
            raise UserError(
                "--aggregation norm-clip bounds coefficients, which are not sent with --uplink lora or --algorithm "
                "fedavg: give geometric-median"
            )
        if self.pack and self.protects_examples:
            raise UserError("--pack puts examples together, and --dp-unit example measures each alone: leave it out")
        if self.eight_bit_products and (self.algorithm, self.estimator) == ("fedmezo", "two-point"):
            raise UserError(
                "--eight-bit-products rounds activations, so that losses at θ ± μz differ by the rounding as well: "
                "give --estimator forward-gradient, or leave it out"
            )
        liars = int(self.byzantine_share * self.participants)
        if self.aggregation in BY_NEAREST and self.participants < 2 * liars + 3:
            raise UserError(
                f"--aggregation {self.aggregation} takes at least 2f + 3 clients a round, of which f lie: lower "
                f"--byzantine-share {self.byzantine_share:g} for {self.participants}"
            )
        if self.signed and not self.sends_coefficients:
            raise UserError("--signed covers coefficients, which are not sent with --uplink lora or --algorithm fedavg")
        if self.signed and self.on_divergence == "clip":
            raise UserError("--on-divergence clip changes what clients have signed: leave out one of the two")
        if not self.sends_losses:
            option = "--secure-sum" if self.secure_sum else "--dp-epsilon"
            self._require("algorithm", self.algorithm == "fedmezo", f"fedmezo with {option}, which is about scalars")
            self._require("uplink", self.sends_coefficients, f"coefficients with {option}, which is about these")
            for name, needed in PRIVATE.items():
                if name == "aggregation" and not self.secure_sum and self.protects_examples:
                    continue  # a client's numbers are private as they are
                rule = f"{needed} with {option}: anything else would follow from single clients' numbers"
                self._require(name, getattr(self, name) == needed, rule)
        if self.secure_sum and not self.directions_shared:
            raise UserError("--secure-sum adds up coefficients along common directions: give --directions-shared")
        if self.secure_sum and self.participants < 3:
            raise UserError("--secure-sum hides a client among others: give at least 3 a round")
        if self.directions_shared and self.weight_decay:
            raise UserError(
                "--weight-decay shrinks each client's θ by its own rate: leave out --directions-shared or the decay"
            )

    @property
    def sends_coefficients(self) -> bool:
        """Whether clients send coefficients and not their LoRA."""
        return self.algorithm == "fedmezo" and self.uplink != "lora"

    @property
    def keeps_mean(self) -> bool:
        """Whether the server keeps the clients' mean alone, and no single client's numbers."""
        return self.secure_sum or (self.private and self.directions_shared and not self.protects_examples)

    @property
    def threshold(self) -> int:
        """How many of a round's clients must stay for a secure sum, t: the least with 3t > 2P."""
        return 2 * self.participants // 3 + 1

    @property
    def participants(self) -> int:
        """Clients of a round, P: ``participation`` of all, rounded, and at least one."""
        return max(1, round(self.participation * self.clients))


PRIVATE = {"personalize": "frozen", "on_divergence": "warn", "aggregation": "mean", "weighting": "equal"}
"""What a run with ``--dp-epsilon`` or ``--secure-sum`` must have."""
PAPER: dict[str, Any] = {
    "targets": "q_proj,v_proj",
    "layers": "all",
    "estimator": "two-point",
    "directions": 1,
    "distribution": "gaussian",
    "learning_rate": 1e-3,
    "server_learning_rate": 1.0,
}
"""The published method (arXiv 2402.05926), as far as the defaults of :class:`RunConfig` differ from it."""


def paper_config(**options: Any) -> RunConfig:
    """The published method's configuration, with these options besides."""
    return RunConfig(**(PAPER | options))


RECIPES: dict[str, Callable[..., RunConfig]] = {"fast": RunConfig, "paper": paper_config}
"""What ``--recipe`` names."""


def recipe_of(config: RunConfig) -> str | None:
    """The recipe with which a configuration agrees in all options that set the recipes apart; None if there is none."""
    for name, recipe in RECIPES.items():
        if all(getattr(config, option) == getattr(recipe(), option) for option in PAPER):
            return name
    return None


def config_from(values: Mapping[str, Any], source: str) -> RunConfig:
    """A configuration from what a file holds, a value for each field and nothing else.

    Args:
        values: name and value of each field.
        source: the file, as an error message names it.

    Raises:
        UserError: a field is missing or unknown, or its value is not one that a run can have; names the field.
    """
    refusal = f"{source}: its configuration is not one of this version of the package"
    if odd := values.keys() ^ {field.name for field in fields(RunConfig)}:
        raise UserError(f"{refusal}: {', '.join(sorted(odd))} is missing or unknown")
    for name, value in values.items():
        if not fits(value, hints(RunConfig)[name]):
            raise UserError(f"{refusal}: {name} cannot be {value!r:.60}")
    try:
        return RunConfig(**values)
    except UserError as error:
        raise UserError(f"{refusal}: {error}") from None


def read_config(file: Path) -> RunConfig:
    """The configuration in a run's ``config.json``.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not valid JSON"
        raise UserError(f"{file}: cannot be read ({reason}): give the config.json of a run's folder") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds no JSON object: give the config.json of a run's folder")
    return config_from(values, str(file))
