"""The header of a ledger as it is read: every field is checked, and the configuration against its hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack

from fedmezo_jax.errors import UserError
from fedmezo_jax.run.reader import ERRORS

FORMAT, VERSION, KEYS = "fedmezo ledger", 4, "threefry2x32"
"""Version 1 held products of learning rates and projected gradients; version 2 lacked what privacy and signatures
take, version 3 the numbers of examples that the privacy of examples takes."""


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def unpack_header(payload: bytes, file: Path) -> dict[str, Any]:
    """The header from its record.

    Raises:
        UserError: it is no ledger's, is malformed, or has a format that this version does not know.
    """
    header = None
    with contextlib.suppress(*ERRORS):
        header = msgpack.unpackb(payload, max_array_len=0, max_map_len=1000, max_ext_len=0)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{file}: is no ledger: give the run.ledger of a run's folder")
    if header.get("version") != VERSION:
        raise UserError(
            f"{file}: is a ledger of format version {header.get('version')!r:.60}, and this release reads version "
            f"{VERSION}: read it with the release that wrote it, or start the run again with another --out"
        )
    if wrong := _fault(header):
        raise UserError(f"{file}: its header is malformed: {wrong}: give the ledger as the run wrote it")
    return header


def _fault(header: dict[str, Any]) -> str | None:
    """What is wrong with a header, or None."""
    texts = ("config_hash", "base_hash", "keys", "distribution", "privacy")
    groups = {"config": (str, int, float, bool, type(None)), "versions": (str,), "backend": (str, int)}
    if odd := header.keys() ^ {"format", "version", "first_rate", "identities", "example_counts", *texts, *groups}:
        return f"{', '.join(sorted(map(str, odd)))} is missing or unknown"
    if any(not isinstance(header[name], str) for name in texts):
        return f"one of {', '.join(texts)} is no text"
    for name, kinds in groups.items():
        group = header[name]
        if not isinstance(group, dict) or any(
            type(key) is not str or type(value) not in kinds for key, value in group.items()
        ):
            return f"{name} is no flat object"
    if config_hash(header["config"]) != header["config_hash"]:
        return "config_hash is not that of its config"
    if header["keys"] != KEYS:
        return f"keys is {header['keys']!r} and not {KEYS!r}"
    if header["distribution"] != header["config"].get("distribution"):
        return "distribution is not that of its config"
    rate, chosen = header["first_rate"], header["config"].get("learning_rate")
    if type(rate) is not float or not 0 < rate < math.inf or chosen not in ("auto", rate):
        return f"first_rate cannot be {rate!r:.60}"
    keys, config = header["identities"], header["config"]
    if type(keys) is not bytes or len(keys) != (32 * (config.get("clients", 0) + 1) if config.get("signed") else 0):
        return "identities are not a public key for the server and each client"
    counts = header["example_counts"]
    private = config.get("dp_epsilon") is not None and config.get("dp_unit") == "example"
    if type(counts) is not bytes or len(counts) != (4 * config.get("clients", 0) if private else 0):
        return "example_counts are not a number for each client"
    if "jax" not in header["versions"] or header["backend"].keys() != {"platform", "device", "devices"}:
        return "versions or backend lacks an entry"
    return None
