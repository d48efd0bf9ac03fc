"""Hidden states below the first trained layer, computed once for each example.

What lies below the first trained layer is frozen, so that its output for an example is the same in the whole run. A
local step that starts from it runs the layers from there on alone, and the device needs no others.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fedmezo_jax.data.examples import HiddenBatch, TokenBatch
from fedmezo_jax.llama.model import Base, Llama

IN_MEMORY = 1 << 30
"""Bytes of hidden states up to which they stay in memory; larger ones lie in a memory-mapped file."""
_EXAMPLES = 16
"""Examples of one call of the compiled prefix."""
_CHUNK = 1 << 24


def trained_part(model: Llama, base: Base) -> Base:
    """The weights that a step from hidden states needs: layers from the first trained one on, final norm and head."""
    first = model.trained_layers[0]
    unused = () if model.config.tie_word_embeddings else ("embed_tokens",)
    rest = {name: weights for name, weights in base.items() if name not in unused}
    return rest | {"layers": jax.tree.map(lambda leaf: leaf[first:], base["layers"])}


def hidden_states(model: Llama, base: Base, rows: TokenBatch, folder: Path, base_hash: str) -> HiddenBatch:
    """The rows with the residual stream below the first trained layer in place of their tokens.

    Args:
        model: the decoder, with a precision for one point (not ``paired``).
        base: its frozen weights, all of them.
        rows: N examples, on the host.
        folder: where a file goes if there are more than :data:`IN_MEMORY` bytes. It is named after all that decides its
            content, and used again where its checksum holds.
        base_hash: names the weights.

    Returns:
        ``hidden`` is float32 ``[N, S, D]``, in memory or mapped read-only from the file.

    Raises:
        OSError: the file cannot be written.
    """
    tokens = np.ascontiguousarray(rows.tokens, np.int32)
    shape = (*tokens.shape, model.config.hidden_size)
    if 4 * int(np.prod(shape)) <= IN_MEMORY:
        hidden = np.empty(shape, np.float32)
        _compute(model, base, tokens, hidden)
        return HiddenBatch(hidden, *rows[1:])
    cut = f"{base_hash} {model.trained_layers[0]} {model.precision} {jax.default_backend()} {jax.__version__} {shape}"
    name = hashlib.sha256(cut.encode() + tokens.tobytes()).hexdigest()
    file = folder / f"{name}.npy"
    if not _intact(file, shape):
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f".{name}.{os.getpid()}"
        try:
            mapped = np.lib.format.open_memmap(fresh, "w+", np.float32, shape)
            _compute(model, base, tokens, mapped)
            mapped.flush()
            del mapped
            _checksum_file(file).write_text(_checksum(fresh), encoding="utf-8")
            os.replace(fresh, file)
        finally:
            fresh.unlink(missing_ok=True)
    return HiddenBatch(np.load(file, mmap_mode="r", allow_pickle=False), *rows[1:])


def _compute(model: Llama, base: Base, tokens: np.ndarray, hidden: np.ndarray) -> None:
    """Fills ``hidden``, some examples at a time; the last call's missing ones are copies."""
    leaf = jax.tree.leaves(base)[0]
    placed = leaf.sharding if isinstance(leaf, jax.Array) else None
    everywhere = NamedSharding(placed.mesh, PartitionSpec()) if isinstance(placed, NamedSharding) else None
    run = jax.jit(partial(model.apply, method="prefix"), out_shardings=everywhere)
    for start in range(0, len(tokens), _EXAMPLES):
        picked = np.minimum(np.arange(start, start + _EXAMPLES), len(tokens) - 1)
        states = run({"params": base}, tokens[picked])
        hidden[start : start + _EXAMPLES] = np.asarray(states)[: len(tokens) - start]


def _checksum_file(file: Path) -> Path:
    return file.with_suffix(".blake2b")


def _checksum(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _intact(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether the file is there, of this shape, and as it was written."""
    try:
        if _checksum_file(file).read_text(encoding="utf-8") != _checksum(file):
            return False
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return found.shape == shape and found.dtype == np.float32
