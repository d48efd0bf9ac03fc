"""The parts of a run's configuration: each checks its own options, and a function takes the part that it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedmezo_jax.core.aggregation import Aggregation
from fedmezo_jax.core.estimators import EstimatorName
from fedmezo_jax.core.mezo import Distribution
from fedmezo_jax.core.personalization import Strategy
from fedmezo_jax.core.robust_rules import RULES
from fedmezo_jax.data.encode import Overlong
from fedmezo_jax.data.prompts import Style
from fedmezo_jax.data.records import parse_fields
from fedmezo_jax.data.table import PartitionKind
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.lora import check_targets
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.quantised import BaseType, check_eight_bit


@dataclass(frozen=True)
class Options:
    """What all parts share: a ``Literal`` takes no other value than its own."""

    def __post_init__(self):
        for name, hint in hints(type(self)).items():
            if choices := _choices(hint):
                self._require(name, fits(getattr(self, name), hint), f"one of {', '.join(choices)}")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} must be {rule}, not {getattr(self, name)}")

    def _require_counts(self, *names: str) -> None:
        for name in names:
            self._require(name, getattr(self, name) >= 1, "at least 1")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            self._require(name, 0 < getattr(self, name) < math.inf, "above 0")


@dataclass(frozen=True)
class ModelConfig(Options):
    """The base model."""

    model: str = "tiny"
    """tiny, smollm2-135m, a folder with a LLaMA in safetensors, or a hub id owner/name"""
    precision: Precision | None = None
    """of the products with frozen weights: float32, bfloat16, or bfloat16 on the pair's mean and half-difference. For
    weights of at most sixteen bits the default of two-point is paired where the device multiplies bfloat16, and that of
    the other estimators bfloat16 on accelerators; else it is float32"""
    base: BaseType | None = None
    """how the frozen weights are held: float32, bfloat16, or with the layers' projections in eight or four bits, or in
    the blocks of a .gguf file; by default float32 where that is the precision, and else bfloat16"""
    eight_bit_products: bool = False
    """whether the layers' projections in int8 or fp8 are multiplied by activations that are rounded to the same type,
    row by row"""

    def __post_init__(self):
        super().__post_init__()
        check_eight_bit(self.eight_bit_products, self.base)


@dataclass(frozen=True)
class DataConfig(Options):
    """The data set, and how examples become rows of tokens."""

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
    max_length: int = 160
    """most tokens in a row"""
    overlong: Overlong = "skip"
    """whether longer rows are left out or truncated; both are counted"""
    test_examples: int = 64
    """examples held out to measure the test loss"""

    def __post_init__(self):
        super().__post_init__()
        self._require("max_length", self.max_length >= 8, "at least 8")
        parse_fields(self.fields)


@dataclass(frozen=True)
class PartitionConfig(Options):
    """The clients, and which examples each of them has."""

    partition: PartitionKind = "dirichlet"
    """how rows are dealt to clients: at random, by Dirichlet shares of each category, by whole categories, at random
    in unequal quantities, by length, or by Dirichlet shares of clusters of like texts"""
    dirichlet_alpha: float = 0.5
    """concentration of the Dirichlet shares (of categories, clusters or all rows); the smaller, the more heterogeneous
    """
    clients: int = 8
    """number of clients N"""

    def __post_init__(self):
        super().__post_init__()
        self._require_counts("clients")
        self._require_positive("dirichlet_alpha")


@dataclass(frozen=True)
class LoraConfig(Options):
    """The adapter, which is what is trained."""

    lora_rank: int = 8
    """rank r of the LoRA matrices"""
    lora_alpha: float = 16.0
    """LoRA α; the adapter's output is scaled by α/r"""
    targets: str = "up_proj,down_proj"
    """projections with an adapter, among q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj (paper: q_proj,v_proj)
    """
    layers: str = "last:20%"
    """layers with an adapter: all (paper), last:K, first:K (a number or a share in percent), every:N, a-b (counted from
    0), or several of these joined by commas; what lies below the first of them is computed once for each example"""
    hidden_states: Literal["float32", "bfloat16"] = "float32"
    """how the outputs of the layers below the first trained one are stored"""

    def __post_init__(self):
        super().__post_init__()
        self._require_counts("lora_rank")
        self._require_positive("lora_alpha")
        check_targets(self.target_names)

    @property
    def target_names(self) -> tuple[str, ...]:
        """``targets``, taken apart."""
        return tuple(name.strip() for name in self.targets.split(","))


@dataclass(frozen=True)
class LocalConfig(Options):
    """The local steps of a client."""

    algorithm: Literal["fedmezo", "fedavg"] = "fedmezo"
    """zeroth-order local steps, or back-propagated ones"""
    local_steps: int = 10
    """local steps H of a client in a round"""
    batch_size: int = 2
    """rows a local step"""
    length_buckets: int = 4
    """most row widths that steps run at, where that saves a fifth of the tokens or more, which would be padding; then
    rows of like length share a step. 1 pads all rows to the longest"""
    pack: bool = False
    """pack the rows of a local step into one row, so that little is computed on padding; a step then runs at one of
    --length-buckets sizes of that row"""
    learning_rate: float | Literal["auto"] = "auto"
    """base learning rate η₀ of the clients; auto raises it for as long as the server's validation loss does not rise,
    and undoes a round after which it has"""
    estimator: EstimatorName = "forward-gradient"
    """how a step measures the slope of the loss along its directions: from two losses at 2n forward passes (paper), by
    forward-mode differentiation at the cost of about 1 + n, or by back-propagation at that of two, which stores the
    activations of the trained layers"""
    directions: int = 10
    """directions n averaged in a step (paper: 1)"""
    distribution: Distribution = "rademacher"
    """distribution of a direction's entries (paper: gaussian)"""
    perturbation_scale: float = 1e-3
    """μ, how far from θ the two losses of two-point are taken"""
    weight_decay: float = 0.0
    """decoupled weight decay λ of a local step"""
    local_optimizer: Literal["sgd", "adam"] = "sgd"
    """optimizer of the local steps of fedavg"""
    personalize: Strategy = "frozen"
    """signal behind the clients' own learning rates; frozen gives all η₀, shuffled deals model-diff's out at random (a
    control)"""
    personalize_scale: float = 0.5
    """A in η_i = η₀(1 + A·Φ_i), at least 0 and below 1"""

    def __post_init__(self):
        super().__post_init__()
        self._require_counts("local_steps", "batch_size", "length_buckets", "directions")
        self._require_positive("perturbation_scale", *(() if self.learning_rate == "auto" else ("learning_rate",)))
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        self._require("personalize_scale", 0 <= self.personalize_scale < 1, "at least 0 and below 1")

    @property
    def fixed_rate(self) -> float:
        """``learning_rate`` of a run that has a number for it."""
        assert self.learning_rate != "auto"
        return self.learning_rate

    @property
    def sent_directions(self) -> int:
        """Coefficients of a local step, n; back-propagated steps have none."""
        return self.directions if self.algorithm == "fedmezo" else 0


@dataclass(frozen=True)
class ServerConfig(Options):
    """The rounds: who takes part, what is sent, and what the server makes of it."""

    rounds: int = 20
    """communication rounds T"""
    participation: float = 1.0
    """share of the clients that take part in a round"""
    weighting: Literal["equal", "samples"] = "equal"
    """weights of the server's mean: the same for all, or by number of rows"""
    aggregation: Aggregation = "mean"
    """how the server combines the clients' updates: their mean; their mean with none longer than the median; or a
    robust rule, which clients that lie cannot move far"""
    byzantine_share: float = 0.25
    """share of a round's clients that may lie, rounded down to whole clients: what trimmed-mean, krum, multi-krum and
    polar-krum withstand"""
    uplink: Literal["coefficients", "lora"] | None = None
    """what a client sends: its projected gradients, from which the server reconstructs its update, or its LoRA; by
    default the former, and the LoRA with fedavg, which has none"""
    signed: bool = False
    """clients sign their updates and the server its records, with Ed25519 keys (in a simulation from the seed)"""
    directions_shared: bool = False
    """all clients of a round draw the same directions, so that the server averages scalars; by default each client
    draws its own (the paper)"""
    server_optimizer: Literal["mean", "momentum", "adam"] = "mean"
    """what the server does with the mean update: apply it, or feed it to an optimizer"""
    server_learning_rate: float = 2.0
    """learning rate of the server's optimizer (paper: 1)"""

    def __post_init__(self):
        super().__post_init__()
        self._require_counts("rounds")
        self._require("participation", 0 < self.participation <= 1, "above 0 and at most 1")
        self._require_positive("server_learning_rate")
        self._require("byzantine_share", 0 <= self.byzantine_share < 0.5, "at least 0 and below 0.5")
        if self.aggregation in RULES and self.weighting != "equal":
            raise UserError(f"--weighting {self.weighting}: --aggregation {self.aggregation} counts clients alike")


@dataclass(frozen=True)
class FaultConfig(Options):
    """Clients that fail and rounds that diverge."""

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

    def __post_init__(self):
        super().__post_init__()
        self._require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        self._require("deadline", self.deadline is None or 0 < self.deadline < math.inf, "above 0")
        self._require_counts("attempts")


@dataclass(frozen=True)
class PrivacyConfig(Options):
    """What the server, and whoever reads the ledger, may learn of a client."""

    dp_epsilon: float | None = None
    """ε of differential privacy after all rounds: projected gradients are clipped in norm and noise is added; losses
    are not sent"""
    dp_unit: Literal["client", "example"] = "client"
    """what is protected: all that a client sends, by noise on the clients' mean (or with directions of their own on
    what each sends); or each single example of a client, by noise that the client adds in every local step"""
    dp_delta: float = 1e-5
    """δ that goes with it"""
    dp_clip: float = 1.0
    """root mean square to which projected gradients are clipped together: those of a client in a round, or with
    --dp-unit example those of an example in a step"""
    secure_sum: bool = False
    """the server learns the sum of a round's projected gradients and no single client's (with --directions-shared);
    with --dp-epsilon each client adds a share of the noise; losses are not sent"""

    def __post_init__(self):
        super().__post_init__()
        self._require("dp_epsilon", self.dp_epsilon is None or 0 < self.dp_epsilon < math.inf, "above 0")
        self._require("dp_delta", 0 < self.dp_delta < 1, "above 0 and below 1")
        self._require_positive("dp_clip")

    @property
    def private(self) -> bool:
        """Whether clients' numbers are clipped and noised."""
        return self.dp_epsilon is not None

    @property
    def protects_examples(self) -> bool:
        """Whether each local step is private in the examples of its batch."""
        return self.private and self.dp_unit == "example"

    @property
    def sends_losses(self) -> bool:
        """Whether clients send their losses beside their projected gradients."""
        return not (self.private or self.secure_sum)


@cache
def hints(config: type[Options]) -> dict[str, Any]:
    """The annotated type of each option."""
    return get_type_hints(config)


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a ``Literal``, or of one that may be None; nothing for another type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for option in get_args(hint) for choice in _choices(option))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, as the command line would make it."""
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return type(value) is str and value in get_args(hint)
    if hint is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**53)
    return type(value) is (NoneType if hint is None else hint)
