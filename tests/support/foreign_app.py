"""A Flower app that is not ours, sent to the SuperNodes of a run by someone who reaches the control API."""

PYPROJECT = """
[project]
name = "foreign-app"
version = "1.0.0"
description = "Leaves a mark wherever it is run"
license = "Apache-2.0"
dependencies = ["flwr>=1.42"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "foreign"

[tool.flwr.app.components]
serverapp = "foreign_app.server_app:app"
clientapp = "foreign_app.client_app:app"

[tool.flwr.app.config]
"""
SERVER = """
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    Path({mark!r} + ".server").touch()
    content = RecordDict({{"fedmezo": ConfigRecord({{"message": b"rm -rf"}})}})
    waiting = set(grid.push_messages([Message(content, dst_node_id={node}, message_type="train", ttl=60.0)]))
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            said = None if reply.has_error() else reply.content.config_records["fedmezo"]["message"]
            Path({mark!r} + ".reply").write_text(repr(said))
        time.sleep(0.2)
"""
CLIENT = """
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

Path({mark!r} + ".client").touch()
app = ClientApp()

@app.train()
def train(message, context):
    return Message(RecordDict({{"fedmezo": ConfigRecord({{"message": b"foreign"}})}}), reply_to=message)
"""


def write_foreign_app(folder, node, mark):
    """Writes it: its code makes files whose names begin with ``mark``, and it sends one message to the node."""
    package = folder / "foreign_app"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").touch()
    for name, text in (("server_app", SERVER), ("client_app", CLIENT)):
        (package / f"{name}.py").write_text(text.format(node=node, mark=str(mark)))
    return folder
