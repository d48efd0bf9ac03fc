"""A process that measures: requests come on standard input, a JSON object a line, and answers go to standard output.

The first answer is ``{"hello": …}``, what the process runs on. The answer to a request is a line ``{"row": …}`` for
each row and then ``{"end": null}``, or an error in place of null.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

import jax

from experiments.benchmarks.accelerator_rows.forecast import error_line

KINDS = {
    "card": "card.measure",
    "memory": "memory.measure",
    "speed": "speed.measure",
    "rebuild": "rebuild.measure",
    "slope": "slope.measure",
    "exactness": "exactness.measure",
    "comparison": "exactness.compare",
    "peer": "peer.measure",
}
"""The function that yields the rows of each kind."""


def main() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log

    def answer(**content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    device = jax.devices()[0]
    answer(hello={"platform": device.platform, "device_kind": device.device_kind, "jax": jax.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            module, function = KINDS[request["kind"]].split(".")
            measure = getattr(importlib.import_module(f"{__package__}.{module}"), function)
            for row in measure(request["wanted"], request["card"], **request["options"]):
                answer(row=row)
            answer(end=None)
        except Exception as error:
            traceback.print_exc()
            answer(end=error_line(error))
