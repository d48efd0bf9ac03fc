"""A run as a ledger: an append-only file of the scalars that rebuild it, each record's checksum chained to the last.

The file is a header and one record for each round. A record is

    length of the payload   4 bytes, little-endian
    CRC-32 of those         4 bytes, little-endian
    payload                 msgpack
    chain                   32 bytes: BLAKE2b of (chain of the record before ‖ the eight bytes ‖ payload)

A crash can leave the last record short, which shows in its length; every other change breaks a checksum. There are no
times in it, so that two runs of one configuration have the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import msgpack
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fedmezo_jax.errors import UserError
from fedmezo_jax.mezo import Params

FORMAT, VERSION = "fedmezo ledger", 1
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
        updates: the P clients' messages as they came in, None where none did (:func:`wire.unpack_update`).
        failed: (attempt, client, why) of all that were left out, in this attempt and in those before.
        clipped: steps whose projected gradient was clipped.
        rolled_back: the round, and the one before it, count for nothing: θ is again where that one began.
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


def pack_entry(entry: Entry) -> bytes:
    """An entry as the payload of its record."""
    vectors = {
        "ids": np.asarray(entry.ids, "<i4").tobytes(),
        "weights": np.asarray(entry.weights, "<f4").tobytes(),
        "learning_rates": np.asarray(entry.learning_rates, "<f4").tobytes(),
    }
    return _pack(entry._asdict() | {"round": int(entry.round)} | vectors)


def _pack(content: Any) -> bytes:
    return cast(bytes, msgpack.packb(content))


def unpack_entry(payload: bytes) -> Entry:
    """What :func:`pack_entry` packed."""
    raw = msgpack.unpackb(payload)
    raw["ids"] = np.frombuffer(raw["ids"], "<i4").astype(np.int32)
    for name in ("weights", "learning_rates"):
        raw[name] = np.frombuffer(raw[name], "<f4").astype(np.float32)
    raw["failed"] = [tuple(event) for event in raw["failed"]]
    return Entry(**raw)


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def tree_hash(tree: Params) -> str:
    """SHA-256 of a tree of arrays on the host: names, shapes, dtypes and bytes of its leaves."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        for part in _on_host(leaf):
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _on_host(leaf: Any) -> Iterator[np.ndarray]:
    """A leaf's rows in order, in one piece or, where other processes hold some of it, one by one: it may not fit."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        yield np.asarray(leaf)
        return
    assert isinstance(leaf.sharding, NamedSharding)
    pick = jax.jit(lambda leaf, i: leaf[i], out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()))
    # A layer of a stack at a time; a table, whose rows are many and small, by the thousand.
    rows = np.arange(len(leaf)) if leaf.ndim > 2 else np.array_split(np.arange(len(leaf)), -(-len(leaf) // 1000))
    yield from (np.asarray(pick(leaf, i)) for i in rows)


def make_header(config: Mapping[str, Any], base_hash: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """The first record: all that a replay needs besides the base weights, and what it ran on.

    Args:
        config: the run's, complete.
        base_hash: :func:`tree_hash` of the frozen weights.
        versions: of the packages that the numbers may hang on.
    """
    device = jax.devices()[0]
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": dict(config),
        "config_hash": config_hash(config),
        "base_hash": base_hash,
        "keys": "threefry2x32",
        "distribution": config["distribution"],
        "versions": dict(versions),
        "backend": {"platform": device.platform, "device": device.device_kind, "devices": jax.device_count()},
    }


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
            payload, found = stream.read(length), stream.read(_CHAIN)
            chain = _link(chain, frame, payload)
            if chain != found:
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
    header = msgpack.unpackb(first.payload) if first else None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{file}: is no ledger: give the run.ledger of a run's folder")
    if header["version"] != VERSION:
        raise UserError(f"{file}: is of format {header['version']}, and this version reads format {VERSION}")
    return header


def entries(file: Path, first: int = 0) -> Iterator[Entry]:
    """The rounds of a ledger from round ``first`` (counted from 0) on, each verified, one in memory at a time."""
    for record in records(file):
        if record.index > first:
            yield unpack_entry(record.payload)


class Ledger:
    """A ledger open for appending."""

    def __init__(self, file: Path, rounds: int, chain: bytes, end: int):
        """Use :func:`create` or :func:`reopen`."""
        self.file, self.rounds = file, rounds
        self._chain, self._end = chain, end

    def append(self, entry: Entry) -> bytes:
        """Adds a round; it is on the disk when this returns. An error leaves the file as it was.

        Returns:
            The record's chain value.
        """
        self._write(pack_entry(entry))
        self.rounds += 1
        return self._chain

    def _write(self, payload: bytes) -> None:
        length = struct.pack("<I", len(payload))
        frame = length + struct.pack("<I", zlib.crc32(length))
        chain = _link(self._chain, frame, payload)
        with self.file.open("r+b", buffering=0) as stream:
            try:
                stream.seek(self._end)
                _write_all(stream, frame + payload + chain)
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(self._end)
                raise
        self._chain, self._end = chain, self._end + _FRAME + len(payload) + _CHAIN


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
