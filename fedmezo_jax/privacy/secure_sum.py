"""A sum of which the server learns nothing but the sum (Bonawitz et al., CCS 2017), over integers modulo 2⁶⁴.

The server passes messages between clients and cannot read them. A round of it has five steps:

    1  advertise      a client → server    two public keys of this round, signed by its identity
    2  share          a client → clients   shares of its private key and of its mask's seed, encrypted for each of them
    3  mask           a client → server    its vector plus masks that cancel in the sum, and its own mask
    4  agree          a client → server    its signature of the list of those whose vectors have come in
    5  unmask         a client → server    its shares: of the mask's seed of those on the list, of the key of the others

Any t = ``threshold`` clients that stay to the end suffice. A client answers each step once, and step 5 only for a list
that t clients have signed, so that a server cannot show different lists to different clients and so get both shares of
one of them.

What is guaranteed for n clients: a server that keeps to the protocol, with up to t − 1 clients that work for it, learns
nothing of the others' vectors but the sum of those on the list. A server that does not keep to it, with c clients,
learns no more either as long as 2t > n + c. What is not guaranteed: that the vectors are what they should be, or that
the sum comes out at all.

X25519, HKDF-SHA256, AES-256-GCM, ChaCha20 and Ed25519 are those of the package ``cryptography``; Shamir's scheme is
over a prime field.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmezo_jax.errors import UserError

PRIME = 2**256 + 297
"""The smallest prime above 2²⁵⁶, so that any 32 bytes are an element of its field."""
_KEY, _SHARE = 32, 33
_ANY_KEY = X25519PrivateKey.from_private_bytes(bytes(31) + b"\1")
Random = Callable[[int], bytes]
"""``random(n)``: so many random bytes."""


class Advert(NamedTuple):
    """Step 1: a client's public keys of this round.

    Attributes:
        encryption: X25519 key with which others encrypt for it.
        masking: X25519 key from which masks are agreed.
        signature: by its identity, of the round and both.
    """

    encryption: bytes
    masking: bytes
    signature: bytes


class Client(NamedTuple):
    """What a client keeps to itself in a round.

    Attributes:
        id: its number, from 0.
        round: bytes that name the run and the round; the same for all.
        threshold: how many clients must stay to the end.
        identities: public Ed25519 key of each client, by id.
        identity: its own private one.
        encryption: private key of this round.
        masking: private key of this round.
        seed: of its own mask, 32 bytes.
        random: source of everything that is drawn.
        adverts: those of the clients that advertised, by id.
        answered: the steps that it has answered.
    """

    id: int
    round: bytes
    threshold: int
    identities: Mapping[int, bytes]
    identity: Ed25519PrivateKey
    encryption: X25519PrivateKey
    masking: X25519PrivateKey
    seed: bytes
    random: Random
    adverts: dict[int, Advert]
    answered: set[str]


def join(
    id: int,
    round: bytes,
    threshold: int,
    identities: Mapping[int, bytes],
    identity: Ed25519PrivateKey,
    random: Random = os.urandom,
) -> tuple[Client, Advert]:
    """Step 1 for a client: its keys of this round.

    Raises:
        UserError: the threshold is not more than half of the clients.
    """
    if 2 * threshold <= len(identities):
        raise UserError(f"a threshold of {threshold} is not more than half of {len(identities)} clients")
    encryption, masking = (X25519PrivateKey.from_private_bytes(random(_KEY)) for _ in range(2))
    keys = encryption.public_key().public_bytes_raw(), masking.public_key().public_bytes_raw()
    advert = Advert(*keys, identity.sign(_statement(b"keys", round, *keys)))
    return Client(
        id, round, threshold, identities, identity, encryption, masking, random(_KEY), random, {}, set()
    ), advert


def check_advert(round: bytes, identities: Mapping[int, bytes], id: int, advert: Advert) -> None:
    """Checks that a client's keys are its own.

    Raises:
        UserError: they are not signed by it.
    """
    statement = _statement(b"keys", round, advert.encryption, advert.masking)
    if id not in identities or not _signed(identities[id], advert.signature, statement):
        raise UserError(f"the keys of client {id} are not signed by it")


def check_keys(advert: Advert) -> None:
    """Checks for the server what clients see in steps 2 and 3: that secrets can be agreed with a client's keys.

    Raises:
        UserError: a key gives the same secret with every other one.
    """
    for key in (advert.encryption, advert.masking):
        _exchanged(_ANY_KEY, key)


def share(client: Client, adverts: Mapping[int, Advert]) -> dict[int, bytes]:
    """Step 2: for each of the others, an encrypted share of the client's masking key and of its mask's seed.

    Raises:
        UserError: there are too few clients, a stranger among them, or keys that their owner has not signed.
    """
    _once(client, "share")
    if len(adverts) < client.threshold or client.id not in adverts:
        raise UserError(f"{len(adverts)} clients take part, and {client.threshold} are needed, this one among them")
    for id, advert in adverts.items():
        check_advert(client.round, client.identities, id, advert)
    client.adverts.update(adverts)
    ids = sorted(adverts)
    secrets = (client.masking.private_bytes_raw(), client.seed)
    shares = [_split(int.from_bytes(secret, "big"), ids, client.threshold, client.random) for secret in secrets]
    sent = {}
    for id in ids:
        nonce, plain = client.random(12), b"".join(part[id].to_bytes(_SHARE, "big") for part in shares)
        sealed = AESGCM(_box_key(client, id)).encrypt(nonce, plain, _route(client.round, client.id, id))
        sent[id] = nonce + sealed
    return sent


def unreadable(client: Client, boxes: Mapping[int, bytes]) -> list[int]:
    """Before step 3: the senders of those boxes of step 2 that were not made for this client."""
    return [id for id, box in boxes.items() if _opened(client, id, box) is None]


def mask(client: Client, vector: np.ndarray, shared: Sequence[int]) -> np.ndarray:
    """Step 3: the masked vector, ``[m]`` uint64.

    Args:
        client: the client.
        vector: ``[m]`` uint64, what is summed modulo 2⁶⁴.
        shared: ids of those whose shares have come in.

    Raises:
        UserError: there are too few of them, or a stranger among them.
    """
    _once(client, "mask")
    _check_list(client, shared)
    masked = np.asarray(vector, np.uint64) + _stream(client.seed, client.round, len(vector))
    for id in shared:
        if id != client.id:
            stream = _stream(_pair_seed(client.masking, client.adverts[id].masking), client.round, len(vector))
            masked = masked + stream if client.id < id else masked - stream
    return masked


def agree(client: Client, arrived: Sequence[int]) -> bytes:
    """Step 4: the client's signature of the list of those whose vectors have come in.

    Raises:
        UserError: there are too few of them, or a stranger among them.
    """
    _once(client, "agree")
    _check_list(client, arrived)
    return client.identity.sign(_statement(b"list", client.round, _listed(arrived)))


def agrees(round: bytes, public_key: bytes, arrived: Sequence[int], signature: bytes) -> bool:
    """Whether this is a client's signature of this list."""
    return _signed(public_key, signature, _statement(b"list", round, _listed(arrived)))


class Unmasking(NamedTuple):
    """Step 5: a client's shares, by whose they are.

    Attributes:
        seeds: of the mask's seed of those whose vectors have come in.
        keys: of the masking key of the others.
    """

    seeds: dict[int, int]
    keys: dict[int, int]


def unmask(
    client: Client, boxes: Mapping[int, bytes], arrived: Sequence[int], signatures: Mapping[int, bytes]
) -> Unmasking:
    """Step 5: the shares with which the server takes the masks off.

    Args:
        client: the client.
        boxes: what the others sent it in step 2, by sender.
        arrived: ids of those whose vectors have come in.
        signatures: of that list, by signer.

    Raises:
        UserError: this was asked before, too few have signed this list, or a box was not made for this client.
    """
    _once(client, "unmask")
    _check_list(client, arrived)
    signers = [id for id in signatures if id in client.adverts]
    if sum(agrees(client.round, client.identities[id], arrived, signatures[id]) for id in signers) < client.threshold:
        raise UserError(f"fewer than {client.threshold} clients have signed the list of those that are summed")
    seeds, keys = {}, {}
    for id, box in boxes.items():
        if (shares := _opened(client, id, box)) is None:
            raise UserError(f"the shares of client {id} were not made for client {client.id}")
        if id in arrived:
            seeds[id] = shares[1]
        else:
            keys[id] = shares[0]
    return Unmasking(seeds, keys)


def total(
    round: bytes,
    threshold: int,
    adverts: Mapping[int, Advert],
    shared: Sequence[int],
    masked: Mapping[int, np.ndarray],
    unmaskings: Mapping[int, Unmasking],
) -> np.ndarray:
    """What the server makes of it all: the sum modulo 2⁶⁴ of the vectors that have come in, ``[m]`` uint64.

    Args:
        round: as the clients have it.
        threshold: as the clients have it.
        adverts: of step 1.
        shared: ids of those whose shares came in step 2.
        masked: vectors of step 3, by client.
        unmaskings: of step 5, by client.

    Raises:
        UserError: fewer than ``threshold`` clients stayed to the end, or their shares do not go together.
    """
    if len(unmaskings) < threshold:
        raise UserError(f"{len(unmaskings)} clients stayed to the end of the sum, and {threshold} are needed")
    helpers = sorted(unmaskings)[:threshold]
    result = np.asarray(np.sum(list(masked.values()), axis=0, dtype=np.uint64))
    size = len(result)
    for id in masked:
        seed = _join({helper: unmaskings[helper].seeds[id] for helper in helpers})
        result = result - _stream(seed, round, size)
    for id in shared:
        if id in masked:
            continue
        key = X25519PrivateKey.from_private_bytes(_join({helper: unmaskings[helper].keys[id] for helper in helpers}))
        if key.public_key().public_bytes_raw() != adverts[id].masking:
            raise UserError(f"the shares of the key of client {id} do not give it")
        for other in masked:  # the mask that this one has with the one that went
            stream = _stream(_pair_seed(key, adverts[other].masking), round, size)
            result = result - stream if other < id else result + stream
    return result


def _once(client: Client, step: str) -> None:
    if step in client.answered:
        raise UserError(f"client {client.id} has answered the step {step!r} of this round")
    client.answered.add(step)


def _check_list(client: Client, ids: Sequence[int]) -> None:
    if len(set(ids)) != len(ids) or not set(ids) <= set(client.adverts) or client.id not in ids:
        raise UserError("the list of clients has a stranger or one twice, or lacks this one")
    if len(ids) < client.threshold:
        raise UserError(f"the list has {len(ids)} clients, and {client.threshold} are needed")


def _statement(kind: bytes, *parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(8, "big") + part for part in (b"fedmezo_jax sum " + kind, *parts))


def _listed(ids: Sequence[int]) -> bytes:
    return np.array(sorted(ids), ">u8").tobytes()


def _route(round: bytes, sender: int, recipient: int) -> bytes:
    return _statement(b"shares", round, _listed([sender]), _listed([recipient]))


def _signed(public_key: bytes, signature: bytes, statement: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, statement)
    except InvalidSignature:
        return False
    return True


def _derived(private: X25519PrivateKey, public: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), _KEY, salt=None, info=b"fedmezo_jax sum " + purpose).derive(_exchanged(private, public))


def _exchanged(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise UserError("a client's key is a point of low order, with which no secret can be agreed") from None


def _box_key(client: Client, other: int) -> bytes:
    return _derived(client.encryption, client.adverts[other].encryption, b"shares")


def _opened(client: Client, sender: int, box: bytes) -> tuple[int, int] | None:
    """A sender's shares for this client: of its key, and of its mask's seed. None if the box was not made for it."""
    if sender not in client.adverts:
        return None
    try:
        plain = AESGCM(_box_key(client, sender)).decrypt(box[:12], box[12:], _route(client.round, sender, client.id))
    except (InvalidTag, ValueError):
        return None
    key, seed = (int.from_bytes(part, "big") for part in (plain[:_SHARE], plain[_SHARE:]))
    return (key, seed) if max(key, seed) < PRIME else None


def _pair_seed(private: X25519PrivateKey, public: bytes) -> bytes:
    return _derived(private, public, b"mask")


def _stream(seed: bytes, round: bytes, size: int) -> np.ndarray:
    """``[size]`` uint64 from ChaCha20; a seed is of one round, so that its nonce may be fixed."""
    key = HKDF(SHA256(), _KEY, salt=None, info=b"fedmezo_jax sum stream" + round).derive(seed)
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * size))
    return np.frombuffer(stream, "<u8").astype(np.uint64)


def _split(secret: int, ids: Sequence[int], threshold: int, random: Random) -> dict[int, int]:
    """Shamir's shares of a secret: the values at id + 1 of a random polynomial with that secret at 0."""
    # 64 bytes modulo a prime of 33 are uniform up to 2⁻²⁵⁵.
    rest = [int.from_bytes(random(64), "big") % PRIME for _ in range(threshold - 1)]
    shares = {}
    for id in ids:
        value = 0
        for coefficient in reversed([secret, *rest]):
            value = (value * (id + 1) + coefficient) % PRIME
        shares[id] = value
    return shares


def _join(shares: Mapping[int, int]) -> bytes:
    """The secret from its shares, by Lagrange's formula at 0."""
    secret = 0
    for id, value in shares.items():
        top = bottom = 1
        for other in shares:
            if other != id:
                top, bottom = top * (other + 1) % PRIME, bottom * (other - id) % PRIME
        secret = (secret + value * top * pow(bottom, -1, PRIME)) % PRIME
    if secret >= 2**256:
        raise UserError("the shares of a client do not go together")
    return secret.to_bytes(_KEY, "big")
