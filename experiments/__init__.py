"""The commands, each a module to be run with ``python -m experiments.NAME``."""

import os
import signal
import sys
from typing import Any

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that stop a command."""


def _stop(number: int, frame: Any) -> None:
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


# While ``python -m`` looks for a module, the name of the program is "-m". Its imports take seconds, in which there is
# nothing to clean up; ``_cli.run`` then takes the signals over.
if sys.argv[:1] == ["-m"]:
    for _number in STOPS:
        if signal.getsignal(_number) is not signal.SIG_IGN:  # as nohup ignores SIGHUP
            signal.signal(_number, _stop)
