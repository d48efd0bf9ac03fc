"""A client of a deployed run: it holds the base model and its own examples, and answers one request at a time.

It needs no file between two requests. A client that was restarted has forgotten θ; the server then sends the ledger so
far, from which it is made again.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_jax.core import federated, transforms
from fedmezo_jax.core.random import init_key, run_key
from fedmezo_jax.data.batches import round_picks, take
from fedmezo_jax.data.buckets import filling_lengths, label_counts, lengths
from fedmezo_jax.deploy import agreement, envelopes, examples
from fedmezo_jax.deploy.client_budget import budget_before
from fedmezo_jax.deploy.envelopes import (
    Answer,
    End,
    Enrolment,
    Hello,
    Plan,
    Position,
    Progressed,
    Refusal,
    Start,
    SumStep,
)
from fedmezo_jax.deploy.examples import OwnExamples
from fedmezo_jax.deploy.sum_client import SecureSums
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.task import LlamaTask
from fedmezo_jax.run import ledger, messages, results, rounds, signatures
from fedmezo_jax.run.acceptance import Expected, Message, receive
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext, algorithm, build
from fedmezo_jax.run.example_privacy import add_noise
from fedmezo_jax.run.privacy_plan import Budget
from fedmezo_jax.run.replay import follow_ledger

_REMEMBERED = 16
"""Answers that a client can give again: a round with a secure sum has five, and their requests may cross."""


class Client:
    """One client, from its first request to the end of the run.

    Attributes:
        rounds: how many rounds its θ has seen.
        params: θ, on the host.
    """

    def __init__(
        self,
        client: int,
        own: OwnExamples,
        key: Ed25519PrivateKey | None = None,
        public_keys: Sequence[bytes] = (),
        *,
        seeded_noise: bool = False,
        notify: Callable[[str], None] = lambda line: None,
    ):
        """Knows nothing of the run but its configuration.

        Args:
            client: its id.
            own: its model and examples.
            key: its private key, where the run is signed or has a secure sum.
            public_keys: every client's, by client, where the run has a secure sum; not from the server.
            seeded_noise: whether the noise that it adds comes from the seed, which every party knows, and so protects
                nobody; by default it comes from the operating system.
            notify: called with a line about what it does.

        Raises:
            UserError: the configuration is not one of a deployed run, or has no such client, or the key is missing.
        """
        config = own.config
        agreement.check_deployable(config)
        if not 0 <= client < config.clients:
            raise UserError(f"client {client}: the run has clients 0 to {config.clients - 1}")
        if config.signed and key is None:
            raise UserError(f"client {client}: the run is signed: give its private key")
        self._sums = _sums_of(config, client, key, public_keys) if config.secure_sum else None
        self._id, self._own, self._signing_key, self._notify = client, own, key, notify
        self._facts = agreement.facts_of(config, own.base_hash, public_keys if config.secure_sum else ())
        self._run, self._key = agreement.run_name(self._facts), run_key(config.seed)
        self._noise, self._seeded_noise = rounds.noise_of(config, seeded_noise), seeded_noise
        self._budget: Budget | None = None  # until it is first asked for work
        self._plan: Plan | None = None
        self._sent: dict[tuple[int, int], np.ndarray] = {}  # by round and attempt
        self._answered: dict[bytes, bytes] = {}  # its last answers, by ticket
        self._chain = b""

    @property
    def rounds(self) -> int:
        """How many rounds its θ has seen."""
        return int(self._progress.state.round) if self._plan else 0

    @property
    def params(self) -> federated.Params:
        """θ as far as it has followed, on the host."""
        return jax.device_get(self._progress.state.params)

    def handle(self, message: bytes) -> bytes:
        """The answer to a request. An answer that was lost is given again without work.

        Raises:
            UserError: the message cannot be read at all.
        """
        request = envelopes.unpack_request(message)
        if request.ticket in self._answered:
            return self._answered[request.ticket]
        try:
            if isinstance(request, Hello):
                response = self._enrol(request)
            elif request.run != self._run or self._plan is None:
                response = Position(request.ticket, -1)
            elif isinstance(request, Start):
                response = self._work(request)
            elif isinstance(request, SumStep):
                response = self._sum_step(request)
            else:
                response = self._end(request)
        except UserError as error:
            self._notify(f"refused: {error}")
            response = Refusal(request.ticket, str(error))
        packed = envelopes.pack(response)
        self._answered[request.ticket] = packed
        if len(self._answered) > _REMEMBERED:
            del self._answered[next(iter(self._answered))]
        return packed

    def _enrol(self, hello: Hello) -> Enrolment:
        if wrong := agreement.difference(hello.facts, self._facts, f"client {self._id}"):
            raise UserError(wrong)
        if hello.plan and hello.plan != self._plan:
            self._begin(hello.plan)
        (rows,) = self._own.tables
        counts = lengths(rows), label_counts(rows)
        return Enrolment(hello.ticket, self._facts, examples.shape_of(rows), *counts, self.rounds)

    def _begin(self, plan: Plan) -> None:
        """Makes its task by the plan, and θ at the start."""
        config = self._own.config
        task = examples.client_task(self._own, self._id, plan, self._notify)
        params = task.init_params(init_key(config.seed))
        # The server says the learning rate: the program multiplies 1 by it.
        given = replace(config, learning_rate=1.0, personalize="frozen")
        init, self._round = algorithm(given, plan.at_once, None, plan.at_once)
        self._task: LlamaTask = task
        self._loss = build(RunContext(config, task, params, None, []))[1]
        self._start, self._plan = params, plan
        self._progress = rounds.begin(init(params, config.clients), config, 1.0)
        self._notify(f"client {self._id} joins the run with {len(task.parts[self._id])} examples")

    def _end(self, end: End) -> Position:
        self._catch_up(end.progressed)
        return Position(end.ticket, self.rounds)

    def _catch_up(self, progressed: Progressed) -> None:
        """Moves θ by what it has not seen yet; what it has seen is passed over."""
        if progressed.ledger:
            self._read_ledger(progressed.ledger)
        config = self._own.config
        for t, (attempt, result) in enumerate(progressed.results, progressed.first):
            if t == self.rounds:
                known = config, self._round, self._progress, result, self._key, self._id
                self._progress = results.follow(*known, self._sent.get((t, attempt)))
                self._sent = {}

    def _read_ledger(self, content: bytes) -> None:
        """θ from a ledger, every record of which is checked first."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.ledger"
            file.write_bytes(content)
            header, config = ledger.read_header(file), self._own.config
            if header["config"] != asdict(config) or header["base_hash"] != self._facts["base weights"]:
                raise UserError("the server's ledger is of a run with another configuration or other base weights")
            signatures.verify(file)
            (progress,) = deque(follow_ledger(file, config, self._start), 1)
        if int(progress.state.round) > self.rounds:
            self._progress, self._sent = progress, {}
            self._notify(f"client {self._id} has caught up with round {self.rounds} from the ledger")

    def _work(self, start: Start) -> Answer | Position:
        t, rate, chain = messages.unpack_start(start.start)
        self._catch_up(start.progressed)
        if t != self.rounds:
            return Position(start.ticket, self.rounds)
        if self._sums and (begun := self._sums.begun(start.sum)):
            return Answer(start.ticket, begun, b"")
        if not self._seeded_noise:
            self._spend(t)
        update = self._update(t, rate, start)
        update = rounds.private_update(self._own.config, update, start.attempt, self._noise)
        if self._sums:
            return self._begin_sum(self._sums, update, rate, start)
        if rate:  # at rate 0 the server only asks for the slopes at the start
            self._sent[t, start.attempt] = update.projected_gradients
        message = Message(messages.pack_update(update))
        if chain and self._signing_key:
            if self._chain not in (b"", start.chain):
                raise UserError("the server has begun another run with another ledger: start the client again")
            self._chain = start.chain
            message = rounds.signed(message, self._signing_key, signatures.Context(start.chain, chain), t, self._id)
        return Answer(start.ticket, message.update, message.signature or b"")

    def _begin_sum(self, sums: SecureSums, update: messages.Update, rate: float, start: Start) -> Answer:
        """Its part in a secure sum, into which it puts the update, if that is one that a server would take."""
        steps, directions = update.projected_gradients.shape
        expected = Expected(*update[:3], steps, directions, rate)
        if why := receive(Message(messages.pack_update(update)), expected, {}).why:
            raise UserError(why)
        numbers = update.projected_gradients.ravel()
        advert = sums.begin(start.sum, self._run, update.round, start.attempt, numbers)
        return Answer(start.ticket, advert, b"")

    def _sum_step(self, request: SumStep) -> Answer:
        if self._sums is None:
            raise UserError("the run has no secure sum")
        return Answer(request.ticket, self._sums.answer(request.sum, request.step, request.content), b"")

    def _spend(self, t: int) -> None:
        """Counts an answer in round ``t``, where it has noise of the client's own.

        Raises:
            UserError: it would be one too many.
        """
        examples = len(self._task.parts[self._id])
        if budget := self._budget or budget_before(self._own.config, self._id, examples, t):
            budget = budget.after(t, np.array([self._id]))
            if budget.exceeded:
                raise UserError(f"round {t + 1}: {budget.exceeded}, which --dp-epsilon does not cover: no answer")
            self._budget = budget

    def _update(self, t: int, rate: float, start: Start) -> messages.Update:
        """Its H local steps from θ."""
        config, task = self._own.config, self._task
        ids = np.array([self._id], np.int32)
        settings = {"seed": config.seed, "local_steps": config.local_steps, "batch_size": config.batch_size}
        picks = round_picks(task.train, task.parts, ids, t, **settings, by_length=task.by_length)
        batches = take(task.train, picks)
        if start.step_widths and self._plan and self._plan.at_once > 1:
            batches, ids = self._beside_others(batches, start.step_widths), np.repeat(ids, 2)
        if config.protects_examples:
            counts = np.full(len(ids), len(task.parts[self._id]))
            batches = add_noise(config, batches, ids, counts, t, start.attempt, self._noise)
        cohort = federated.Cohort(ids, np.ones(len(ids), np.float32), batches)
        transform = transforms.clip(np.float32(start.limit)) if config.on_divergence == "clip" else None
        report = self._round.work(self._progress.state, self._loss, cohort, self._key, transform, jnp.float32(rate))
        gradients, losses = np.asarray(report.projected_gradients[0]), np.asarray(report.losses[0])
        return messages.Update(t, self._id, len(task.parts[self._id]), gradients, losses)

    def _beside_others(self, batches, step_widths: bytes):
        """The batches, and beside them those of a companion whose examples are as long as the round's at each step.

        A step runs at the width that fits all who run at once: with the companion it is that of the round.
        """
        assert self._plan
        index = np.frombuffer(step_widths, np.uint8)
        if len(index) != batches.label_positions.shape[1] or index.max() >= len(self._plan.widths):
            raise UserError("the server's message has step widths that the plan does not have")
        tokens = np.array([width.tokens for width in self._plan.widths], np.int32)[index]
        filled = filling_lengths(tokens, batches.label_positions.shape[2], self._plan.shape.tokens, self._task.packed)
        positions = np.broadcast_to(filled[None, ..., None] - 2, batches.label_positions.shape)
        companion = batches._replace(label_positions=positions)
        return jax.tree.map(lambda one, other: np.concatenate([one, other]), batches, companion)


def _sums_of(config: RunConfig, client: int, key: Ed25519PrivateKey | None, public_keys: Sequence[bytes]) -> SecureSums:
    """A client's part in the secure sums of a run.

    Raises:
        UserError: its key is missing, or not the one that the others know, or theirs are missing.
    """
    if key is None or len(public_keys) != config.clients:
        raise UserError(f"client {client}: the run has a secure sum: give its private key and each client's public key")
    if key.public_key().public_bytes_raw() != public_keys[client]:
        raise UserError(f"client {client}: its private key is not that of its public key")
    return SecureSums(config, client, key, public_keys)
