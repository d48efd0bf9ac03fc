"""A client runs on the packages of requirements-client.txt, which are a part of what the server has."""

import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import small_run

from fedmezo_jax.deploy.examples import deal_out
from fedmezo_jax.run import run_folder

ROOT = Path(__file__).parents[2]
CLIENT = '''
import json, sys
missing = set(json.loads(sys.argv[1]))

class Rest:
    """A finder that does not find them."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *where):
        return None if name.split(".")[0] in missing else self.finder.find_spec(name, *where)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Rest, sys.meta_path)
from pathlib import Path
import experiments.deploy
from fedmezo_jax.deploy import envelopes
from fedmezo_jax.deploy.client import Client
from fedmezo_jax.deploy.examples import read_own
from fedmezo_jax.run.config import read_config

own = read_own(read_config(Path(sys.argv[2])), [Path(sys.argv[3])])
client = Client(0, own)
ask = lambda request: envelopes.unpack_response(client.handle(envelopes.pack(request)))
facts = client._facts
enrolment = ask(envelopes.Hello(bytes(8), facts, None))
ask(envelopes.Hello(b"12345678", facts, envelopes.Plan((enrolment.shape,), 1)))
print(client.rounds, len(enrolment.lengths))
'''


def lines(file):
    return {line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if line and line[0] != "#"}


def test_they_are_those_of_the_server_and_flower():
    (flower,) = lines("requirements-client.txt") - lines("requirements.txt")
    assert f'"{flower}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def named(line):
    """The distribution of a line of requirements, as names are compared."""
    return re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")


def closure(names, installed):
    """The distributions that these need, and those need in turn, without extras."""
    found, waiting = set(), set(names)
    while waiting:
        found.add(name := waiting.pop())
        needed = {named(line) for line in requires(name) or () if "extra ==" not in line}
        waiting |= (needed & installed) - found
    return found


def test_a_client_starts_without_the_rest(tmp_path_factory, tmp_path):
    pytest.importorskip("flwr")
    modules = {module: set(map(named, names)) for module, names in packages_distributions().items()}
    needed = closure(map(named, lines("requirements-client.txt")), set().union(*modules.values()))
    absent = [module for module, names in modules.items() if not names & needed]
    assert {"datasets", "pyarrow", "matplotlib", "gguf", "dp_accounting"} <= set(absent)
    with small_run.place(tmp_path_factory, "lean") as folder:
        config = small_run.configuration(folder)
        deal_out(config, tmp_path)
        run_folder.write_json(tmp_path / "config.json", config.__dict__)
        given = json.dumps(absent), tmp_path / "config.json", tmp_path / "client-0.jsonl"
        done = subprocess.run([sys.executable, "-c", CLIENT, *given], capture_output=True, text=True)
        rows = len((tmp_path / "client-0.jsonl").read_text().splitlines())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", str(rows)]
