"""A client that sends other arrays than it was sent: the comparison is of bytes and waiting, and not of computing."""

import json
from typing import cast

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedavg_app.sizes import random_arrays

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Arrays of the same shapes."""
    given = cast(ArrayRecord, message.content["arrays"])
    arrays = random_arrays(json.dumps([array.shape for array in given.values()]))
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)
