"""Hidden states below the first trained layer, computed once for each example.

What lies below the first trained layer is frozen, so that its output for an example is the same in the whole run. A
local step that starts from it runs the layers from there on alone, and the device needs no others.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.model import Base, Llama

IN_MEMORY = 1 << 30
"""Bytes of hidden states up to which they stay in memory; more of them lie in a file."""
_EXAMPLES = 16
"""Examples of one call of the compiled prefix."""
_DIGEST = 32
_SECONDS = 10  # between two lines about a long computation


def trained_part(model: Llama, base: Base) -> Base:
    """The weights that a step from hidden states needs: layers from the first trained one on, final norm and head."""
    first = model.trained_layers[0]
    unused = () if model.config.tie_word_embeddings else ("embed_tokens",)
    rest = {name: weights for name, weights in base.items() if name not in unused}
    return rest | {"layers": jax.tree.map(lambda leaf: leaf[first:], base["layers"])}


class Prefix:
    """The frozen layers below the first trained one.

    An example's hidden states do not depend on which others are computed with it: the program runs them one by one.
    """

    def __init__(self, model: Llama, base: Base, base_hash: str, load: Callable[[], Base]):
        """Nothing is computed yet.

        Args:
            model: the decoder, with a precision for one point (not ``paired``).
            base: its weights.
            base_hash: names them.
            load: reads them again.
        """
        self.model, self.base_hash = model, base_hash
        self._base: Base | None = base
        self._load = load
        placed = jax.tree.leaves(base)[0].sharding
        everywhere = NamedSharding(placed.mesh, PartitionSpec()) if isinstance(placed, NamedSharding) else None

        def run(base: Base, tokens: jax.Array) -> jax.Array:
            return jax.lax.map(lambda row: model.apply({"params": base}, row[None], method="prefix")[0], tokens)

        self._compiled = jax.jit(run, out_shardings=everywhere)

    def release(self) -> None:
        """Lets the weights go. They are loaded again if more hidden states are asked for."""
        self._base = None

    def __call__(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """The hidden states of each row of tokens ``[N, S]``, float32 ``[S, D]``."""
        base = self._load() if self._base is None else self._base
        for start in range(0, len(tokens), _EXAMPLES):
            picked = np.minimum(np.arange(start, start + _EXAMPLES), len(tokens) - 1)  # copies fill the last call up
            yield from np.asarray(self._compiled(base, tokens[picked]))[: len(tokens) - start]


class HiddenStates:
    """Hidden states of a table of examples: an array ``[N, S, D]`` whose rows are computed when they are first used.

    Attributes:
        shape: (N, S, D).
        dtype: float32.
    """

    def __init__(self, prefix: Prefix, tokens: np.ndarray, expected: int, folder: Path):
        """Nothing is computed yet.

        Args:
            prefix: the frozen layers.
            tokens: int32 ``[N, S]``, on the host.
            expected: how many of the examples are likely to be used.
            folder: where a file goes if their states are more than :data:`IN_MEMORY` bytes. It is named after all that
                decides its content, and shared by all runs with the same.
        """
        self._prefix, self._tokens = prefix, np.ascontiguousarray(tokens, np.int32)
        self.shape = (*tokens.shape, prefix.model.config.hidden_size)
        self.dtype = np.dtype(np.float32)
        if 4 * expected * math.prod(self.shape[1:]) <= IN_MEMORY:
            self._store: _Store = _Memory()
        else:
            model = prefix.model
            cut = f"{prefix.base_hash} {model.config} {model.trained_layers[0]} {model.precision} {self.shape}"
            cut += f" {jax.default_backend()} {jax.__version__}"
            name = hashlib.sha256(cut.encode() + self._tokens.tobytes()).hexdigest()
            self._store = _File(folder / f"{name}.states", self.shape[1:])

    def compute(self, examples: np.ndarray, notify: Callable[[str], None] = lambda line: None) -> None:
        """Computes those of the examples that are not there yet.

        Args:
            examples: their indices.
            notify: called with a line about the progress, every ten seconds.

        Raises:
            UserError: the file cannot be written.
        """
        missing = np.array([i for i in np.unique(examples) if self._store.read(int(i)) is None], int)
        if not len(missing):
            return
        last_notice = time.monotonic()
        for done, (i, states) in enumerate(zip(missing, self._prefix(self._tokens[missing]), strict=True)):
            self._store.write(int(i), states)
            if time.monotonic() - last_notice > _SECONDS:
                notify(
                    f"hidden states below layer {self._prefix.model.trained_layers[0]}: {done:,} of {len(missing):,}"
                )
                last_notice = time.monotonic()

    def __len__(self) -> int:
        """N."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """The states of the examples that an index of the first axis picks, float32 ``[…, S, D]``."""
        index = np.arange(len(self))[index]
        states = [self._store.read(int(i)) for i in index.ravel()]
        if any(row is None for row in states):
            self.compute(index)
            states = [self._store.read(int(i)) for i in index.ravel()]
        return np.array(states, np.float32).reshape(*index.shape, *self.shape[1:])


class _Store(Protocol):
    """Keeps the states of single examples by their index."""

    def read(self, i: int) -> np.ndarray | None:
        """None where there are none."""
        ...

    def write(self, i: int, states: np.ndarray) -> None: ...


class _Memory:
    def __init__(self):
        self._states: dict[int, np.ndarray] = {}

    def read(self, i: int) -> np.ndarray | None:
        return self._states.get(i)

    def write(self, i: int, states: np.ndarray) -> None:
        self._states[i] = np.array(states)


class _File:
    """Records of one size, each with a digest before it: one that is missing, damaged or half-written reads as None.

    Runs that share the file write the same bytes into it.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self._path, self._shape, self._bytes = path, shape, 4 * math.prod(shape)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._refusal(error) from None
        weakref.finalize(self, os.close, self._file)

    def read(self, i: int) -> np.ndarray | None:
        record = os.pread(self._file, _DIGEST + self._bytes, i * (_DIGEST + self._bytes))
        digest, content = record[:_DIGEST], record[_DIGEST:]
        if len(content) < self._bytes or digest != self._digest(i, content):
            return None
        return np.frombuffer(content, np.float32).reshape(self._shape)

    def write(self, i: int, states: np.ndarray) -> None:
        content = np.ascontiguousarray(states, np.float32).tobytes()
        record = memoryview(self._digest(i, content) + content)
        start = i * len(record)
        try:
            while record:
                written = os.pwrite(self._file, record, start)
                record, start = record[written:], start + written
        except OSError as error:
            raise self._refusal(error) from None

    def _digest(self, i: int, content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=_DIGEST, salt=i.to_bytes(8, "little")).digest()

    def _refusal(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path.parent}: cannot hold the hidden states of the frozen layers ({error.strerror}): set "
            "FEDMEZO_CACHE to a folder with room for them, or give --layers all"
        )
