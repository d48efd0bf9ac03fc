"""Hands each message to the worker beside this SuperNode, and sends back what that answers.

Flower starts a process for each message. It imports nothing but Flower: the worker, which holds the model, is resident.
Its socket is ``socket`` of the SuperNode's ``--node-config``.
"""

import socket
from typing import cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def exchange(path: str, request: bytes) -> bytes:
    """The worker's answer to a request; both go as eight bytes of length, little-endian, and content."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.connect(path)
        stream.sendall(len(request).to_bytes(8, "little") + request)
        with stream.makefile("rb") as answer:
            return answer.read(int.from_bytes(answer.read(8), "little"))


@app.train()
def train(message: Message, context: Context) -> Message:
    """One request of the server."""
    request = cast(bytes, message.content.config_records["fedmezo"]["message"])
    answer = exchange(str(context.node_config["socket"]), request)
    return Message(RecordDict({"fedmezo": ConfigRecord({"message": answer})}), reply_to=message)
