"""Hidden states below the first trained layer, computed once for each example.

What lies below the first trained layer is frozen, so that its output for an example is the same in the whole run. A
local step that starts from it runs the layers from there on alone, and the device needs no others.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import jax
import numpy as np

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.stored_base import StoredBase
from fedmezo_jax.llama.model import Base, Llama

IN_MEMORY = 1 << 30
"""Bytes of hidden states up to which they stay in memory; more of them lie in a file."""
LAYERS_AT_ONCE = 1 << 30
"""Bytes of frozen layers that are on a device at a time; one that is larger alone."""
READ_AGAIN = 1 << 26
"""Bytes of frozen layers up to which they are read whenever an example is first used. A run then starts without waiting
for the examples of all its rounds, and computes those of a round during the one before."""
_EXAMPLES = 16
"""Examples of one call of the compiled layers."""
_DIGEST = 32
_SECONDS = 10  # between two lines about a long computation


def trained_part(model: Llama, base: Base) -> Base:
    """The weights that a step from hidden states needs: layers from the first trained one on, final norm and head."""
    first = model.trained_layers[0]
    unused = () if model.config.tie_word_embeddings else ("embed_tokens",)
    rest = {name: weights for name, weights in base.items() if name not in unused}
    return rest | {"layers": jax.tree.map(lambda leaf: leaf[first:], base["layers"])}


class Prefix:
    """The frozen layers below the first trained one, which are never in memory as a whole.

    A few layers at a time are read from the model's files, run on all examples, and let go. An example's hidden states
    depend neither on which others are computed with it nor on how many layers are read at a time: the program runs the
    examples one by one, and the layers in a loop of any length.
    """

    def __init__(self, model: Llama, stored: StoredBase, base_hash: str, folder: Path):
        """Nothing is computed yet.

        Args:
            model: the decoder, with a precision for one point (not ``paired``).
            stored: its weights.
            base_hash: names them.
            folder: where a temporary file goes if the states between two layers are more than :data:`IN_MEMORY` bytes.
        """
        self.model, self.base_hash, self._stored, self._folder = model, base_hash, stored, folder

        def run(layers: Base, x: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
            variables = {"params": {"layers": layers}}
            return jax.lax.map(lambda row: model.apply(variables, row[None], start, count, method="frozen")[0], x)

        self._compiled = jax.jit(run)

    @property
    def is_small(self) -> bool:
        """Whether the layers are read again for each call, see :data:`READ_AGAIN`."""
        return self.model.trained_layers[0] * self._stored.layer_bytes <= READ_AGAIN

    def __call__(self, tokens: np.ndarray, notify: Callable[[str], None] = lambda line: None) -> Iterator[np.ndarray]:
        """Yields the hidden states of each row of tokens, float32 ``[S, D]``.

        Args:
            tokens: int32 ``[N, S]``.
            notify: called with a line about the progress, every ten seconds.

        Raises:
            UserError: the weights cannot be read, or the folder cannot hold the states between two layers.
        """
        first, shape = self.model.trained_layers[0], (*tokens.shape, self.model.config.hidden_size)
        at_once = max(1, LAYERS_AT_ONCE // self._stored.layer_bytes)
        devices = jax.local_devices()[: -(-len(tokens) // _EXAMPLES)]
        told = time.monotonic()
        batches = self._embedded(tokens)
        with _temporary(shape, self._folder) as between:
            for start, stacked in self._stored.layers(first, at_once):
                layers, count, done = jax.device_put([stacked] * len(devices), devices), min(at_once, first - start), 0
                for states in self._outputs(layers, batches, start, count):
                    if start + count == first:
                        yield from states
                    else:
                        _write(between, done, states, self._folder)
                    done += len(states)
                    if time.monotonic() - told > _SECONDS:
                        share = (start + count * done / len(tokens)) / first
                        notify(f"hidden states below layer {first}: {share:.0%}")
                        told = time.monotonic()
                del layers  # before the next are read
                batches = _read(between, shape)

    def _embedded(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """The states below the first layer, by batches."""
        table = self._stored.embedding()
        for start in range(0, len(tokens), _EXAMPLES):
            yield table[tokens[start : start + _EXAMPLES]].astype(np.float32)

    def _outputs(
        self, layers: list[Base], batches: Iterator[np.ndarray], start: int, count: int
    ) -> Iterator[np.ndarray]:
        """The states after ``count`` layers from ``start`` on, by the same batches; ``layers`` are on each device.

        Copies of its last example fill a batch up to the program's size.
        """
        while group := list(itertools.islice(batches, len(layers))):
            filled = (np.pad(x, [(0, _EXAMPLES - len(x)), (0, 0), (0, 0)], "edge") for x in group)
            outputs = [self._compiled(on, x, start, count) for on, x in zip(layers, filled, strict=False)]
            yield from (np.asarray(output)[: len(x)] for output, x in zip(outputs, group, strict=True))


def _temporary(shape: tuple[int, ...], folder: Path) -> BinaryIO:
    """A place for the states of all examples between two layers."""
    if 4 * math.prod(shape) <= IN_MEMORY:
        return io.BytesIO()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))
    except OSError as error:
        raise _no_room(folder, error) from None


def _read(file: BinaryIO, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The states of all examples by batches. Those that were read may be overwritten."""
    size = 4 * math.prod(shape[1:])
    for start in range(0, shape[0], _EXAMPLES):
        file.seek(start * size)
        content = file.read(min(_EXAMPLES, shape[0] - start) * size)
        yield np.frombuffer(content, np.float32).reshape(-1, *shape[1:])


def _write(file: BinaryIO, start: int, states: np.ndarray, folder: Path) -> None:
    """Writes the states of the examples from ``start`` on."""
    try:
        file.seek(start * states[0].nbytes)
        file.write(np.ascontiguousarray(states).data)
        file.flush()
    except OSError as error:
        raise _no_room(folder, error) from None


def _no_room(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: cannot hold the hidden states of the frozen layers ({error.strerror}): set FEDMEZO_CACHE to a "
        "folder with room for them, or give --layers all"
    )


class HiddenStates:
    """Hidden states of a table of examples: an array ``[N, S, D]`` whose rows are computed when they are first used.

    Attributes:
        shape: (N, S, D).
        dtype: that of the stored states.
    """

    def __init__(self, prefix: Prefix, tokens: np.ndarray, expected: int, folder: Path, dtype: Any = "float32"):
        """Nothing is computed yet.

        Args:
            prefix: the frozen layers.
            tokens: int32 ``[N, S]``, on the host.
            expected: how many of the examples are likely to be used.
            folder: where a file goes if their states are more than :data:`IN_MEMORY` bytes. It is named after all that
                decides its content, and shared by all runs with the same.
            dtype: float32 or bfloat16, to which they are rounded.
        """
        self._prefix, self._tokens = prefix, np.ascontiguousarray(tokens, np.int32)
        self.shape = (*tokens.shape, prefix.model.config.hidden_size)
        self.dtype = jax.numpy.dtype(dtype)
        if self.dtype.itemsize * expected * math.prod(self.shape[1:]) <= IN_MEMORY:
            self._store: _Store = _Memory()
        else:
            model = prefix.model
            cut = f"{prefix.base_hash} {model.config} {model.trained_layers[0]} {model.precision} {self.shape}"
            cut += f" {model.eight_bit} {self.dtype} {jax.default_backend()} {jax.__version__}"
            name = hashlib.sha256(cut.encode() + self._tokens.tobytes()).hexdigest()
            self._store = _File(folder / f"{name}.states", self.shape[1:], self.dtype)

    def compute(self, examples: np.ndarray, notify: Callable[[str], None] = lambda line: None) -> None:
        """Computes those of the examples that are not there yet.

        Args:
            examples: their indices.
            notify: called with a line about the progress, every ten seconds.

        Raises:
            UserError: the weights cannot be read, or a file cannot be written.
        """
        missing = np.array([i for i in np.unique(examples) if self._store.read(int(i)) is None], int)
        if len(missing):
            for i, states in zip(missing, self._prefix(self._tokens[missing], notify), strict=True):
                self._store.write(int(i), states.astype(self.dtype))

    def __len__(self) -> int:
        """N."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """The states of the examples that an index of the first axis picks, ``[…, S, D]``."""
        index = np.arange(len(self))[index]
        states = [self._store.read(int(i)) for i in index.ravel()]
        if any(row is None for row in states):
            self.compute(index)
            states = [self._store.read(int(i)) for i in index.ravel()]
        return np.array(states, self.dtype).reshape(*index.shape, *self.shape[1:])


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

    The file's name is part of the digest, so that the records of another file under this name read as None too. Runs
    that share the file write the same bytes into it.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype):
        self._path, self._shape, self._dtype, self._key = path, shape, dtype, path.stem.encode()
        self._bytes = dtype.itemsize * math.prod(shape)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _no_room(path.parent, error) from None
        weakref.finalize(self, os.close, self._file)

    def read(self, i: int) -> np.ndarray | None:
        record = os.pread(self._file, _DIGEST + self._bytes, i * (_DIGEST + self._bytes))
        digest, content = record[:_DIGEST], record[_DIGEST:]
        if len(content) < self._bytes or digest != self._digest(i, content):
            return None
        return np.frombuffer(content, self._dtype).reshape(self._shape)

    def write(self, i: int, states: np.ndarray) -> None:
        content = states.tobytes()
        record = memoryview(self._digest(i, content) + content)
        start = i * len(record)
        try:
            while record:
                written = os.pwrite(self._file, record, start)
                record, start = record[written:], start + written
        except OSError as error:
            raise _no_room(self._path.parent, error) from None

    def _digest(self, i: int, content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=_DIGEST, key=self._key, salt=i.to_bytes(8, "little")).digest()
