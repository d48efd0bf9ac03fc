"""Everything that decides a run's numbers: one dataclass for the command line, ``config.json`` and a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedmezo_jax.core.mezo import Distribution
from fedmezo_jax.core.personalization import Strategy
from fedmezo_jax.data.encode import Overlong
from fedmezo_jax.data.prompts import Style
from fedmezo_jax.data.records import parse_fields
from fedmezo_jax.data.table import PartitionKind
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.lora import check_targets
from fedmezo_jax.llama.precision import Precision


@dataclass(frozen=True)
class RunConfig:
    """A fine-tuning run."""

    model: str = "tiny"
    """tiny, smollm2-135m, a folder with a LLaMA in safetensors, or a hub id owner/name"""
    data: str = "bundled"
    """bundled, gsm8k, codealpaca, alpaca, dolly, a .json, .jsonl or .parquet file, or a hub id
    owner/name[:config[:split]]"""
    data_dir: str | None = None
    """folder with local copies of the data sets; without it they come from the hub"""
    fields: str = ""
    """names of the fields, e.g. instruction=question,response=answer,category=topic, or messages=turns for chats"""
    prompt_style: Style = "alpaca"
    """prompt around an instruction: Alpaca's template, plain text, Question: and Answer:, or the tokenizer's chat
    template (through which chats with messages always go)"""
    partition: PartitionKind = "dirichlet"
    """how rows are dealt to clients: at random, by Dirichlet shares of each category, by whole categories, at random
    in unequal quantities, by length, or by Dirichlet shares of clusters of like texts"""
    dirichlet_alpha: float = 0.5
    """concentration of the Dirichlet shares (of categories, clusters or all rows); the smaller, the more heterogeneous
    """
    clients: int = 8
    """number of clients N"""
    participation: float = 1.0
    """share of the clients that take part in a round"""
    weighting: Literal["equal", "samples"] = "equal"
    """weights of the server's mean: the same for all, or by number of rows"""
    rounds: int = 20
    """communication rounds T"""
    local_steps: int = 10
    """local steps H of a client in a round"""
    batch_size: int = 2
    """rows a local step"""
    max_length: int = 160
    """most tokens in a row"""
    overlong: Overlong = "skip"
    """whether longer rows are left out or truncated; both are counted"""
    length_buckets: int = 4
    """most row widths that steps run at, where that saves a fifth of the tokens or more, which would be padding; then
    rows of like length share a step. 1 pads all rows to the longest"""
    test_examples: int = 64
    """examples held out to measure the test loss"""
    algorithm: Literal["fedmezo", "fedavg"] = "fedmezo"
    """zeroth-order local steps, or back-propagated ones"""
    learning_rate: float = 1e-3
    """base learning rate η₀ of the clients"""
    perturbation_scale: float = 1e-3
    """μ, how far from θ the two losses are taken"""
    directions: int = 1
    """directions n averaged in a step, at two forward passes each"""
    distribution: Distribution = "gaussian"
    """law of a direction's entries"""
    weight_decay: float = 0.0
    """decoupled weight decay λ of a local step"""
    local_optimizer: Literal["sgd", "adam"] = "sgd"
    """optimizer of the local steps of fedavg"""
    server_optimizer: Literal["mean", "momentum", "adam"] = "mean"
    """what the server does with the mean update: apply it, or feed it to an optimizer"""
    server_learning_rate: float = 1.0
    """learning rate of the server's optimizer"""
    lora_rank: int = 8
    """rank r of the LoRA matrices"""
    lora_alpha: float = 16.0
    """LoRA α; the adapter's output is scaled by α/r"""
    targets: str = "q_proj,v_proj"
    """projections with an adapter, among q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"""
    personalize: Strategy = "frozen"
    """signal behind the clients' own learning rates; frozen gives all η₀, shuffled deals model-diff's out at random (a
    control)"""
    personalize_scale: float = 0.5
    """A in η_i = η₀(1 + A·Φ_i), at least 0 and below 1"""
    uplink: Literal["coefficients", "lora"] | None = None
    """what a client sends: its projected gradients, from which the server reconstructs its update, or its LoRA; by
    default the former, and the LoRA with fedavg, which has none"""
    directions_shared: bool = False
    """all clients of a round draw the same directions, so that the server averages scalars; by default each client
    draws its own (the paper)"""
    dropout: float = 0.0
    """probability that a participant drops out of a round (simulated)"""
    deadline: float | None = None
    """when the server stops waiting for a round's clients, in a typical client's time (simulated: times are
    log-normal)"""
    attempts: int = 3
    """how often a round is tried, with new participants, if all of its clients fail"""
    on_divergence: Literal["warn", "clip", "rollback"] = "warn"
    """when a round's loss explodes: say so and go on; or clip projected gradients of five times the usual size; or go
    back to before the round that led there, at half the learning rates"""
    precision: Precision | None = None
    """of the products with frozen weights: float32, bfloat16, or bfloat16 on the pair's mean and half-difference; by
    default paired where the weights are stored in sixteen bits and the device multiplies bfloat16, and else float32"""
    seed: int = 0
    """seed of the data split, the batches, the LoRA start and the directions"""

    def __post_init__(self):
        """Refuses values that no run can have."""
        for name, hint in _hints().items():
            if choices := _choices(hint):
                self._require(name, _fits(getattr(self, name), hint), f"one of {', '.join(choices)}")
        whole = (
            *("clients", "rounds", "local_steps", "batch_size"),
            *("directions", "lora_rank", "test_examples", "length_buckets", "attempts"),
        )
        for name in whole:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        positive = (
            *("learning_rate", "perturbation_scale", "lora_alpha"),
            *("dirichlet_alpha", "server_learning_rate"),
        )
        for name in positive:
            self._require(name, 0 < getattr(self, name) < math.inf, "above 0")
        self._require("max_length", self.max_length >= 8, "at least 8")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        self._require("participation", 0 < self.participation <= 1, "above 0 and at most 1")
        self._require("personalize_scale", 0 <= self.personalize_scale < 1, "at least 0 and below 1")
        self._require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        self._require("deadline", self.deadline is None or 0 < self.deadline < math.inf, "above 0")
        self._require("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32")
        check_targets(self.target_names)
        parse_fields(self.fields)
        if self.algorithm == "fedavg":
            for name, refused, instead in (
                ("uplink", "coefficients", "lora"),
                ("on_divergence", "clip", "warn or rollback"),
            ):
                rule = f"{instead} with --algorithm fedavg, whose steps are no scalars"
                self._require(name, getattr(self, name) != refused, rule)
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
        if self.directions_shared and self.weight_decay:
            raise UserError(
                "--weight-decay shrinks each client's θ by its own rate: leave out --directions-shared or the decay"
            )

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} must be {rule}, not {getattr(self, name)}")

    @property
    def target_names(self) -> tuple[str, ...]:
        """``targets``, taken apart."""
        return tuple(name.strip() for name in self.targets.split(","))

    @property
    def sends_coefficients(self) -> bool:
        """Whether clients send coefficients and not their LoRA."""
        return self.algorithm == "fedmezo" and self.uplink != "lora"

    @property
    def sent_directions(self) -> int:
        """Coefficients of a local step, n; back-propagated steps have none."""
        return self.directions if self.algorithm == "fedmezo" else 0

    @property
    def participants(self) -> int:
        """Clients of a round, P: ``participation`` of all, rounded, and at least one."""
        return max(1, round(self.participation * self.clients))


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
        if not _fits(value, _hints()[name]):
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


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(RunConfig)


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a ``Literal``, or of one that may be None; nothing for another type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for option in get_args(hint) for choice in _choices(option))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, as the command line would make it."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return type(value) is str and value in get_args(hint)
    if hint is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**53)
    return type(value) is (NoneType if hint is None else hint)
