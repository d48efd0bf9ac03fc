"""Reads msgpack that came from outside, field by field. Whatever is not as expected ends in a ``UserError``.

Lengths are read before anything is made of them, and nested arrays and maps are refused where they are not expected:
no message makes its reader allocate much more than its own size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from fedmezo_jax.errors import UserError

ERRORS = (ValueError, TypeError, OverflowError, msgpack.UnpackException)
"""What msgpack and numpy raise on malformed content."""


class Reader:
    """A message that is read from its beginning to its end."""

    def __init__(self, content: bytes, what: str):
        """Starts at the beginning.

        Args:
            content: the message.
            what: names it in errors.
        """
        self._what, self._content, self._size = what, content, len(content)
        limits = {"max_array_len": 0, "max_map_len": 0, "max_ext_len": 0}
        self._stream = msgpack.Unpacker(max_buffer_size=max(self._size, 1), **limits)
        self._stream.feed(content)

    def error(self, why: str) -> UserError:
        """The error that says what is wrong with the message."""
        return UserError(f"{self._what} is malformed: {why}")

    def array(self, length: int | None = None) -> int:
        """The length of the array that begins here, which is ``length`` if given."""
        return self._header(self._stream.read_array_header, "an array", length)

    def map(self, length: int | None = None) -> int:
        """The number of entries of the map that begins here, which is ``length`` if given."""
        return self._header(self._stream.read_map_header, "a map", length)

    def at_array(self) -> bool:
        """Whether an array begins here."""
        start = self._stream.tell()
        code = self._content[start : start + 1]
        return b"\x90" <= code <= b"\x9f" or code in (b"\xdc", b"\xdd")

    def value(self, *kinds: type) -> Any:
        """A scalar, bytes, text or None that is of exactly one of these types."""
        value = self._read(self._stream.unpack)
        if type(value) not in kinds:
            raise self.error(f"found {type(value).__name__} and not {' or '.join(kind.__name__ for kind in kinds)}")
        return value

    def integer(self) -> int:
        """An integer in [0, 2**63)."""
        value = self.value(int)
        if not 0 <= value < 2**63:
            raise self.error(f"{value} is out of range")
        return value

    def vector(self, dtype: str = "<f4") -> np.ndarray:
        """A vector that is stored as bytes, in the machine's own byte order."""
        content = self.value(bytes)
        if len(content) % np.dtype(dtype).itemsize:
            raise self.error(f"{len(content)} bytes are no whole number of values")
        return np.frombuffer(content, dtype).astype(np.dtype(dtype).newbyteorder("="))

    def optional_vector(self) -> np.ndarray | None:
        """A vector of float32, or None."""
        if self._content[(start := self._stream.tell()) : start + 1] == b"\xc0":
            return self.value(type(None))
        return self.vector()

    def end(self) -> None:
        """Expects the message to end here."""
        if self._stream.tell() != self._size:
            raise self.error("it is followed by other bytes")

    def _header(self, read: Callable[[], int], what: str, length: int | None) -> int:
        value = self._read(read)
        if value > self._size or length not in (None, value):
            raise self.error(f"{what} has {value} entries" + ("" if length is None else f" and not {length}"))
        return value

    def _read(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ERRORS as error:
            raise self.error(f"it cannot be decoded ({type(error).__name__})") from None
