"""Heartbeats: which process is given up, told by a store that this test fills in for the other processes."""

import itertools
import threading

import pytest

from fedmezo_jax.parallel import heartbeats


class Store:
    """The key-value store; process 1 of three falls silent after ``beats`` reads, and answers end after ``answers``."""

    def __init__(self, own, beats=10**9, answers=10**9):
        self.own, self.beats, self.answers = own, beats, answers
        self.reads = itertools.count()
        self.number = "0"
        self.many, self.released = threading.Event(), threading.Event()

    def key_value_set(self, key, value, allow_overwrite):
        assert key == f"fedmezo/heartbeat/{self.own}"
        assert allow_overwrite
        self.number = value

    def key_value_dir_get(self, key):
        read = next(self.reads)
        if read >= self.answers:
            self.released.wait()
        if read >= 100:
            self.many.set()
        beats = {index: str(read if index != 1 else min(read, self.beats)) for index in range(3)}
        return [(f"{key}{index}", beat) for index, beat in (beats | {self.own: self.number}).items()]


@pytest.fixture
def watched():
    """Starts heartbeats of a process among three; returns what it said when it gave up, and an event for that."""
    stops = []

    def begin(store):
        said, ended = [], threading.Event()

        def give_up(complaint):
            said.append(complaint)
            ended.set()

        stops.append((store, heartbeats.start(store, store.own, 3, 0.5, give_up)))
        return said, ended

    yield begin
    for store, stop in stops:
        store.released.set()
        stop()


@pytest.mark.parametrize("own", [0, 2])
def test_a_busy_process_is_not_given_up(own, watched):
    store = Store(own)
    said, _ = watched(store)
    assert store.many.wait(60)  # five timeouts, in which no main thread did anything
    assert said == []


@pytest.mark.parametrize("own", [0, 2])
def test_a_silent_process_is_named(own, watched):
    said, ended = watched(Store(own, beats=3))
    assert ended.wait(60)
    (complaint,) = said
    assert complaint.startswith("process 1 has sent no heartbeat for 0.5 s")


def test_process_0_is_named_where_the_store_does_not_answer(watched):
    said, ended = watched(Store(2, beats=1, answers=3))
    assert ended.wait(60)
    (complaint,) = said
    assert complaint.startswith("process 0 has sent no heartbeat")
