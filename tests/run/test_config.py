"""The parts of a run's configuration: each checks its own options, alone and as part of a run's."""

from dataclasses import fields

import pytest

from fedmezo_jax.errors import UserError
from fedmezo_jax.run import config_parts
from fedmezo_jax.run.config import RunConfig

PARTS = (
    config_parts.ModelConfig,
    config_parts.DataConfig,
    config_parts.PartitionConfig,
    config_parts.LoraConfig,
    config_parts.LocalConfig,
    config_parts.ServerConfig,
    config_parts.FaultConfig,
    config_parts.PrivacyConfig,
)
BAD = {
    "ModelConfig": ({"precision": "float64"}, "--precision must be one of float32, bfloat16, paired, not float64"),
    "DataConfig": ({"max_length": 7}, "--max-length must be at least 8, not 7"),
    "PartitionConfig": ({"clients": 0}, "--clients must be at least 1, not 0"),
    "LoraConfig": ({"lora_alpha": 0.0}, "--lora-alpha must be above 0, not 0.0"),
    "LocalConfig": ({"weight_decay": -1.0}, "--weight-decay must be 0 or more, not -1.0"),
    "ServerConfig": ({"participation": 2.0}, "--participation must be above 0 and at most 1, not 2.0"),
    "FaultConfig": ({"attempts": 0}, "--attempts must be at least 1, not 0"),
    "PrivacyConfig": ({"dp_clip": 0.0}, "--dp-clip must be above 0, not 0.0"),
}


def test_options_come_in_the_order_of_their_parts_each_from_one_of_them():
    assert [field.name for field in fields(RunConfig)] == [field.name for part in PARTS for field in fields(part)] + [
        "seed"
    ]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_part_checks_its_options_alone_and_in_a_run(part):
    options, message = BAD[part.__name__]
    for config in (part, RunConfig):
        with pytest.raises(UserError) as caught:
            config(**options)
        assert str(caught.value) == message
