"""A bound on what a chat template may compute: templates come with models, and their loops may never end."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
_TEMPLATE = "<template>"  # the file name that Jinja gives to code compiled from a string


class TooManySteps(BaseException):
    """A template took more steps than it may. Not an ``Exception``, so that no code of Jinja's can swallow it."""


def limit_steps(render: Callable[[], Result], steps: int) -> Result:
    """Call ``render``, which runs a Jinja template, and raise :class:`TooManySteps` after ``steps`` steps.

    A step is a line of the template's compiled code or a call of a Python function from it, so loops, macros and
    recursion all count, whatever they run over. What one call into C does, such as repeating a string, is one step.
    """
    left, started = steps, False

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left, started
        in_template = frame.f_code.co_filename == _TEMPLATE
        started = started or in_template  # compiling a template takes many calls, but is bounded by its size
        left -= started
        if left < 0:
            raise TooManySteps
        return count if in_template else None

    before = sys.gettrace()
    sys.settrace(count)
    try:
        return render()
    finally:
        sys.settrace(before)
