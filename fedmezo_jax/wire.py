"""What clients and server send each other, as bytes: sizes are read off these messages and never computed.

Messages are msgpack maps written by ``flax.serialization``.
"""

from __future__ import annotations

import numpy as np
from flax.serialization import msgpack_serialize, to_bytes

from fedmezo_jax.mezo import Params


def lora_message(params: Params) -> bytes:
    """The whole LoRA tree: what FedAvg and the FedMeZO of the paper send, up and down."""
    return to_bytes(params)


def seed_message(round_index: int, client: int, coefficients: np.ndarray) -> bytes:
    """A client's local work as the numbers that rebuild it: with the run's key, its ``[H, n]`` float32 coefficients."""
    return msgpack_serialize({"round": round_index, "client": client, "coefficients": np.asarray(coefficients)})
