"""The server of a deployed run: a simulated run's own loop, with clients that a message reaches.

It holds the base model, and test and validation examples of its own. Of the clients' examples it knows the lengths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmezo_jax.core import federated
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.buckets import Width
from fedmezo_jax.deploy import agreement, envelopes, examples
from fedmezo_jax.deploy.envelopes import (
    Answer,
    End,
    Enrolment,
    Facts,
    Position,
    Progressed,
    Result,
    Start,
)
from fedmezo_jax.deploy.examples import read_own
from fedmezo_jax.deploy.post import Post, is_a, ticket
from fedmezo_jax.deploy.sum_server import new_name, secure_sum_of
from fedmezo_jax.deploy.transport import Transport
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.task import LlamaTask
from fedmezo_jax.run import messages, results, rounds, run_folder, signatures
from fedmezo_jax.run.acceptance import Expected, Message, receive
from fedmezo_jax.run.clients import damping
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext, build, context_of, round_examples
from fedmezo_jax.run.job import run_in_folder, to_stderr
from fedmezo_jax.run.ledger import Entry
from fedmezo_jax.run.loop import RunResult

ENROLMENTS = "enrolments.json"


class Patience(NamedTuple):
    """How long the server waits.

    Attributes:
        enrolment: seconds for all clients to enrol.
        round: seconds for the clients of a round.
        sum_step: seconds for each step of a secure sum after the clients' work.
    """

    enrolment: float = 600.0
    round: float = 600.0
    sum_step: float = 60.0


def serve(
    config: RunConfig,
    out: str | PathLike[str],
    transport: Transport,
    files: Iterable[Path],
    *,
    model: str | None = None,
    keys: signatures.ServerKeys | None = None,
    resume: bool = False,
    checkpoint_every: int = 5,
    eval_every: int = 5,
    exact: bool = False,
    seeded_noise: bool = False,
    patience: Patience = Patience(),  # noqa: B008
    on_start: Callable[[RunContext], None] = lambda context: None,
    on_round: Callable[[dict[str, Any]], None] = lambda record: None,
    notify: Callable[[str], None] = to_stderr,
) -> RunResult:
    """Runs all rounds with clients behind a transport, as :func:`job.fine_tune` does with simulated ones.

    Args:
        config: what decides the run's numbers; each client must have the same.
        out: the run's folder; see :func:`job.fine_tune`, as all that is not explained here.
        transport: reaches clients 0 to N−1.
        files: the server's own examples: the file of test examples, and with ``--learning-rate auto`` the file of
            validation examples.
        model: the model as it is called on this machine; by default as the run calls it.
        keys: the server's private key and everyone's public ones, where the run is signed or has a secure sum.
        resume: go on with the run.
        checkpoint_every: rounds between checkpoints.
        eval_every: rounds between measurements of the test loss.
        exact: see :func:`agreement.plan_of`.
        seeded_noise: whether the noise of a private run comes from its seed, which every client knows, and so protects
            nobody; by default it comes from the operating system.
        patience: how long to wait for clients.
        on_start: called when all clients are known.
        on_round: called with each round's record.
        notify: called with each line that the user should read.

    Raises:
        UserError: as :func:`job.fine_tune`; or a client did not enrol, or differs from the server.
    """
    agreement.check_deployable(config)
    if keys is None and (config.signed or config.secure_sum):
        option = "--signed" if config.signed else "--secure-sum"
        raise UserError(f"{option}: give the server's private key and everyone's public keys")
    public_keys = signatures.clients_of(keys.public) if keys and config.secure_sum else []
    own = read_own(config, files, model)
    if len(own.tables) != (2 if config.learning_rate == "auto" else 1):
        raise UserError("give the server's test examples, and with --learning-rate auto its validation examples too")
    config, folder = own.config, Path(out)
    facts = agreement.facts_of(config, own.base_hash, public_keys)
    post = Post(transport, facts, notify)

    def load() -> RunContext:
        known = read_enrolments(folder / ENROLMENTS, facts) if resume else None
        post.enrolments = known or post.enrol(config.clients, patience.enrolment)
        task = examples.server_task(own, post.enrolments, notify)
        post.plan = agreement.plan_of(config, task, exact)
        if not known:
            post.enrol(config.clients, patience.enrolment)  # now all make ready by the plan
        return context_of(task, config)._replace(seeded_noise=seeded_noise)

    remote: list[RemoteClients] = []

    def clients_of(context: RunContext[LlamaTask]) -> RemoteClients:
        write_enrolments(folder / ENROLMENTS, post.enrolments)
        remote.append(RemoteClients(context, post, folder, patience, public_keys, notify))
        return remote[0]

    with run_folder.guarded(folder):
        result = run_in_folder(
            config,
            folder,
            load,
            resume=resume,
            checkpoint_every=checkpoint_every,
            eval_every=eval_every,
            check_rate=False,
            on_start=on_start,
            on_round=on_round,
            notify=notify,
            clients_of=clients_of,
            keys=keys if config.signed else None,
        )
    remote[0].end()
    return result


class RemoteClients:
    """Clients behind a transport, as the loop sees them (:class:`~fedmezo_jax.run.clients.Clients`)."""

    def __init__(
        self,
        setup: RunContext[LlamaTask],
        post: Post,
        folder: Path,
        patience: Patience,
        public_keys: Sequence[bytes],
        notify: Callable[[str], None],
    ):
        """Sends nothing yet.

        Args:
            setup: the server's.
            post: reaches them.
            folder: the run's, whose ledger is sent to clients that cannot follow otherwise.
            patience: how long to wait for them.
            public_keys: each client's, where they make secure sums.
            notify: called with what a client does wrong in one.
        """
        self._setup, self._post, self._folder, self._patience = setup, post, folder, patience
        self._public_keys, self._notify = public_keys, notify
        (_, self._round), _ = build(setup)
        self._key, self._sizes = run_key(setup.config.seed), setup.example_counts
        self._known: dict[int, int] = {}  # the round of each client's θ, as far as this process has heard
        self._results: dict[int, tuple[int, messages.Outcome | results.Mean | None]] = {}

    def first_report(self, state: federated.FederatedState) -> federated.RoundReport:
        """See :class:`Clients`: of the clients that answer with numbers of a possible size.

        Raises:
            UserError: there are none, or too few for a secure sum.
        """
        config = self._setup.config
        ids, picks = round_examples(config, self._setup.task, 0)
        rates = np.zeros(len(ids), np.float32)
        answers = self._ask_for_work(0, 0, np.inf, ids, picks, rates, None)
        if (summed := answers.summed) and summed.total is not None:
            mean = (summed.total / (len(ids) - len(summed.failed))).reshape(1, config.local_steps, -1)
            return federated.RoundReport(np.zeros((1, config.local_steps), np.float32), mean, rates)
        received = []
        for id, message in zip(map(int, ids), answers.messages, strict=True):
            shape = int(self._sizes[id]), config.local_steps, config.directions, 0.0
            answer = message and receive(message, Expected(0, id, *shape), state.params)
            if answer and answer.update and not answer.why:
                received.append(answer.update)
        if not received:
            raise UserError("no client has returned usable numbers to choose the learning rate by: start them again")
        gradients = np.stack([update.projected_gradients for update in received])
        return federated.RoundReport(np.stack([update.losses for update in received]), gradients, rates)

    def work(self, progress: rounds.Progress, t: int, signing: signatures.Signing | None) -> rounds.Work:
        """See :class:`Clients`."""
        config = self._setup.config

        def work(attempt: int, limit: float) -> rounds.Answers:
            ids, picks = round_examples(config, self._setup.task, t, attempt)
            rates = np.asarray(self._round.rates(progress.state, ids, self._key, damping(config, progress)))
            return self._ask_for_work(t, attempt, limit, ids, picks, rates, signing)

        return work

    def _ask_for_work(
        self,
        t: int,
        attempt: int,
        limit: float,
        ids: np.ndarray,
        picks: np.ndarray,
        rates: np.ndarray,
        signing: signatures.Signing | None,
    ) -> rounds.Answers:
        config, task = self._setup.config, self._setup.task
        widths = agreement.step_widths(config, task, ids, picks)
        run_chain, chain = signing.context if signing else (b"", b"")
        sum_name = new_name() if config.secure_sum else b""

        def start_of(id: int, rate: float) -> Callable[[int | None], Start]:
            begin = messages.pack_start(t, rate, chain)
            head = (self._post.run, attempt, float(limit), widths[id], run_chain, begin)
            return lambda seen: Start(ticket(), *head, self._progressed(id, t, seen), sum_name)

        requests = {id: start_of(id, float(rate)) for id, rate in zip(map(int, ids), rates, strict=True)}
        if config.secure_sum:
            patience = self._patience.round, self._patience.sum_step
            at, parties = (t, attempt), self._public_keys
            summed = secure_sum_of(config, self._post, self._notify, requests, at, sum_name, parties, patience)
            self._known |= {id: t for id in requests if id not in summed.failed}
            return rounds.Answers(ids, rates, [None] * len(ids), summed)
        answers = self._post.ask(requests, self._patience.round, is_a(Answer))
        self._known |= dict.fromkeys(answers, t)
        told = [answers.get(int(id)) for id in ids]
        sent = [answer and Message(answer.update, None, answer.signature or None) for answer in told]
        return rounds.Answers(ids, rates, sent)

    def _progressed(self, client: int, t: int, seen: int | None) -> Progressed:
        """What a client needs to come to round ``t``, where it has told that it has seen so many rounds."""
        if seen is not None:
            return Progressed(t, [], b"" if seen == t else (self._folder / run_folder.LEDGER).read_bytes())
        missing = range(self._known.get(client, t), t)
        lacking, clients = [self._results[r] for r in missing], self._setup.config.clients
        packed = [Result(attempt, results.pack_result(what, clients, client)) for attempt, what in lacking]
        return Progressed(missing.start, packed)

    def finish_round(self, progress: rounds.Progress, entry: Entry) -> None:
        """See :class:`Clients`: keeps the result for all who will ask."""
        config = self._setup.config
        report = rounds.report_of(entry, config.local_steps, config.sent_directions)
        what = results.result_of(config, self._round, progress.state, entry, report)
        self._results[entry.round] = entry.attempt, what

    def end(self) -> None:
        """Sends everyone the last results, and waits for at most a minute until they have them."""
        config = self._setup.config

        def end_of(id: int) -> Callable[[int | None], End]:
            return lambda seen: End(ticket(), self._post.run, self._progressed(id, config.rounds, seen))

        def is_done(response: envelopes.Response) -> bool:
            return isinstance(response, Position) and response.round == config.rounds

        self._post.ask({id: end_of(id) for id in range(config.clients)}, min(self._patience.round, 60), is_done)


def write_enrolments(file: Path, enrolments: Sequence[Enrolment]) -> None:
    """Keeps what clients enrolled with, for a resumed server."""
    rows = [
        {"shape": each.shape, "lengths": each.lengths.tolist(), "labels": each.labels.tolist()} for each in enrolments
    ]
    run_folder.write_json(file, {"clients": rows})


def read_enrolments(file: Path, facts: Facts) -> list[Enrolment] | None:
    """What :func:`write_enrolments` wrote; None where there is nothing.

    Raises:
        UserError: the file is damaged.
    """
    if not file.exists():
        return None
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["clients"]
        return [
            Enrolment(b"", facts, Width(*row["shape"]), np.array(row["lengths"]), np.array(row["labels"]), 0)
            for row in rows
        ]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: is damaged: put an intact copy in its place, or start with another --out") from None
