"""A run of `experiments.deploy server` whose clients join it in several ways, for tests that intrude."""

import contextlib
import http.client
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

from loopback import client_of

from fedmezo_jax.deploy import envelopes
from fedmezo_jax.deploy.admission import check_server
from fedmezo_jax.deploy.credentials import make_node_key
from fedmezo_jax.deploy.envelopes import Answer
from fedmezo_jax.deploy.examples import deal_out
from fedmezo_jax.deploy.flower import answer_at
from fedmezo_jax.deploy.local_network import Processes, environment, free_port, start_node, write_programs
from fedmezo_jax.run import run_folder

CADDY = shutil.which("caddy", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
DOCUMENT = Path(__file__).parents[2] / "docs/deployment.md"


def documented(language):
    """The block of this language in the document."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return block


class Replaying:
    """A client whose second answer is its first one once more."""

    def __init__(self, client):
        self.client, self.answers = client, []

    def handle(self, request):
        answer = self.client.handle(request)
        if isinstance(envelopes.unpack_response(answer), Answer):
            self.answers.append(answer)
        return self.answers[0] if len(self.answers) == 2 else answer


def refused(process):
    """The one line with which a client's command has ended."""
    said = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 2, said
    assert said[-1].startswith("error: ")
    assert not any("Traceback" in line for line in said)
    return said[-1]


class FlowerNetwork:
    """The server's command and its clients, with keys ``node-0`` and so on in a folder.

    A client is a command, or a SuperNode that is answered for in this process.
    """

    def __init__(self, config, folder):
        self.config, self.folder = config, folder
        self.address = f"127.0.0.1:{free_port()}"
        self.out, self.network, self.run = folder / "served", folder / "served/network", folder / "served/run"
        deal_out(config, folder / "data")
        run_folder.write_json(folder / "config.json", config.__dict__)
        self.keys = [folder / f"node-{client}" for client in range(config.clients)]
        for key in self.keys:
            make_node_key(key)
        (folder / "logs").mkdir()
        self.nodes = Processes(folder / "logs", environment(folder / "logs"))
        self.commands = []

    def command(self, name, *options):
        """Starts one of the commands; returns its process."""
        line = [sys.executable, "-m", "experiments.deploy", name, "--config", self.folder / "config.json", *options]
        self.commands.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return self.commands[-1]

    def start_server(self, *more):
        """Starts the server's command, and returns when it listens and knows the keys."""
        known = len(self.lines("register-node"))
        public = [key.with_suffix(".pub") for key in self.keys]
        options = ["--examples", self.folder / "data/test.jsonl", "--address", self.address, "--out", self.out]
        self.server = self.command("server", *options, "--round-seconds", "100", *more, "--node-keys", *public)
        self.wait_for(lambda: len(self.lines("register-node")) == known + self.config.clients)

    def serve(self, client, change=lambda client: client):
        """Answers for a client in this process, as a worker does; what ``change`` makes of the client answers."""
        answering = change(client_of(self.config, self.folder / "data", client))
        clients = {self.folder / f"worker-{client}": answering}
        threading.Thread(target=answer_at, args=(clients,), daemon=True).start()

    def start_node(self, client):
        """Starts the SuperNode of a client that is answered for here."""
        programs = write_programs(self.folder / "programs")
        party = self.network / "ca.crt", self.keys[client], self.folder / f"worker-{client}", programs
        start_node(self.nodes, f"node-{client}-{len(self.commands)}", self.address, *party)

    def start_proxy(self):
        """Caddy as the document has it, at another port and with the addresses of this network."""
        folder, self.proxy = self.folder / "proxy", f"127.0.0.1:{free_port()}"
        folder.mkdir()
        line = shlex.split(documented("sh").replace("DNS:server.example", "IP:127.0.0.1"))
        subprocess.run(line, cwd=folder, check=True, capture_output=True)
        text = documented("caddy").replace("127.0.0.1:8443", self.address).replace(":8000", self.proxy)
        text = text.replace("runs/served/network/ca.crt", str(self.network / "ca.crt"))
        (folder / "Caddyfile").write_text(text)
        self.proxy_authority = folder / "proxy.crt"
        command = [CADDY, "run", "--config", "Caddyfile", "--adapter", "caddyfile"]
        with (folder / "log").open("w") as log:
            self.commands.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log))
        while check_server(self.proxy, self.proxy_authority):
            assert self.commands[-1].poll() is None, (folder / "log").read_text()
            time.sleep(0.2)

    def ask_proxy(self, path):
        """The proxy's status for a path, which is sent as it is written."""
        context = ssl.create_default_context(cafile=self.proxy_authority)
        connection = http.client.HTTPSConnection(*self.proxy.split(":"), context=context, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST", path, b"")
            return connection.getresponse().status

    def client(self, client, out, **changed):
        """Starts the command of a client, with options that are changed; returns its process."""
        options = {
            "address": self.address,
            "authority": self.network / "ca.crt",
            "node-key": self.keys[client],
            "examples": self.folder / f"data/client-{client}.jsonl",
            "client": client,
            "out": out,
        }
        options |= {name.replace("_", "-"): value for name, value in changed.items()}
        given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        return self.command("client", *given)

    def lines(self, part):
        """The lines of the SuperLink's log with this part."""
        log = self.network / "superlink.log"
        return [line for line in log.read_text().splitlines() if part in line] if log.exists() else []

    def wait_for(self, condition):
        while not condition():
            assert self.server.poll() is None, self.server.stdout.read()
            time.sleep(0.1)

    def stop(self):
        """Ends all that runs."""
        for command in self.commands:
            command.kill()
            command.wait()
            if command.stdout:
                command.stdout.close()
        self.nodes.__exit__()
