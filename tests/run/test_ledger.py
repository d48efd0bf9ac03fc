"""The ledger's file: whatever is cut short is cut off, whatever else changes is found, and nothing is overwritten."""

import errno

import numpy as np
import pytest

from fedmezo_jax.core.tree_hash import tree_hash
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import ledger
from fedmezo_jax.run.ledger import Entry

CONFIG = {"distribution": "gaussian", "seed": 0, "rounds": 4, "learning_rate": 1e-3}
HEADER = ledger.make_header(CONFIG, "ab" * 32, {"jax": "1.2.3"}, 1e-3)


def entry(t):
    draw = np.random.RandomState(t)
    numbers = draw.standard_normal((2, 3)).astype(np.float32)
    updates = [draw.bytes(40 + t), None, draw.bytes(7)]
    failed = [(0, 1, "dropped out"), (1, 5, "came too late")]
    return Entry(t, 1, np.array([1, 4, 70_000], np.int32), *numbers, updates, failed, clipped=t, rolled_back=t == 2)


def same(one, other):
    assert one._replace(ids=0, weights=0, learning_rates=0) == other._replace(ids=0, weights=0, learning_rates=0)
    for name in ("ids", "weights", "learning_rates"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.fixture
def written(tmp_path):
    """A ledger of four rounds, and where each of its records ends."""
    file = tmp_path / "run.ledger"
    book = ledger.create(file, HEADER)
    ends = [file.stat().st_size]
    for t in range(4):
        book.append(entry(t))
        ends.append(file.stat().st_size)
    return file, ends


def test_what_is_written_is_read(written):
    file, _ = written
    for t, found in enumerate(ledger.entries(file)):
        same(found, entry(t))
    assert [found.round for found in ledger.entries(file, 2)] == [2, 3]
    assert ledger.read_header(file)["config"] == CONFIG


def test_a_reopened_ledger_goes_on_as_if_never_closed(written, tmp_path):
    file, ends = written
    shorter = tmp_path / "shorter.ledger"
    shorter.write_bytes(file.read_bytes()[: ends[2]])
    book, notices = ledger.reopen(shorter, HEADER)
    assert (book.rounds, notices) == (2, [])
    book.append(entry(2))
    book.append(entry(3))
    assert shorter.read_bytes() == file.read_bytes()


def test_a_last_record_cut_short_anywhere_is_cut_off_with_a_notice(written):
    file, ends = written
    whole = file.read_bytes()
    for size in range(ends[3] + 1, ends[4]):
        file.write_bytes(whole[:size])
        book, (notice,) = ledger.reopen(file, HEADER)
        assert book.rounds == 3
        assert "round 4 was cut short" in notice
        assert f"{size - ends[3]} bytes" in notice
        assert file.read_bytes() == whole[: ends[3]]
    file.write_bytes(whole[: ends[3]] + bytes(100))  # the file had grown, its content was not there yet
    assert ledger.reopen(file, HEADER)[0].rounds == 3
    assert file.read_bytes() == whole[: ends[3]]


def test_a_flipped_bit_anywhere_is_found_and_named_and_nothing_is_changed(written):
    file, ends = written
    whole = file.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        index = np.searchsorted(ends, place, side="right")
        with pytest.raises(UserError) as caught:
            ledger.reopen(file, HEADER)
        assert (f"record of round {index} (bytes {ends[index - 1]} to" if index else "the header (bytes 0 to") in str(
            caught.value
        )
        assert file.read_bytes() == flipped


def test_records_that_change_places_are_found(written):
    file, ends = written
    whole = file.read_bytes()
    second, third = whole[ends[1] : ends[2]], whole[ends[2] : ends[3]]
    file.write_bytes(whole[: ends[1]] + third + second + whole[ends[3] :])
    with pytest.raises(UserError, match="round 2"):
        list(ledger.entries(file))
    file.write_bytes(whole[: ends[1]] + whole[ends[2] :])  # and one that is taken out
    with pytest.raises(UserError, match="round 2"):
        list(ledger.entries(file))


def test_another_run_is_refused(written):
    file, _ = written
    whole = file.read_bytes()
    for other, named in (
        (ledger.make_header(CONFIG | {"seed": 1}, "ab" * 32, {"jax": "1.2.3"}, 1e-3), "configuration"),
        (ledger.make_header(CONFIG, "cd" * 32, {"jax": "1.2.3"}, 1e-3), "base weights"),
    ):
        with pytest.raises(UserError, match=named):
            ledger.reopen(file, other)
    _, (notice,) = ledger.reopen(file, ledger.make_header(CONFIG, "ab" * 32, {"jax": "1.2.4"}, 1e-3))
    assert "other versions" in notice
    assert file.read_bytes() == whole


def test_a_ledger_of_version_1_is_refused_by_name(tmp_path):
    """Its numbers are products of learning rates and projected gradients, which this version would misread."""
    file = tmp_path / "run.ledger"
    ledger.create(file, HEADER | {"version": 1}).append(entry(0))
    before = file.read_bytes()
    for read in (ledger.read_header, lambda file: ledger.reopen(file, HEADER)):
        with pytest.raises(UserError) as caught:
            read(file)
        assert str(caught.value) == (
            f"{file}: is a ledger of format version 1, and this release reads version 4: read it with the release that "
            "wrote it, or start the run again with another --out"
        )
    assert file.read_bytes() == before


def test_what_is_no_ledger_is_refused(tmp_path):
    for content in (b"", b"chapter one", bytes(500)):
        (tmp_path / "thesis").write_bytes(content)
        with pytest.raises(UserError, match="ledger"):
            ledger.read_header(tmp_path / "thesis")
    with pytest.raises(UserError, match="cannot be read"):
        ledger.read_header(tmp_path / "nowhere")


@pytest.mark.parametrize("room", [0, 5, 60])
def test_a_full_disk_leaves_the_file_as_it_was(room, written, monkeypatch):
    file, _ = written
    before = file.read_bytes()
    book, _ = ledger.reopen(file, HEADER)

    def fill(stream, content):
        stream.write(content[:room])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_write_all", fill)
        with pytest.raises(OSError, match="No space"):
            book.append(entry(4))
    assert file.read_bytes() == before
    book.append(entry(4))
    *_, last = ledger.entries(file)
    same(last, entry(4))


def test_base_weights_are_told_apart():
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
    known = tree_hash(tree)
    assert known == tree_hash({name: leaf.copy() for name, leaf in reversed(tree.items())})
    others = [
        tree | {"b": np.array([1, np.nextafter(np.float32(1), np.float32(2))], np.float32)},
        tree | {"a": tree["a"].reshape(3, 2)},
        {"a": tree["a"], "c": tree["b"]},
        tree | {"b": np.ones(2, np.float64)},
    ]
    assert known not in map(tree_hash, others)
