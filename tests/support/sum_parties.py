"""The clients of a deployed run's secure sum without model and run: their numbers, and the messages they would get."""

import numpy as np

from fedmezo_jax.deploy.sum_client import SecureSums
from fedmezo_jax.privacy import fixed_point
from fedmezo_jax.run import secure_sum_messages, signatures
from fedmezo_jax.run.config import RunConfig

CONFIG = RunConfig(clients=5, participation=1.0, directions_shared=True, secure_sum=True, attempts=3)
RUN = b"the run's name.."


class Parties:
    """Five clients, of whom four must stay; ``at`` is the round and the attempt, ``name`` names the sum."""

    def __init__(self, config=CONFIG):
        keys = signatures.simulated_keys(config)
        self.config, self.public = config, signatures.clients_of(signatures.identities(keys))
        self.sums = [SecureSums(config, i, key, self.public) for i, key in enumerate(keys.clients)]
        self.numbers = np.random.default_rng(0).standard_normal((config.clients, 6)).astype(np.float32)

    def begin(self, name, at=(0, 0)):
        self.name = name
        begun = [sums.begin(name, RUN, *at, numbers) for sums, numbers in zip(self.sums, self.numbers, strict=True)]
        self.adverts = {i: secure_sum_messages.unpack_advert(message) for i, message in enumerate(begun)}

    def share(self):
        packed = secure_sum_messages.pack_adverts(self.adverts)
        sent = [secure_sum_messages.unpack_boxes(sums.answer(self.name, "share", packed)) for sums in self.sums]
        self.boxes = [{j: sent[j][i] for j in range(len(sent))} for i in range(len(sent))]

    def mask(self, i):
        """A client's masked vector, or whose shares it cannot read."""
        packed = secure_sum_messages.pack_boxes(self.boxes[i])
        return secure_sum_messages.unpack_masked(self.sums[i].answer(self.name, "mask", packed), 6)

    def agree(self, i, arrived):
        packed = secure_sum_messages.pack_ids(arrived)
        return secure_sum_messages.unpack_signature(self.sums[i].answer(self.name, "agree", packed))

    def unmask(self, i, signed):
        packed = secure_sum_messages.pack_signatures(signed)
        return secure_sum_messages.unpack_unmasking(self.sums[i].answer(self.name, "unmask", packed))

    def masked(self, name, at=(0, 0)):
        """The masked vectors of a new sum."""
        self.begin(name, at)
        self.share()
        return {i: self.mask(i) for i in range(len(self.sums))}

    def clear_sum(self, ids):
        """What the sum must be."""
        return np.sum([np.rint(self.numbers[i].astype(np.float64) * 2.0**fixed_point.SCALE) for i in ids], axis=0)
