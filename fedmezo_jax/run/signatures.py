"""Who sent which numbers: clients sign their updates and the server its records, with Ed25519 (RFC 8032).

A client signs (run, round, client, chain so far, update), the server (run, chain so far, record). The run is the chain
value of the ledger's header, which holds the configuration, the base's hash and everyone's public key; the chain so far
stands for all records before. So a signature cannot be moved to another run, round or client, and no record before it
can be changed, left out or put elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedmezo_jax.data.seeding import generator
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import ledger
from fedmezo_jax.run.config import RunConfig

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # only signed runs need it

KEY_BYTES, SIGNATURE_BYTES = 32, 64
_UPDATE, _RECORD = b"fedmezo_jax update 1\0", b"fedmezo_jax record 1\0"


class Keys(NamedTuple):
    """The private keys of a simulated run.

    Attributes:
        server: the server's.
        clients: each client's.
    """

    server: Ed25519PrivateKey
    clients: Sequence[Ed25519PrivateKey]


class ServerKeys(NamedTuple):
    """What the server of a run has of the keys.

    Attributes:
        private: its own.
        public: everyone's, as :func:`identities` gives them.
    """

    private: Ed25519PrivateKey
    public: bytes


def simulated_keys(config: RunConfig) -> Keys:
    """Keys from the run's seed, so that the run can be repeated: whoever has the seed can sign as anybody."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    make = Ed25519PrivateKey.from_private_bytes
    draw = generator(config.seed, "identities")
    server, *clients = (make(draw.bytes(KEY_BYTES)) for _ in range(config.clients + 1))
    return Keys(server, clients)


def identities(keys: Keys) -> bytes:
    """The public keys as a header holds them: the server's and each client's, 32 bytes each."""
    return b"".join(key.public_key().public_bytes_raw() for key in (keys.server, *keys.clients))


def clients_of(public_keys: bytes) -> list[bytes]:
    """Each client's public key, of those of :func:`identities`."""
    return [public_keys[i : i + KEY_BYTES] for i in range(KEY_BYTES, len(public_keys), KEY_BYTES)]


def server_keys(keys: Keys) -> ServerKeys:
    """What the server has of the keys of a simulation."""
    return ServerKeys(keys.server, identities(keys))


class Context(NamedTuple):
    """What a signature is bound to besides its content.

    Attributes:
        run: chain value of the ledger's header.
        chain: chain value of the last record.
    """

    run: bytes
    chain: bytes


class Signing(NamedTuple):
    """What the signatures of a round take, besides private keys.

    Attributes:
        public_keys: as :func:`identities` gives them.
        context: before the round.
    """

    public_keys: bytes
    context: Context

    def after(self, chain: str) -> Signing:
        """The same after a round, whose record has this chain value."""
        return self._replace(context=self.context._replace(chain=bytes.fromhex(chain)))


def _update_statement(context: Context, round_index: int, client: int, update: bytes) -> bytes:
    numbers = np.array([round_index, client], "<u8").tobytes()
    return _UPDATE + context.run + context.chain + numbers + update


def sign_update(key: Ed25519PrivateKey, context: Context, round_index: int, client: int, update: bytes) -> bytes:
    """A client's signature of its packed update."""
    return key.sign(_update_statement(context, round_index, client, update))


def sign_record(key: Ed25519PrivateKey, context: Context, entry: ledger.Entry) -> ledger.Entry:
    """The entry with the server's signature of everything else in it."""
    return entry._replace(seal=key.sign(_RECORD + context.run + context.chain + ledger.pack_entry(entry)))


def _holds(public_key: bytes, signature: bytes | None, statement: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if signature is None or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, statement)
    except InvalidSignature:
        return False
    return True


def is_signed(
    public_keys: bytes, context: Context, round_index: int, client: int, update: bytes, signature: bytes | None
) -> bool:
    """Whether the signature is that client's, of this update in this round of this run."""
    key = public_keys[KEY_BYTES * (client + 1) :][:KEY_BYTES]
    return _holds(key, signature, _update_statement(context, round_index, client, update))


def as_json(public_keys: bytes) -> dict[str, Any]:
    """Public keys as ``identities.json`` holds them."""
    server, *clients = (public_keys[i : i + KEY_BYTES].hex() for i in range(0, len(public_keys), KEY_BYTES))
    return {"server": server, "clients": clients}


def read_identities(file: Path) -> bytes:
    """The public keys in an ``identities.json``.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        keys = [bytes.fromhex(key) for key in (content["server"], *content["clients"])]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        keys = []
    if not keys or any(len(key) != KEY_BYTES for key in keys):
        raise UserError(f"{file}: holds no public keys: give the identities.json of a run's folder")
    return b"".join(keys)


def verify(file: Path, trusted: bytes | None = None) -> None:
    """Checks every signature of a signed ledger; of another there is nothing to check.

    Args:
        file: the ledger.
        trusted: the public keys as the verifier knows them; by default those in the ledger's header.

    Raises:
        UserError: the keys are others, or a signature does not hold: the first record of which that is so is named.
    """
    header = ledger.read_header(file)
    public_keys = header["identities"]
    if trusted is not None and trusted != public_keys:
        raise UserError(f"{file}: its header has other public keys than those given: it is not that run's ledger")
    if not public_keys:
        return
    first, *rest = ledger.records(file)
    context = Context(first.chain, first.chain)
    for record in rest:
        if wrong := _fault(ledger.unpack_entry(record.payload), public_keys, context):
            raise UserError(f"{file}: the record of round {record.index} is not signed as it should be: {wrong}")
        context = context._replace(chain=record.chain)


def _fault(entry: ledger.Entry, public_keys: bytes, context: Context) -> str | None:
    """Whose signature does not hold, or None."""
    unsealed = ledger.pack_entry(entry._replace(seal=b""))
    if not _holds(public_keys[:KEY_BYTES], entry.seal, _RECORD + context.run + context.chain + unsealed):
        return "the server's signature does not hold"
    for id, update, signature in zip(map(int, entry.ids), entry.updates, entry.signatures, strict=True):
        if update is None and signature is not None:
            return f"there is a signature of client {id}, and no update"
        if update is not None and not is_signed(public_keys, context, entry.round, id, update, signature):
            return f"client {id}'s signature does not hold"
    return None
