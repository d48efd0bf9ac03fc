"""Why a server does not let a client in, in one line for the one who starts the client."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedmezo_jax.deploy.local_network import split_address
from fedmezo_jax.errors import UserError

_ADMITTED, _UNKNOWN, _OTHER_CERTIFICATE = "SuperNode ID:", "[code: 2004]", "CERTIFICATE_VERIFY_FAILED"
"""What a SuperNode's log says when it is let in, has a key that may not come in, and trusts another authority."""
_TRIES, _FIRST_TRIES = 15, 4
"""How often a SuperNode is started that was let in before, and one that was not: the server may be about to."""
_COPY = "copy network/ca.crt from the server again"


def check_server(address: str, authority: Path, seconds: float = 10.0) -> str | None:
    """Whether a server listens at HOST:PORT whose certificate this authority has signed for that host.

    Returns:
        Why it cannot be reached yet, if it cannot.

    Raises:
        UserError: it is another server, or the authority's file holds no certificate.
    """
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError:
        raise UserError(f"--authority {authority}: holds no certificate: {_COPY}") from None
    host, port = split_address(address)
    try:
        with socket.create_connection((host, port), seconds) as connection:
            context.wrap_socket(connection, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        said = error.verify_message.rstrip(".")
        raise UserError(f"{address}: its certificate is not one of --authority {authority} ({said}): {_COPY}") from None
    except ssl.SSLError:
        raise UserError(f"{address}: whoever listens there does not speak TLS: give the server's --address") from None
    except OSError as error:
        return f"{address} cannot be reached yet ({error.strerror or error}): trying again"
    return None


def check_node_key(file: Path) -> None:
    """Checks that a file holds a SuperNode's private key.

    Raises:
        UserError: it does not.
    """
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(
            f"--node-key {file}: holds no private key without a passphrase: make one with ssh-keygen -t ecdsa -b 384"
        )


def why_refused(earlier: str, log: str, address: str) -> str | None:
    """Why a SuperNode is not let in; None while it is, or may still be.

    A server says the same of a key that it does not know and of one whose SuperNode has died without a word, for about
    a minute. Only a SuperNode that was let in before can be such a one: it is started for about two minutes. Another is
    started for half a minute, in which a server that has just begun may read its key.

    Args:
        earlier: its log of earlier commands.
        log: its log of this one.
        address: the server's.
    """
    if _OTHER_CERTIFICATE in log:
        return f"{address} has another certificate than at the start: {_COPY}"
    tries = _TRIES if _ADMITTED in earlier + log else _FIRST_TRIES
    if log.rpartition(_ADMITTED)[2].count(_UNKNOWN) < tries:
        return None
    return (
        f"{address} does not let this client in: have its key's .pub file added to the server's --node-keys; or, if "
        "another SuperNode with this key was running until a moment ago, try again in two minutes"
    )
