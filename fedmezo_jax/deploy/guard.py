"""Runs a command, starts it again where that is asked for, and ends it as soon as its starter has ended.

Run by its path, so that it loads no other module: ``python guard.py TRIES COMMAND``. The starter holds the other end of
standard input, which is closed however the starter ends.
"""

import os
import signal
import subprocess
import sys
import threading
import time

_PAUSE, _SHORT = 4.0, 30.0
"""Seconds before the command is started again; and seconds within which it has ended at once."""
_WRONG = 2
"""Exit code of a command that says it was started wrongly: to start it again would not help."""


def _end_with_starter() -> None:
    os.read(0, 1)  # a buffered read would hold a lock at the interpreter's end
    os.killpg(0, signal.SIGKILL)


def main(tries: int, command: list[str]) -> int:
    """Runs the command in this process group until it has ended at once more than ``tries`` times in a row.

    Returns:
        Its last exit code, 128 plus its number of a signal.
    """
    stops = []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(True))  # the command, in the same group, gets it too
    threading.Thread(target=_end_with_starter, daemon=True).start()
    at_once = 0
    while True:
        start = time.monotonic()
        code = subprocess.Popen(command, stdin=subprocess.DEVNULL).wait()
        at_once = at_once + 1 if time.monotonic() - start < _SHORT else 0
        if stops or code == _WRONG or at_once > tries or not tries:
            return code if code >= 0 else 128 - code
        print(f"ended with code {code}: starting it again", flush=True)
        time.sleep(_PAUSE)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
