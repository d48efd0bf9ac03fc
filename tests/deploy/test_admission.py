"""What keeps a client out is said in one line before anything is started, or from the SuperNode's log."""

import json
import socket
import ssl
import threading
from contextlib import contextmanager

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from experiments._deployed_run import check_options
from fedmezo_jax.deploy.admission import check_node_key, check_server, why_refused
from fedmezo_jax.deploy.credentials import make_certificates, make_node_key, write_key
from fedmezo_jax.errors import UserError

ADMITTED, REFUSED = "SuperNode ID: 7\n", "Exit Code: 305\n[code: 2004] Failed to activate SuperNode.\n"


@contextmanager
def server(context):
    """An address at which one connection is taken, with TLS where there is a context."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def take():
            try:
                connection = listener.accept()[0]
                with context.wrap_socket(connection, server_side=True) if context else connection as stream:
                    stream.recv(1000)
                    stream.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            except OSError:
                pass  # the client has seen enough

        thread = threading.Thread(target=take)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.fixture
def certificates(tmp_path):
    """Folders of the server's certificates, and of others for the same and for another host."""
    for name, host in (("own", "127.0.0.1"), ("other", "127.0.0.1"), ("elsewhere", "server.example")):
        (tmp_path / name).mkdir()
        make_certificates(tmp_path / name, host)
    return tmp_path


def tls(folder):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    return context


def test_a_server_is_known_by_its_authority_and_its_host(certificates):
    with server(tls(certificates / "own")) as address:
        assert check_server(address, certificates / "own/ca.crt") is None
    for name, said in (("other", "unable to get local issuer"), ("elsewhere", "IP address mismatch")):
        authority = certificates / ("own" if name == "other" else name) / "ca.crt"
        with server(tls(certificates / name)) as address, pytest.raises(UserError, match=said) as raised:
            check_server(address, authority)
        assert "copy network/ca.crt from the server again" in str(raised.value)


def test_whoever_does_not_speak_tls_is_no_server(certificates):
    with server(None) as address, pytest.raises(UserError, match=f"{address}: .* does not speak TLS"):
        check_server(address, certificates / "own/ca.crt")


def test_a_server_that_is_not_up_may_come(certificates):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    assert check_server(address, certificates / "own/ca.crt").endswith("(Connection refused): trying again")


def test_files_that_are_not_what_they_should_be(certificates):
    write_key(certificates / "signing", Ed25519PrivateKey.generate())
    make_node_key(certificates / "node")
    check_node_key(certificates / "node")
    for name in ("signing", "node.pub", "absent", "own/server.key"):
        with pytest.raises(UserError, match="make one with ssh-keygen -t ecdsa"):
            check_node_key(certificates / name)
        with pytest.raises(UserError, match="holds no certificate"):
            check_server("127.0.0.1:1", certificates / name)


@pytest.mark.parametrize(
    ("earlier", "log", "is_refused"),
    [
        ("", "", False),
        ("", ADMITTED, False),
        ("", 3 * REFUSED, False),  # the server may not have read its key yet
        ("", 4 * REFUSED, True),
        (ADMITTED, REFUSED, False),  # its predecessor may have died a moment ago
        ("", ADMITTED + 14 * REFUSED, False),
        ("", ADMITTED + 15 * REFUSED, True),
        (ADMITTED + 15 * REFUSED, REFUSED, False),
        ("", 14 * REFUSED + ADMITTED + REFUSED, False),
    ],
)
def test_a_supernode_that_was_let_in_before_is_tried_for_long(earlier, log, is_refused):
    assert (why_refused(earlier, log, "host:1") is not None) == is_refused


def test_other_certificates_at_a_running_client():
    line = why_refused("", ADMITTED + "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "host:1")
    assert line == "host:1 has another certificate than at the start: copy network/ca.crt from the server again"


@pytest.mark.parametrize(("name", "switch"), [("exact", "--no-exact"), ("seeded_noise", "--no-seeded-noise")])
def test_a_run_does_not_go_on_with_other_options(name, switch, tmp_path):
    options = {"exact": True, "seeded_noise": True}
    check_options(tmp_path, options)
    (tmp_path / "network").mkdir()
    (tmp_path / "network/settings.json").write_text(json.dumps({"options": options | {"resume": False}}))
    check_options(tmp_path, options)
    with pytest.raises(UserError, match=f"was started otherwise than with {switch}: do as then"):
        check_options(tmp_path, options | {name: False})
