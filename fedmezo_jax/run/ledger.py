"""A run as a ledger: an append-only file of the scalars that rebuild it, each record's checksum chained to the last.

The file is a header and one record for each round. A record is

    length of the payload   4 bytes, little-endian
    CRC-32 of those         4 bytes, little-endian
    payload                 msgpack
    chain                   32 bytes: BLAKE2b of (chain of the record before ‖ the eight bytes ‖ payload)

A crash can leave the last record short, which shows in its length; every other change breaks a checksum. There are no
times in it, so that two runs of one configuration have the same bytes.

What a ledger proves. Its checksums show that the file is whole and as it was written: a record that was damaged,
changed, moved or taken out is found, except at the end, where a shorter ledger is an earlier state of the run. With the
base weights, whose hash is in the header, the entries determine θ after every round. :mod:`ledger_checks` verifies that
each entry is one that its configuration permits.

What it does not prove. The checksums have no key and nothing is signed, so anybody can write a ledger with a valid
chain: it does not show who wrote it, when, on which data, or that any client did the work. To hold on to one ledger,
keep its last checksum where its writer cannot change it. With ``--uplink lora`` the server moves θ by the parameters
that clients send, and the ledger holds the projected gradients that go with them: a client whose two do not agree makes
a replay differ from the run.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import msgpack
import numpy as np

from fedmezo_jax.errors import UserError
from fedmezo_jax.run.ledger_header import FORMAT, KEYS, VERSION, config_hash, unpack_header
from fedmezo_jax.run.reader import Reader

_FRAME, _CHAIN = 8, 32
_START = bytes(_CHAIN)


class Entry(NamedTuple):
    """One round.

    Attributes:
        round: its number, from 0.
        attempt: how often it was tried before, because all clients failed.
        ids: ``[P]`` int32, who took part.
        weights: ``[P]`` float32 in the server's mean; 0 for whoever was left out.
        learning_rates: ``[P]`` float32, η_i.
        updates: the P clients' updates as the server uses them (:func:`messages.pack_update`), with projected gradients
            that it clipped already clipped; None where none came in, or one that was refused as malformed.
        failed: (attempt, client, why) of all that were left out, in this attempt and in those before.
        clipped: steps whose projected gradient was clipped.
        rolled_back: the round, and the one before it, count for nothing: θ is again where that one began.
        step: how much of the round's update of θ the server took: 1, or another of :data:`automatic_rate.STEPS`.
        mean: ``[H·n]`` float32, the mean of the projected gradients where single clients' are not kept; there are then
            no updates.
        epsilon: ε that has been spent after the round; 0 without ``--dp-epsilon``.
        signatures: of the updates, by their clients; none without ``--signed``.
        seal: the server's signature of all the rest; empty without ``--signed``.
    """

    round: int
    attempt: int
    ids: np.ndarray
    weights: np.ndarray
    learning_rates: np.ndarray
    updates: list[bytes | None]
    failed: list[tuple[int, int, str]]
    clipped: int = 0
    rolled_back: bool = False
    step: float = 1.0
    mean: np.ndarray | None = None
    epsilon: float = 0.0
    signatures: tuple[bytes | None, ...] = ()
    seal: bytes = b""


def pack_entry(entry: Entry) -> bytes:
    """An entry as the payload of its record."""
    vectors = {
        "ids": np.asarray(entry.ids, "<i4").tobytes(),
        "weights": np.asarray(entry.weights, "<f4").tobytes(),
        "learning_rates": np.asarray(entry.learning_rates, "<f4").tobytes(),
        "mean": None if entry.mean is None else np.asarray(entry.mean, "<f4").tobytes(),
    }
    numbers = {"round": int(entry.round), "step": float(entry.step), "epsilon": float(entry.epsilon)}
    return _pack(entry._asdict() | numbers | vectors)


def _pack(content: Any) -> bytes:
    return cast(bytes, msgpack.packb(content))


def unpack_entry(payload: bytes, what: str = "the entry") -> Entry:
    """What :func:`pack_entry` packed.

    Args:
        payload: of a record.
        what: names it in errors.

    Raises:
        UserError: the payload is malformed.
    """
    reader = Reader(payload, what)

    def field(name: str) -> None:
        if (name_there := reader.value(str)) != name:
            raise reader.error(f"it has {name_there!r} where {name} was expected")

    reader.map(len(Entry._fields))
    field("round")
    index = reader.integer()
    field("attempt")
    attempt = reader.integer()
    field("ids")
    ids = reader.vector("<i4")
    field("weights")
    weights = reader.vector()
    field("learning_rates")
    rates = reader.vector()
    field("updates")
    updates = [reader.value(bytes, type(None)) for _ in range(reader.array(len(ids)))]
    field("failed")
    failed = []
    for _ in range(reader.array()):
        reader.array(3)
        failed.append((reader.integer(), reader.integer(), reader.value(str)))
    field("clipped")
    clipped = reader.integer()
    field("rolled_back")
    rolled_back = reader.value(bool)
    field("step")
    step = reader.value(float)
    field("mean")
    mean = reader.optional_vector()
    field("epsilon")
    epsilon = reader.value(float)
    field("signatures")
    signatures = tuple(reader.value(bytes, type(None)) for _ in range(reader.array()))
    field("seal")
    seal = reader.value(bytes)
    reader.end()
    if len(signatures) not in (0, len(ids)):
        raise reader.error(f"it has {len(ids)} clients and {len(signatures)} signatures")
    if not len(ids) == len(weights) == len(rates):
        raise reader.error(f"it has {len(ids)} clients, {len(weights)} weights and {len(rates)} learning rates")
    return Entry(
        index,
        attempt,
        ids,
        weights,
        rates,
        updates,
        failed,
        clipped,
        rolled_back,
        step,
        mean,
        epsilon,
        signatures,
        seal,
    )


def make_header(
    config: Mapping[str, Any],
    base_hash: str,
    versions: Mapping[str, str],
    first_rate: float,
    privacy: str = "",
    identities: bytes = b"",
    example_counts: np.ndarray | None = None,
) -> dict[str, Any]:
    """The first record: all that a replay needs besides the base weights, and what it ran on.

    Args:
        config: the run's, complete.
        base_hash: :func:`~fedmezo_jax.core.tree_hash.tree_hash` of the frozen weights.
        versions: of the packages that the numbers may hang on.
        first_rate: base learning rate of the first round.
        privacy: what is guaranteed, and where the noise came from; empty without ``--dp-epsilon``.
        identities: public keys of the server and of each client, 32 bytes each; empty without ``--signed``.
        example_counts: ``[N]``, how many examples each client has, where single examples are private; None elsewhere.
    """
    device = jax.devices()[0]
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": dict(config),
        "config_hash": config_hash(config),
        "base_hash": base_hash,
        "keys": KEYS,
        "distribution": config["distribution"],
        "first_rate": float(first_rate),
        "privacy": privacy,
        "identities": identities,
        "example_counts": b"" if example_counts is None else example_counts.astype("<u4").tobytes(),
        "versions": dict(versions),
        "backend": {"platform": device.platform, "device": device.device_kind, "devices": jax.device_count()},
    }


def example_counts(header: Mapping[str, Any]) -> np.ndarray:
    """``[N]`` int64 from a header; empty where single examples are not private."""
    return np.frombuffer(header["example_counts"], "<u4").astype(np.int64)


class Record(NamedTuple):
    """A record as found in a file.

    Attributes:
        index: 0 for the header, then the number of the round, from 1.
        payload: its content.
        chain: its checksum.
        end: where the next record begins, in bytes.
    """

    index: int
    payload: bytes
    chain: bytes
    end: int


def records(file: Path) -> Iterator[Record]:
    """The whole records of a ledger, each verified, up to its end or to a last one that was cut short.

    Raises:
        UserError: a record is damaged: its round and place are named.
    """
    chain, start = _START, 0
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        for index in range(2**62):
            frame = stream.read(_FRAME)
            if len(frame) < _FRAME:
                return
            length, check = struct.unpack("<II", frame)
            end = start + _FRAME + length + _CHAIN
            if zlib.crc32(frame[:4]) != check:
                if not any(frame) and not any(stream.read()):
                    return  # a file system may fill with zeros what it had no time to write
                raise _damaged(file, index, start, start + _FRAME)
            if end > size:
                return
            payload, stored_chain = stream.read(length), stream.read(_CHAIN)
            chain = _link(chain, frame, payload)
            if chain != stored_chain:
                raise _damaged(file, index, start, end)
            yield Record(index, payload, chain, end)
            start = end


def _link(chain: bytes, frame: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(chain + frame + payload, digest_size=_CHAIN).digest()


def _damaged(file: Path, index: int, start: int, end: int) -> UserError:
    what = f"the record of round {index}" if index else "the header"
    why = "the file was damaged or edited" if index else "the file is no ledger, or was damaged"
    return UserError(
        f"{file}: {what} (bytes {start} to {end - 1}) does not match its checksum: {why}. Nothing was changed; "
        "put an intact copy in its place"
    )


def read_header(file: Path) -> dict[str, Any]:
    """The header of a ledger.

    Raises:
        UserError: the file cannot be read, is no ledger, or has a format this version does not know.
    """
    try:
        first = next(records(file), None)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}): give the run.ledger of a run's folder") from None
    if first is None:
        raise UserError(f"{file}: is no ledger: give the run.ledger of a run's folder")
    return unpack_header(first.payload, file)


def entries(file: Path, first: int = 0) -> Iterator[Entry]:
    """The rounds of a ledger from round ``first`` (counted from 0) on, each verified, one in memory at a time.

    :func:`ledger_checks.entries` also checks them against the run's configuration.
    """
    for record in records(file):
        if record.index > first:
            yield unpack_entry(record.payload, f"{file}: the record of round {record.index}")


class Ledger:
    """A ledger open for appending."""

    def __init__(self, file: Path, rounds: int, chain: bytes, end: int):
        """Use :func:`create` or :func:`reopen`."""
        self.file, self.rounds, self.chain = file, rounds, chain
        self._end = end

    def append(self, entry: Entry) -> bytes:
        """Adds a round; it is on the disk when this returns. An error leaves the file as it was.

        Returns:
            The record's chain value.
        """
        self._write(pack_entry(entry))
        self.rounds += 1
        return self.chain

    def _write(self, payload: bytes) -> None:
        length = struct.pack("<I", len(payload))
        frame = length + struct.pack("<I", zlib.crc32(length))
        chain = _link(self.chain, frame, payload)
        with self.file.open("r+b", buffering=0) as stream:
            try:
                stream.seek(self._end)
                _write_all(stream, frame + payload + chain)
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(self._end)
                raise
        self.chain, self._end = chain, self._end + _FRAME + len(payload) + _CHAIN


def _write_all(stream: Any, content: bytes) -> None:
    while content:
        content = content[stream.write(content) :]  # a full disk takes a part, and refuses the next


def create(file: Path, header: Mapping[str, Any]) -> Ledger:
    """A new ledger; it is there with its header or not at all."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_bytes(b"")
    Ledger(fresh, 0, _START, 0)._write(_pack(dict(header)))
    fresh.replace(file)
    sync_folder(file.parent)
    record = next(records(file))
    return Ledger(file, 0, record.chain, record.end)


def reopen(file: Path, header: Mapping[str, Any]) -> tuple[Ledger, list[str]]:
    """A ledger to go on with, and what there is to say about it.

    All its records are verified. A last one that a crash cut short is cut off.

    Args:
        file: the ledger.
        header: what this session would write: another configuration or other base weights are refused.

    Raises:
        UserError: a record is damaged, or the ledger is of another run. Nothing was changed.
    """
    before = read_header(file)
    for name, what in (("config_hash", "configuration"), ("base_hash", "base weights")):
        if before[name] != header[name]:
            raise UserError(f"{file}: is of a run with another {what}: give another --out")
    *_, last = records(file)
    notices = []
    if torn := file.stat().st_size - last.end:
        os.truncate(file, last.end)
        notices.append(f"{file}: the record of round {last.index + 1} was cut short: its {torn} bytes are cut off")
    if (before["versions"], before["backend"]) != (header["versions"], header["backend"]):
        notices.append(f"{file}: was begun with other versions or on another backend: its numbers may differ in bits")
    return Ledger(file, last.index, last.chain, last.end), notices


def sync_folder(folder: Path) -> None:
    """Waits until a folder's own entries are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
