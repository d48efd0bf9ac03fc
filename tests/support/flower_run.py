"""The command `experiments.deploy local` as a process, whose processes can be killed."""

import os
import re
import signal
import subprocess
import sys
import time

from loopback import simulated_without, without_seconds

from fedmezo_jax.run import ledger, run_folder
from fedmezo_jax.run.config import read_config

NAMES = {
    "worker": "experiments.deploy worker .*--client {} .*{}",
    "supernode": "flower-supernode .*{1}/network/node-{0} ",
    "superlink": "flower-superlink .*{1}/network",
    "superexec": "flower-superexec .*{1}/network",
}
"""What the command line of a process of a client and a folder looks like."""


class FlowerRun:
    """A run in a folder, with the command that makes it."""

    def __init__(self, config, out, *options):
        self.out, self.run = out, out / "run"
        self.options = ["--config", config, "--out", out, *options]

    def start(self, *more):
        if hasattr(self, "command"):
            self.stop()
        command = [sys.executable, "-m", "experiments.deploy", "local", *self.options, *more]
        self.command = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def end(self):
        """Waits for the command's end; returns its exit code and what it printed."""
        said = self.command.stdout.read()
        return self.command.wait(), said

    def stop(self):
        """Kills the command if it is running; its processes end with it."""
        self.command.kill()
        self.command.wait()
        self.command.stdout.close()

    def rounds(self):
        return len(run_folder.read_metrics(self.run))

    def wait_for_round(self, count):
        while self.rounds() < count:
            assert self.command.poll() is None, self.end()
            time.sleep(0.1)

    def processes(self):
        """All that run on this machine, as (id, parent's id, command line)."""
        listed = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
        rows = (line.split(maxsplit=2) for line in listed.splitlines())
        return [(int(row[0]), int(row[1]), row[2]) for row in rows if len(row) == 3]

    def find(self, name, client=""):
        """The id of a process of this run, and not that of its guard; None if there is none."""
        processes = self.processes()
        if name == "server":  # its command line does not name the folder
            starter = self.find("superexec")
            servers = [pid for pid, parent, args in processes if "flwr-serverapp" in args and parent == starter]
            return servers[0] if servers else None
        pattern = re.compile(NAMES[name].format(client, re.escape(str(self.out))))
        found = [pid for pid, _, args in processes if pattern.search(args + " ") and "guard.py" not in args]
        return found[0] if found else None

    def kill(self, name, client=""):
        """Kills a process as soon as it is there."""
        while (pid := self.find(name, client)) is None:
            assert self.command.poll() is None, self.end()
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)

    def logged(self, name, part):
        """The lines of a process's log with this part."""
        log = self.out / f"network/{name}.log"
        return [line for line in log.read_text(errors="replace").splitlines() if part in line]

    def check_same_as_simulation(self, folder, patch):
        """See :func:`check_same_as_simulation`."""
        return check_same_as_simulation(self.out, folder, patch)


def check_same_as_simulation(out, folder, patch):
    """A command's run left what the simulation leaves in which the same clients dropped out; returns these.

    They are ((round, attempt), client), of the ledger.
    """
    run, config = out / "run", read_config(out / "config.json")
    entries = list(ledger.entries(run / "run.ledger"))
    dropped = [((entry.round, attempt), client) for entry in entries for attempt, client, _ in entry.failed]
    simulated_without(config, dropped, folder, patch)
    for name in ("run.ledger", "adapter/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (folder / name).read_bytes(), name
    records = [run_folder.read_metrics(each) for each in (run, folder)]
    assert without_seconds(records[0]) == without_seconds(records[1])
    return dropped
