"""A bound on the steps of a chat template: templates come with models, and their loops may never end."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
_TEMPLATE = "<template>"  # the file name that Jinja gives to code compiled from a string


class TooManySteps(BaseException):
    """A template exceeded its steps. Not an ``Exception``, so that Jinja's code cannot catch it."""


def limit_steps(render: Callable[[], Result], steps: int) -> Result:
    """Call ``render``, which runs a Jinja template, and raise :class:`TooManySteps` after ``steps`` steps.

    A step is a line of the template's compiled code or a call of a Python function from it, so loops, macros and
    recursion all count. A call into C, such as repeating a string, counts as one step.

    Returns:
        The result of ``render``.
    """
    steps_left, started = steps, False

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal steps_left, started
        in_template = frame.f_code.co_filename == _TEMPLATE
        started = started or in_template  # compiling a template takes many calls, but is bounded by its size
        steps_left -= started
        if steps_left < 0:
            raise TooManySteps
        return count if in_template else None

    previous_trace = sys.gettrace()
    sys.settrace(count)
    try:
        return render()
    finally:
        sys.settrace(previous_trace)
