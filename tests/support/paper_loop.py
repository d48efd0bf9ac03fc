"""FedMeZO as its paper states it: readable loops over clients, steps and leaves, in float64 numpy. The oracle of the
round.

Source: Alg. 1 and Eq. 3-4 of arXiv 2402.05926, with Prop. 3.7 for the learning rates. Written for a dictionary of
    arrays.
"""

import binascii
import functools

import jax
import numpy as np


@functools.partial(jax.jit, static_argnames="shapes")
def _draw(key, shapes):
    z = {}
    for name, shape in shapes:
        leaf_key = jax.random.fold_in(key, binascii.crc32(name.encode()))
        if len(shape) < 2:
            z[name] = jax.random.normal(leaf_key, shape)
        else:
            rows = [jax.random.normal(jax.random.fold_in(leaf_key, row), shape[1:]) for row in range(shape[0])]
            z[name] = jax.numpy.stack(rows)
    return z


def direction(key, params):
    """z for every leaf: one stream a leaf, and one a row of leaves with two or more dimensions."""
    shapes = tuple((name, leaf.shape) for name, leaf in params.items())
    return {name: np.asarray(leaf, np.float64) for name, leaf in _draw(key, shapes).items()}


def move(params, z, scale):
    return {name: leaf + scale * z[name] for name, leaf in params.items()}


def local_work(loss, params, batches, key, learning_rate, scale, directions):
    losses = []
    for h, batch in enumerate(batches):
        moved, seen = params, []
        for k in range(directions):
            z = direction(jax.random.fold_in(jax.random.fold_in(key, h), k), params)
            plus, minus = loss(move(params, z, scale), batch), loss(move(params, z, -scale), batch)
            gradient = (plus - minus) / (2 * scale)
            moved = move(moved, z, -learning_rate * gradient / directions)
            seen += [plus, minus]
        params = moved
        losses.append(np.mean(seen))
    return params, np.mean(losses)


def index(signals):
    """Φ of the clients whose signal is known, 0 for the others."""
    known = [s for s in signals if s is not None]
    if not known:
        return [0.0] * len(signals)
    mean = np.mean(known)
    widest = max(abs(s - mean) for s in known)
    return [0.0 if s is None or widest == 0 else (s - mean) / widest for s in signals]


def fedmezo(
    loss, params, batches, cohorts, weights, key, learning_rate, strategy, personalize, scale, directions, shared=False
):
    """Runs ``len(cohorts)`` rounds; ``batches[t][i]`` are the H batches of client i in round t. Yields θ and rates.

    With ``shared`` all clients of a round draw the same directions.
    """
    clients = len(weights)
    losses = [[] for _ in range(clients)]
    drift = [None] * clients
    for t, cohort in enumerate(cohorts):
        if strategy == "round-wise":
            phi = index([history[-1] if history else None for history in losses])
        elif strategy == "five-round":
            phi = index([np.mean(history[-5:]) if len(history) >= 5 else None for history in losses])
        elif strategy == "model-diff":
            phi = index(drift)
        else:
            phi = [0.0] * clients
        rates = [learning_rate * (1 + personalize * p) for p in phi]

        updates = {}
        for i in cohort:
            client_key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 0), t), i)
            if shared:
                client_key = jax.random.fold_in(jax.random.fold_in(key, 3), t)
            local, mean_loss = local_work(loss, params, batches[t][i], client_key, rates[i], scale, directions)
            losses[i].append(mean_loss)
            updates[i] = {name: local[name] - params[name] for name in params}

        for i in cohort:
            squares = 0.0
            for name in params:
                centre = np.mean([updates[j][name] for j in cohort], axis=0)
                squares += np.sum((updates[i][name] - centre) ** 2)
            drift[i] = np.sqrt(squares)

        total = sum(weights[i] for i in cohort)
        for i in cohort:
            params = {name: params[name] + weights[i] / total * updates[i][name] for name in params}
        yield params, [rates[i] for i in cohort]
