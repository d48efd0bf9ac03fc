"""A partial application that is equal to another of the same function to equal arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EqualPartial:
    """``function(*first, *rest)``, as :class:`functools.partial` calls it, but compared and hashed by value.

    JAX traces a function again unless it is equal to the one before. So a loss that is made anew for each run of the
    same model is one of these, and the runs of a process share their compiled programs.

    Attributes:
        function: a function of a module.
        first: its first arguments, hashable.
    """

    function: Callable[..., Any]
    first: tuple[Any, ...]

    def __call__(self, *rest: Any) -> Any:
        """The function's value."""
        return self.function(*self.first, *rest)
