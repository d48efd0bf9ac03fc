"""What Flower makes of a payload."""

import json

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity


def serialised(content: RecordDict) -> int:
    """Bytes of a message with this content, before TLS and HTTP."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as in a process that Flower starts
    message = Message(content, dst_node_id=1, message_type="train")
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def of_bytes(count: int) -> int:
    """Bytes of a message with so many bytes of payload, as a run's messages go."""
    return serialised(RecordDict({"fedmezo": ConfigRecord({"message": bytes(count)})}))


def of_arrays(shapes: str) -> int:
    """Bytes of a message with float32 arrays of these shapes, in JSON, as FedAvg's go."""
    return serialised(RecordDict({"arrays": random_arrays(shapes)}))


def random_arrays(shapes: str) -> ArrayRecord:
    """Arrays of these shapes: Flower sends arrays that are equal once."""
    draw = np.random.default_rng()
    arrays = [draw.standard_normal(shape, np.float32) for shape in json.loads(shapes)]
    return ArrayRecord({str(i): Array(array) for i, array in enumerate(arrays)})
