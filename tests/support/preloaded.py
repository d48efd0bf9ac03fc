"""The main command in processes that start at once: each is forked from one that has imported everything."""

import atexit
import multiprocessing
import os
import signal
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import datasets  # noqa: F401 (what a run imports when it gets there)
import jax
import matplotlib.figure  # noqa: F401
import pytest
import transformers  # noqa: F401

from experiments import _cli, fedmezo


def context():
    """Of ``multiprocessing``, whose processes have imported what this module imports."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # without it the preload fails, and says nothing
        forkserver.ensure_running()
    return found


def run(argv, environment):
    """In a process of :func:`context`: the command, with an environment of its own."""
    os.environ.update(environment)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    sys.argv = ["fedmezo", *argv]
    _cli.run(fedmezo.main, fedmezo.Config, fedmezo.__doc__)


class Command:
    """The command in a process of its own, with the methods of ``subprocess.Popen`` that tests need."""

    def __init__(self, argv, environment, cwd):
        self._output = [Path(name) for _, name in (tempfile.mkstemp(dir=cwd) for _ in range(2))]
        self._process = context().Process(target=_command, args=(argv, environment, cwd, self._output))
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the process has not ended"
        return tuple(file.read_text() for file in self._output)


def _command(argv, environment, cwd, output):
    os.chdir(cwd)
    for file, stream in zip(output, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(file, os.O_WRONLY), stream.fileno())
    try:
        run(argv, environment)
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # multiprocessing ends a process without them
