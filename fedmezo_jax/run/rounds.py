"""One round of a run, from the clients' work to the entry in the ledger and on to the next θ.

What a round was is decided once and written down in its :class:`ledger.Entry`. Everything after that follows from the
entry alone: so a resumed run, which reads it, and a replay end where the run did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmezo_jax.core import federated, mezo
from fedmezo_jax.core.mezo import Params
from fedmezo_jax.errors import UserError
from fedmezo_jax.privacy import fixed_point, mechanism
from fedmezo_jax.run import client_failures, divergence, messages, signatures
from fedmezo_jax.run.acceptance import Expected, Message, Received, receive
from fedmezo_jax.run.automatic_rate import next_rate
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.ledger import Entry
from fedmezo_jax.run.privacy_plan import Budget, PrivacyPlan, plan_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # only signed runs need it


class Progress(NamedTuple):
    """All that a run carries from one round to the next, and a checkpoint holds.

    Attributes:
        state: as :mod:`federated` has it.
        before: θ and the server optimizer's state where the last round that was kept began; None where no round can be
            rolled back.
        rate: float32 scalar, what the learning rates are multiplied by: 1 until rounds are rolled back, or with
            ``--learning-rate auto`` the rate itself.
    """

    state: federated.FederatedState
    before: tuple[Params, optax.OptState] | None
    rate: jax.Array


class Summed(NamedTuple):
    """What a secure sum leaves the server.

    Attributes:
        total: ``[H·n]`` float64, the sum of the numbers of all clients that did not fail; None where there is none.
        failed: why the others failed, by client.
    """

    total: np.ndarray | None
    failed: Mapping[int, str]


class Answers(NamedTuple):
    """What comes back to the server when it has asked clients for their work.

    Attributes:
        ids: ``[P]`` int32, who was asked.
        learning_rates: ``[P]`` float32, η_i that they were given.
        messages: for each of them what came in, as bytes; None where nothing did.
        summed: their sum, where the clients have made that themselves and sent nothing else.
    """

    ids: np.ndarray
    learning_rates: np.ndarray
    messages: Iterable[Message | None]
    summed: Summed | None = None


Work: TypeAlias = Callable[[int, float], Answers]
"""``work(attempt, limit) -> Answers``: the clients' half of a round; ``limit`` bounds |g|."""


def begin(state: federated.FederatedState, config: RunConfig, first_rate: float) -> Progress:
    """Progress before the first round, whose base learning rate ``--learning-rate auto`` takes from ``first_rate``."""
    before = (state.params, state.optimizer) if config.on_divergence == "rollback" else None
    return Progress(state, before, jnp.float32(first_rate if config.learning_rate == "auto" else 1))


def advance(config: RunConfig, progress: Progress, entry: Entry, moved: federated.FederatedState | None) -> Progress:
    """Progress after a round.

    Args:
        config: the run's.
        progress: before the round.
        entry: what the round was.
        moved: the state after the whole of its update; None where it is not taken.
    """
    state = progress.state
    if config.learning_rate == "auto":
        progress = progress._replace(rate=next_rate(progress.rate, entry.step))
    if entry.rolled_back:
        assert progress.before is not None  # as RunConfig.on_divergence says
        params, optimizer = progress.before
        state = state._replace(params=params, optimizer=optimizer, round=state.round + 1)
        return progress._replace(state=state, rate=progress.rate / 2)
    before = progress.before and (state.params, state.optimizer)
    return progress._replace(state=take_step(state, moved, entry.step), before=before)


def take_step(
    state: federated.FederatedState, moved: federated.FederatedState | None, step: float
) -> federated.FederatedState:
    """The state after so much of an update: θ + step·(θ' − θ). Of a round that is not taken only its number remains."""
    if not step or moved is None:
        return state._replace(round=state.round + 1)
    return moved if step == 1 else moved._replace(params=_between(state.params, moved.params, np.float32(step)))


@jax.jit
def _between(params: Params, moved: Params, step: jax.Array) -> Params:
    return jax.tree.map(lambda old, new: old + step * (new - old), params, moved)


def report_of(entry: Entry, steps: int, directions: int) -> federated.RoundReport:
    """What the round's clients reported, from their updates; NaN for those of whom there is none."""
    losses = np.full((len(entry.ids), steps), np.nan, np.float32)
    gradients = np.full((len(entry.ids), steps, directions), np.nan, np.float32)
    for i, message in enumerate(entry.updates):
        if message is not None:
            update = messages.unpack_update(message)
            losses[i], gradients[i] = update.losses, update.projected_gradients
    return federated.RoundReport(losses, gradients, entry.learning_rates)


def simulated_answers(
    config: RunConfig,
    round: federated.Round,
    state: federated.FederatedState,
    sizes: np.ndarray,
    ids: np.ndarray,
    report: federated.RoundReport,
    key: jax.Array,
    attempt: int = 0,
    context: signatures.Context | None = None,
    private_keys: Sequence[Ed25519PrivateKey] = (),
) -> Answers:
    """The messages of clients that were simulated here, from their report on the host, packed one by one."""

    def packed(t: int) -> Iterator[Message]:
        for i, id in enumerate(map(int, ids)):
            gradients, losses = np.asarray(report.projected_gradients[i]), np.asarray(report.losses[i])
            update = messages.Update(t, id, int(sizes[id]), gradients, losses)
            update = private_update(config, update, attempt, noise_of(config, seeded=True))
            lora = None
            if not config.sends_coefficients:
                lora = messages.pack_lora_update(update, jax.device_get(round.upload(state, id, report, i, key)))
            message = Message(messages.pack_update(update), lora)
            yield signed(message, private_keys[id], context, t, id) if context else message

    return Answers(ids, np.asarray(report.learning_rates), packed(int(state.round)))


def noise_of(config: RunConfig, seeded: bool) -> mechanism.Noise:
    """Where a run's noise comes from: its seed, or the operating system."""
    return partial(mechanism.simulated_noise, config.seed) if seeded else mechanism.system_noise


def private_update(config: RunConfig, update: messages.Update, attempt: int, noise: mechanism.Noise) -> messages.Update:
    """What a client tells of its update: no losses where they are not sent, and with the noise that it adds itself."""
    if not config.sends_losses:
        update = update._replace(losses=np.zeros_like(update.losses))
    plan = plan_of(config)
    if plan is None or not plan.client_noise:
        return update
    draw = noise(update.round, attempt, update.client)
    gradients = mechanism.noisy(update.projected_gradients, plan.norm, plan.client_noise, draw)
    return update._replace(projected_gradients=gradients)


def signed(
    message: Message, key: Ed25519PrivateKey, context: signatures.Context, round_index: int, client: int
) -> Message:
    """The message with its client's signature."""
    return message._replace(signature=signatures.sign_update(key, context, round_index, client, message.update))


def run_round(
    config: RunConfig,
    t: int,
    sizes: np.ndarray,
    typical: divergence.Typical,
    work: Work,
    like: Params,
    budget: Budget | None = None,
    signing: signatures.Signing | None = None,
    seeded_noise: bool = True,
) -> tuple[Entry, list[Params | None]]:
    """Asks the clients for their work until some of them return usable numbers.

    Args:
        config: the run's.
        t: number of the round.
        sizes: ``[N]`` rows of each client.
        typical: what earlier rounds measured.
        work: the clients' half of the round.
        like: a tree with the structure and shapes of θ.
        budget: what has been spent of the run's privacy; None where nothing is private.
        signing: what its signatures take; None where nothing is signed.
        seeded_noise: whether the server's noise comes from the seed.

    Returns:
        The round's entry, and for each participant the θ_i that it sent, if it sent one.

    Raises:
        UserError: every client failed, as often as the configuration allows, or the round would spend more than
            ``--dp-epsilon``.
    """
    plan = plan_of(config)
    failed: list[tuple[int, int, str]] = []
    for attempt in range(config.attempts):
        away = client_failures.absent(config.seed, t, attempt, config.clients, config.dropout, config.deadline)
        clip = config.on_divergence == "clip"
        limit = typical.limit if clip else np.inf
        ids, rates, arrived, summed = work(attempt, limit)
        spent = budget and budget.after(t, ids)
        if spent and spent.exceeded:
            raise UserError(
                f"round {t + 1}: {spent.exceeded}, which --dp-epsilon does not cover: the run ends here; "
                "experiments.replay makes the adapter of the rounds before from its ledger"
            )
        received, sent_signatures = [], []
        for message, id, rate in zip(arrived, map(int, ids), rates, strict=True):
            shape = config.local_steps, config.sent_directions
            expected = Expected(t, id, int(sizes[id]), *shape, float(rate), limit if clip else None)
            if summed:
                answer, signature = Received(None, None, summed.failed.get(id)), None
            elif message is None or away.get(id) == client_failures.DROPPED:
                answer, signature = Received(None, None, client_failures.DROPPED), None
            else:
                answer, signature = receive(message, expected, like), message.signature
            if answer.update and (why := _refusal(config, answer.update, signature, signing)):
                answer = Received(None, None, why)
            sent_signatures.append(signature if answer.update else None)
            received.append(answer._replace(why=away.get(id) or answer.why))
        enough = sum(answer.why is None for answer in received) >= config.threshold
        if config.secure_sum and (not enough or (summed and summed.total is None)):
            received = [answer._replace(why=answer.why or client_failures.TOO_FEW) for answer in received]
        failed += [(attempt, int(id), answer.why) for id, answer in zip(ids, received, strict=True) if answer.why]
        weights = sizes[ids] if config.weighting == "samples" else np.ones(len(ids), np.float32)
        weights = np.where([answer.why is None for answer in received], weights, 0).astype(np.float32)
        updates = [answer.update and messages.pack_update(answer.update) for answer in received]
        entry = Entry(t, attempt, ids, weights, rates, updates, failed)
        if signing:
            entry = entry._replace(signatures=tuple(sent_signatures))
        if spent:
            entry = entry._replace(epsilon=spent.epsilon)
        if config.keeps_mean:
            told = [answer.update for answer in received]
            entry = _mean_alone(config, plan, entry, told, noise_of(config, seeded_noise), summed)
        report = report_of(entry, config.local_steps, config.sent_directions)
        if clip:
            here = np.array([update is not None for update in updates])
            entry = entry._replace(clipped=divergence.count_clipped(report, here, limit))
        if config.on_divergence == "rollback" and typical.diverged(known_losses(config, entry, report)):
            entry = entry._replace(rolled_back=True)
        unusable = any(answer.why in client_failures.UNUSABLE for answer in received)
        if config.learning_rate == "auto" and unusable and not weights.any():
            entry = entry._replace(step=0.0)
        if weights.any() or entry.rolled_back or not entry.step:
            return entry, [answer.params for answer in received]
    raise UserError(
        f"round {t + 1}: in {config.attempts} attempts no client returned usable numbers "
        f"({', '.join(sorted({why for *_, why in failed}))}): {_remedy(failed)}, or allow more --attempts"
    )


def _refusal(
    config: RunConfig,
    update: messages.Update,
    signature: bytes | None,
    signing: signatures.Signing | None,
) -> str | None:
    """Why an update is not kept: it has losses where it must not, or is not signed where it must be; None if it is."""
    if not config.sends_losses and np.any(update.losses):
        return client_failures.MALFORMED
    if signing is None:
        return None
    sender, packed = (update.round, update.client), messages.pack_update(update)
    signed = signatures.is_signed(signing.public_keys, signing.context, *sender, packed, signature)
    return None if signed else client_failures.UNSIGNED


def _mean_alone(
    config: RunConfig,
    plan: PrivacyPlan | None,
    entry: Entry,
    updates: list[messages.Update | None],
    noise: mechanism.Noise,
    summed: Summed | None = None,
) -> Entry:
    """What is kept of a private round with shared directions, or of a secure sum: no single client's numbers."""
    vectors = [
        update.projected_gradients.ravel()
        for update, weight in zip(updates, entry.weights, strict=True)
        if update and weight
    ]
    size = config.local_steps * config.sent_directions
    if config.secure_sum:
        total = summed.total if summed else fixed_point.total(vectors, len(updates)) if vectors else None
        total = np.zeros(size) if total is None else total
        mean = (total / (len(updates) if plan else max(np.count_nonzero(entry.weights), 1))).astype(np.float32)
    else:
        assert plan is not None  # as RunConfig.keeps_mean says
        draw = noise(entry.round, entry.attempt, mechanism.SERVER)
        mean = mechanism.noisy_mean(vectors, len(updates), plan.norm, plan.noise, draw, size)
    nobody = [None] * len(updates)
    return entry._replace(updates=nobody, signatures=tuple(nobody) if entry.signatures else (), mean=mean)


def _remedy(failed: list[tuple[int, int, str]]) -> str:
    whys = {why for *_, why in failed}
    if whys & set(client_failures.UNUSABLE):
        return "lower --learning-rate"
    if whys & {client_failures.DROPPED, client_failures.LATE}:
        return "lower --dropout or raise --deadline"
    return "check that all clients run this version with this configuration"


def known_losses(config: RunConfig, entry: Entry, report: federated.RoundReport) -> np.ndarray:
    """``[K, H]`` losses of the clients that answered in time, infinite where their numbers are of no use.

    None are known where they are not sent.
    """
    if not config.sends_losses:
        return np.zeros((0, config.local_steps), np.float32)
    failed = {id: why for attempt, id, why in entry.failed if attempt == entry.attempt}
    whys = [failed.get(int(id)) for id in entry.ids]
    on_time = [why is None or why in client_failures.UNUSABLE for why in whys]
    usable = np.array([why is None for why in whys])[:, None]
    return np.where(usable, np.asarray(report.losses), np.inf)[on_time]


def combined(
    round: federated.Round, state: federated.FederatedState, entry: Entry, report: federated.RoundReport
) -> np.ndarray:
    """How far shared directions move θ, ``[H, n]`` float32."""
    if entry.mean is None:
        return round.combine(state, entry.ids, entry.weights, report)
    shape = report.projected_gradients.shape[1:]
    return mezo.coefficients(np.float32(entry.learning_rates[0]), entry.mean.reshape(shape))


def move(
    config: RunConfig,
    round: federated.Round,
    progress: Progress,
    entry: Entry,
    uploads: list[Params | None] | None,
    key: jax.Array,
) -> federated.FederatedState | None:
    """The state after the whole of a round's update, or None where the round has none.

    Args:
        config: the run's.
        round: the algorithm's.
        progress: before the round.
        entry: what the round was.
        uploads: the clients' θ_i as they were sent, where clients send them; None in a round that is made again from
            the ledger, where they are reconstructed from the projected gradients.
        key: the run's.
    """
    if entry.rolled_back or not entry.step:
        return None
    report = report_of(entry, config.local_steps, config.sent_directions)
    if entry.mean is not None:
        coefficients = combined(round, progress.state, entry, report)
        return jax.block_until_ready(round.apply_combined(progress.state, coefficients, key))
    client_params: Iterable[Params | None] | None = uploads
    if config.sends_coefficients:
        client_params = None
    elif not uploads:
        client_params = (
            jax.device_get(round.upload(progress.state, int(id), report, i, key)) if entry.weights[i] else None
            for i, id in enumerate(entry.ids)
        )
    return jax.block_until_ready(round.apply(progress.state, entry.ids, entry.weights, report, key, client_params))
