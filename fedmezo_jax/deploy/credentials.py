"""Certificates and keys of a deployment: an authority, a server certificate, keys of nodes and keys that sign."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from fedmezo_jax.errors import UserError
from fedmezo_jax.run.signatures import ServerKeys

DAYS = 30
"""How long a certificate is valid."""


def _write(file: Path, content: bytes) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(content)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _certificate(subject: str, key: ec.EllipticCurvePrivateKey, issuer: str) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    name, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, issuer))
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(by).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(minutes=5))
    return builder.not_valid_after(now + datetime.timedelta(days=DAYS))


def make_certificates(folder: Path, host: str) -> None:
    """Writes ``ca.crt``, ``server.crt`` and ``server.key``; the authority's own key is not kept.

    Args:
        folder: where they go.
        host: name or IP address under which clients reach the server.
    """
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    subject = "fedmezo_jax authority"
    known = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    root = _certificate(subject, authority, subject).add_extension(x509.BasicConstraints(True, 0), critical=True)
    root = root.add_extension(usage, critical=True).add_extension(known, critical=False)
    try:
        place = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        place = x509.DNSName(host)
    leaf = _certificate("fedmezo_jax server", server, subject)
    leaf = leaf.add_extension(x509.SubjectAlternativeName([place]), critical=False)
    leaf = leaf.add_extension(x509.BasicConstraints(False, None), critical=True)
    issued_by = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(known)
    leaf = leaf.add_extension(issued_by, critical=False)
    for name, builder in (("ca.crt", root), ("server.crt", leaf)):
        signed = builder.sign(authority, hashes.SHA384())
        _write(folder / name, signed.public_bytes(serialization.Encoding.PEM))
    _write(folder / "server.key", _pem(server))


def make_node_key(file: Path) -> None:
    """Writes a node's private key into the file, and its public key beside it as ``.pub``."""
    write_key(file, ec.generate_private_key(ec.SECP384R1()))


def write_key(file: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> None:
    """Writes a private key into the file, and its public key beside it as ``.pub``, as ``ssh-keygen`` does."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    _write(file, key.private_bytes(encoding, form, serialization.NoEncryption()))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(file.with_suffix(".pub"), public + b"\n")


def read_signing_key(file: Path) -> ed25519.Ed25519PrivateKey:
    """The private key with which a party of a signed run signs.

    Raises:
        UserError: the file cannot be read, or holds another key.
    """
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UserError(f"{file}: holds no private key without a passphrase: make one with ssh-keygen -t ed25519")
    return key


def read_server_keys(private: Path, clients: Sequence[Path]) -> ServerKeys:
    """What the server of a signed run has of the keys.

    Args:
        private: file of its private key.
        clients: files of the clients' public keys, by client.

    Raises:
        UserError: a file cannot be read, or holds another key.
    """
    key = read_signing_key(private)
    return ServerKeys(key, b"".join([key.public_key().public_bytes_raw(), *map(read_public_key, clients)]))


def read_public_key(file: Path) -> bytes:
    """The public key of a party that signs, from its ``.pub`` file.

    Raises:
        UserError: the file cannot be read, or holds another key.
    """
    try:
        key = serialization.load_ssh_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UserError(f"{file}: holds no public key of ssh-keygen -t ed25519: give the .pub file")
    return key.public_bytes_raw()
