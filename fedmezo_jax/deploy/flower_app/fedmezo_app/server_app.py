"""The server of a run, over Flower's grid. Its settings are a file of the machine that it runs on."""

from typing import cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedmezo_jax.deploy.flower import FlowerTransport, serve_from_file

app = ServerApp()


def packed(node: int, request: bytes, seconds: float) -> Message:
    """A request for a node, which Flower forgets after so many seconds."""
    content = RecordDict({"fedmezo": ConfigRecord({"message": request})})
    return Message(content, dst_node_id=node, message_type="train", ttl=seconds)


def unpacked(message: Message) -> bytes | None:
    """What a reply holds; None of one that tells of an error."""
    return None if message.has_error() else cast(bytes, message.content.config_records["fedmezo"]["message"])


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    file = str(context.run_config["settings"])
    serve_from_file(file, lambda nodes, seconds: FlowerTransport(grid, nodes, seconds, packed, unpacked))
