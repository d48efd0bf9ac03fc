"""The benchmark of the secure sum: its rows and what it refuses."""

import json

import pytest

from experiments.benchmarks import secure_sum
from fedmezo_jax.errors import UserError


def test_a_row_for_each_number_of_clients(tmp_path):
    secure_sum.main(secure_sum.Config(clients="5,12", numbers=7, out=tmp_path / "out"))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["clients"], row["threshold"], row["dropped_out"]) for row in rows] == [(5, 4, 0), (12, 9, 1)]
    for row in rows:
        assert row["mask_bytes"] == 7 * 8 + 2
        # A share for each client: two of 33 bytes, a nonce of 12, a tag of 16, and no more than four to say whose.
        assert 94 * row["clients"] < row["share_bytes"] <= 98 * row["clients"] + 4
        assert row["uplink_bytes"] < row["downlink_bytes"]
    assert (tmp_path / "out" / "secure_sum.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("clients", ["", "8,two", "2"])
def test_other_numbers_of_clients_are_refused(clients, tmp_path):
    with pytest.raises(UserError, match="--clients must be"):
        secure_sum.main(secure_sum.Config(clients=clients, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
