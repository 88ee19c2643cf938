"""The network's own certificate authority, and the certificates of its two servers.

Rules
- The authority is an ECDSA P-256 key that signs server certificates for `REGISTRAR_NAME` and `BUS_NAME` only: its own
  certificate says so (name constraints), and that nothing below it signs anything (path length 0).
- Clients trust this authority alone, and check the name whatever the address is. They give the name when they connect
  (`server_hostname`); without one there is no connection.
- Server certificates are short-lived and made anew at each start by whoever holds the authority's key. Nothing is
  revoked here: a stolen server key is good until its certificate ends.
- TLS 1.3 only: both ends are ours.
"""

import datetime
import ipaddress
import ssl
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fallow.domain.errors import ConfigError
from fallow.domain.network import BUS_NAME, REGISTRAR_NAME
from fallow.private_file import write_durably

AUTHORITY_LIFE_S: Final = 20 * 365 * 86_400.0
SERVER_LIFE_S: Final = 90 * 86_400.0
EARLIER_S: Final = 86_400.0
"""Certificates begin that long before they are made, for clients whose clocks are behind."""
SERVER_NAMES: Final = (REGISTRAR_NAME, BUS_NAME)


class Certificate(msgspec.Struct, frozen=True):
    """A certificate and its private key, in PEM. Do not print it."""

    certificate_pem: str
    key_pem: str

    def __repr__(self) -> str:
        return "Certificate(…)"


def new_authority(network: str, now_unix_s: float) -> Certificate:
    """A network's authority. `network` is its name, for people."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Fallow {network}"[:64])])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    permitted = [x509.DNSName(name) for name in SERVER_NAMES]
    # A list that permits names of one kind leaves the other kinds open: addresses are closed by themselves.
    everywhere = [x509.IPAddress(ipaddress.ip_network(block)) for block in ("0.0.0.0/0", "::/0")]
    certificate = (
        _builder(subject, subject, key.public_key(), now_unix_s, AUTHORITY_LIFE_S)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.NameConstraints(permitted_subtrees=permitted, excluded_subtrees=everywhere), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(certificate, key)


def server_certificate(
    authority: Certificate, name: str, now_unix_s: float, life_s: float = SERVER_LIFE_S
) -> Certificate:
    """A certificate for one of `SERVER_NAMES`, with a key of its own. Raises `ConfigError` for another name, or an
    authority that cannot be read."""
    if name not in SERVER_NAMES:
        raise ConfigError(f"expected one of {', '.join(SERVER_NAMES)}, got {name!r}")
    try:
        issuer = x509.load_pem_x509_certificate(authority.certificate_pem.encode())
        signer = load_pem_private_key(authority.key_pem.encode(), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the network's authority cannot be read: {error}") from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != issuer.public_key():
        raise ConfigError("the network's authority and its key do not belong together")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(subject, issuer.subject, key.public_key(), now_unix_s, life_s)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return _pem(certificate, key)


def load_or_create_authority(folder: Path, network: str, now_unix_s: float) -> Certificate:
    """The authority kept in `folder`; a new one where there is no key. For a network that is being founded: nobody
    knows a certificate yet whose key is not there.

    The key is written last, so that a founding that was cut short goes on. Raises `ConfigError` for a key without its
    certificate, which is not overwritten.
    """
    public, private = _authority_files(folder)
    if not private.exists():
        made = new_authority(network, now_unix_s)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(public, made.certificate_pem)
        write_private(private, made.key_pem)
    return load_authority(folder)


def load_authority(folder: Path) -> Certificate:
    """The authority kept in `folder` as `authority.pem` and `authority.key` (mode 0600).

    Raises `ConfigError` when one of the two is missing.
    """
    public, private = _authority_files(folder)
    try:
        return Certificate(public.read_text(encoding="ascii"), private.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the network's authority in {folder} is incomplete ({error}): restore both files, or, if the network was "
            "never founded, delete both"
        ) from None


def _authority_files(folder: Path) -> tuple[Path, Path]:
    return folder / "authority.pem", folder / "authority.key"


def client_context(authority_pem: str) -> ssl.SSLContext:
    """For clients: trusts that authority and no other, and checks the name given as `server_hostname`.

    Raises `ConfigError` for what is no certificate.
    """
    # Not `create_default_context`: for an empty text it would trust every authority of the system.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        context.load_verify_locations(cadata=authority_pem)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"the network's authority cannot be read: {error}") from None
    if len(context.get_ca_certs()) != 1:
        raise ConfigError("expected one certificate of the network's authority")
    return context


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """For a server of ours, from its two PEM files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    return context


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, in place of whatever was there."""
    write_durably(path, text.encode("ascii"))


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now_unix_s: float, life_s: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.fromtimestamp(int(now_unix_s), datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(seconds=EARLIER_S))
        .not_valid_after(now + datetime.timedelta(seconds=life_s))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Certificate:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Certificate(certificate.public_bytes(Encoding.PEM).decode(), private.decode())
