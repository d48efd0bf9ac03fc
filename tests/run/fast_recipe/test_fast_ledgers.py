"""Ledgers of the fast recipe that no run leaves."""

import math
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from fast_runs import begun

from fedmezo_jax.errors import UserError
from fedmezo_jax.run import ledger, ledger_checks
from fedmezo_jax.run.replay import largest_difference, replay


def take(value):
    return lambda header, payloads: payloads[2].update(step=value)


def first_rate(value):
    return lambda header, payloads: header.update(first_rate=value)


def rates(factor, t=2):
    def change(header, payloads):
        learning_rates = np.frombuffer(payloads[t]["learning_rates"], "<f4") * np.float32(factor)
        payloads[t]["learning_rates"] = learning_rates.astype("<f4").tobytes()

    return change


def fixed(rate, step=1.0):
    """Made the first round of a run at a fixed rate; ``rate`` is in units of the first round's."""

    def change(header, payloads):
        header["config"]["learning_rate"] = rate * header["first_rate"]
        header["config_hash"] = ledger.config_hash(header["config"])
        payloads[0]["step"] = step
        del payloads[1:]

    return change


GOOD = {"as it was": lambda header, payloads: None, "of a fixed rate": fixed(1.0)}
BAD = {
    **{f"step {step}": (take(step), "took") for step in (0.5, -1.0, 3.0, math.nan, math.inf)},
    **{f"step {step!r}": (take(step), "is malformed") for step in (None, 1, True, "2", b"")},
    "another step than the next rate says": (take(0.0), "round 4 .* learning rate is not within"),
    "no step": (lambda header, payloads: payloads[2].pop("step"), "is malformed"),
    "a step at a fixed rate": (fixed(1.0, step=2.0), "took 2 of its update"),
    "a step undone at a fixed rate": (fixed(1.0, step=0.0), "took 0 of its update"),
    "a rate that does not follow": (rates(1.001), "round 3 .* learning rate is not within"),
    "one rate kept": (rates(1 / 1.4), "round 3 .* learning rate is not within"),
    "another first rate": (lambda h, _: h.update(first_rate=h["first_rate"] * 1.001), "round 1 .* learning rate"),
    **{
        f"first rate {rate!r}": (first_rate(rate), "first_rate cannot be")
        for rate in (-1e-3, 0.0, math.nan, math.inf, -math.inf, 1, True, None, "1e-3")
    },
    "no first rate": (lambda header, payloads: header.pop("first_rate"), "first_rate is missing"),
    "another rate than the fixed one": (fixed(1.5), "first_rate cannot be"),
}


def changed(change, folder, file):
    header = ledger.read_header(folder / "run.ledger")
    payloads = [msgpack.unpackb(record.payload) for record in ledger.records(folder / "run.ledger")][1:]
    change(header, payloads)
    book = ledger.create(file, header)
    for payload in payloads:
        book._write(msgpack.packb(payload))
    return file


@pytest.mark.parametrize("name", GOOD)
def test_a_ledger_made_in_the_same_way_is_accepted(name, steady, tmp_path):
    file = changed(GOOD[name], steady.folder, tmp_path / "run.ledger")
    config = ledger_checks.run_config(ledger.read_header(file), file)
    assert len(list(ledger_checks.entries(file, config))) == begun(file.parent)


def test_a_run_of_the_task_itself_replays_with_the_task(setup, steady, tmp_path):
    """Whose weights are only those that are used with hidden states; the ledger names all of them."""

    def of_the_task(header, payloads):
        header["config"]["model"] = "task:LlamaTask"
        header["config_hash"] = ledger.config_hash(header["config"])

    file = changed(of_the_task, steady.folder, tmp_path / "run.ledger")
    assert largest_difference(replay(file, task=setup.task).params, steady.result.params) is None
    other = replace(setup.task, base_hash="cd" * 32)
    with pytest.raises(UserError, match="weights are not those"):
        replay(file, task=other)


@pytest.mark.parametrize("name", BAD)
def test_a_ledger_whose_steps_or_rates_no_run_can_have_is_refused(name, steady, tmp_path):
    change, why = BAD[name]
    file = changed(change, steady.folder, tmp_path / "run.ledger")
    assert steady.entries[2].step not in (0.0, 0.5)
    with pytest.raises(UserError, match=why) as refused:
        replay(file)
    assert "\n" not in str(refused.value)
