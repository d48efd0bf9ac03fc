"""The processes of a run find each other before JAX connects them, or say what was wrong."""

import socket
import threading

import pytest
from free_port import free_port

from fedmezo_jax.errors import UserError
from fedmezo_jax.parallel.roll_call import roll_call


def outcomes(*places, port=None, timeout=20):
    """What each place, (COUNT, INDEX), gets from the roll call: None or its error."""
    address, found = f"localhost:{port or free_port()}", [None] * len(places)

    def take_part(i, count, index):
        try:
            roll_call(address, count, index, timeout)
        except (UserError, TimeoutError) as error:
            found[i] = error

    threads = [threading.Thread(target=take_part, args=(i, *place)) for i, place in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_processes_that_agree_go_on_and_leave_the_port_free(order):
    port = free_port()
    for _ in range(2):
        assert outcomes(*((3, index) for index in order), port=port) == [None] * 3
    socket.create_server(("localhost", port)).close()


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        (((2, 0), (3, 1)), "process 0 was given a COUNT of 2 and process 1 one of 3"),
        (((3, 0), (2, 1)), "process 0 was given a COUNT of 3 and process 1 one of 2"),
        (((2, 0), (3, 2)), "process 0 was given a COUNT of 2 and process 2 one of 3"),
        (((3, 0), (3, 1), (3, 1)), "two processes were given the INDEX 1"),
    ],
)
def test_processes_that_disagree_are_all_given_the_same_reason(places, complaint):
    found = outcomes(*places)
    assert all(isinstance(error, UserError) for error in found), found
    assert len(set(map(str, found))) == 1
    assert complaint in str(found[0])


def test_one_that_does_not_come_is_waited_for_until_the_timeout():
    assert [type(error) for error in outcomes((3, 0), (3, 1), timeout=1)] == [TimeoutError] * 2
    assert [type(error) for error in outcomes((2, 1), timeout=1)] == [TimeoutError]


def test_a_process_that_was_stopped_and_started_again_is_not_taken_for_two():
    port = free_port()
    stopped = threading.Timer(0.3, lambda: _connect_and_go(port, b"3,1\n"))
    found = []
    third = threading.Timer(1.0, lambda: found.extend(outcomes((3, 2), port=port)))  # the first two are not all three
    again = threading.Timer(1.5, lambda: found.extend(outcomes((3, 1), port=port)))
    for timer in (stopped, third, again):
        timer.start()
    assert outcomes((3, 0), port=port) == [None]
    third.join()
    again.join()
    assert found == [None, None]


def _connect_and_go(port, content):
    with socket.create_connection(("localhost", port)) as connection:
        connection.sendall(content)


@pytest.mark.parametrize("content", [b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe", b"2,1,7", b""])
def test_a_stranger_at_the_port_is_ignored(content):
    port = free_port()

    def visit():
        while True:
            try:
                with socket.create_connection(("localhost", port)) as connection:
                    connection.sendall(content)
                    connection.shutdown(socket.SHUT_WR)
                    assert connection.recv(100) == b""
                    return
            except ConnectionRefusedError:
                continue

    stranger = threading.Thread(target=visit)
    stranger.start()
    late = threading.Timer(0.5, lambda: found.extend(outcomes((2, 1), port=port)))
    found = []
    late.start()
    assert outcomes((2, 0), port=port) == [None]
    late.join()
    stranger.join()
    assert found == [None]
