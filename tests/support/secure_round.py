"""A secure sum among clients in one process, with every party's messages at hand."""

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_jax.privacy import secure_sum

DRAW = np.random.default_rng(0)


class SecureRound:
    """A round among n clients, step by step; whoever is in ``before_mask`` or ``after_mask`` goes then."""

    def __init__(self, n, threshold, size=5, round=b"run 1, round 3", before_mask=(), after_mask=(), vectors=None):
        keys = [Ed25519PrivateKey.from_private_bytes(DRAW.bytes(32)) for _ in range(n)]
        identities = {i: key.public_key().public_bytes_raw() for i, key in enumerate(keys)}
        self.round, self.threshold = round, threshold
        joined = [secure_sum.join(i, round, threshold, identities, key) for i, key in enumerate(keys)]
        self.clients = [client for client, _ in joined]
        self.adverts = {i: advert for i, (_, advert) in enumerate(joined)}
        self.vectors = DRAW.integers(0, 2**64, (n, size), np.uint64) if vectors is None else vectors
        self.sent = [secure_sum.share(client, self.adverts) for client in self.clients]
        self.shared = list(range(n))
        self.masked = {
            i: secure_sum.mask(client, self.vectors[i], self.shared)
            for i, client in enumerate(self.clients)
            if i not in before_mask
        }
        self.arrived = sorted(self.masked)
        self.staying = [i for i in self.arrived if i not in after_mask]
        self.signatures = {i: secure_sum.agree(self.clients[i], self.arrived) for i in self.staying}

    def boxes(self, i):
        return {sender: self.sent[sender][i] for sender in self.shared}

    def unmask(self, i):
        return secure_sum.unmask(self.clients[i], self.boxes(i), self.arrived, self.signatures)

    def total(self):
        unmaskings = {i: self.unmask(i) for i in self.staying}
        return secure_sum.total(self.round, self.threshold, self.adverts, self.shared, self.masked, unmaskings)
