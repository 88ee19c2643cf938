"""The network's authority: clients believe it, and it alone, about two names."""

import asyncio
import contextlib
import ssl
import stat
import time
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from fallow.domain.errors import ConfigError
from fallow.domain.network import BUS_NAME, REGISTRAR_NAME
from fallow.private_file import write_durably
from fallow.trust import certificates
from fallow.trust.certificates import (
    SERVER_LIFE_S,
    Certificate,
    _usage,
    client_context,
    load_authority,
    load_or_create_authority,
    new_authority,
    server_certificate,
    server_context,
    write_private,
)

NOW_S = time.time()
AUTHORITY = new_authority("home", NOW_S)


def dial(folder: Path, served: Certificate, trusted: str, name: str) -> str:
    """The TLS version between a server with `served`, and a client that trusts `trusted` and asks for `name`."""
    write_private(folder / "c.pem", served.certificate_pem)
    write_private(folder / "k.pem", served.key_pem)

    async def main() -> str:
        async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        context = server_context(folder / "c.pem", folder / "k.pem")
        server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        try:
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=client_context(trusted), server_hostname=name
            )
            version = str(writer.get_extra_info("ssl_object").version())
            writer.close()
            return version
        finally:
            server.close()

    return asyncio.run(main())


@pytest.mark.parametrize("name", [REGISTRAR_NAME, BUS_NAME])
def test_a_server_is_believed_by_its_name_whatever_its_address(name: str, tmp_path: Path) -> None:
    served = server_certificate(AUTHORITY, name, NOW_S)
    assert dial(tmp_path, served, AUTHORITY.certificate_pem, name) == "TLSv1.3"


def test_httpx_checks_the_name_that_it_is_told(tmp_path: Path) -> None:
    served = server_certificate(AUTHORITY, REGISTRAR_NAME, NOW_S)
    write_private(tmp_path / "c.pem", served.certificate_pem)
    write_private(tmp_path / "k.pem", served.key_pem)

    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            await writer.drain()
            writer.close()

        context = server_context(tmp_path / "c.pem", tmp_path / "k.pem")
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with httpx.AsyncClient(verify=client_context(AUTHORITY.certificate_pem), trust_env=False) as client:
            got = await client.get(url, extensions={"sni_hostname": REGISTRAR_NAME})
            assert got.status_code == 204
            for extensions in ({"sni_hostname": BUS_NAME}, {}):
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await client.get(url, extensions=extensions)
        server.close()

    asyncio.run(main())


def forged(name: str, issuer: Certificate, *, ca: bool = False) -> Certificate:
    """What somebody who holds the issuer's key could sign, whatever our own functions refuse."""
    signer = load_pem_private_key(issuer.key_pem.encode(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    made = server_certificate(new_authority("x", NOW_S), BUS_NAME, NOW_S)
    template = x509.load_pem_x509_certificate(made.certificate_pem.encode())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    public = template.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(x509.load_pem_x509_certificate(issuer.certificate_pem.encode()).subject)
        .public_key(public)
        .serial_number(1)
        .not_valid_before(template.not_valid_before_utc)
        .not_valid_after(template.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(_usage(signs_certificates=ca), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM).decode()
    return Certificate(pem, made.key_pem)


@pytest.mark.parametrize(
    ("why", "served", "name"),
    [
        (
            "signature failure|unable to get local issuer",
            server_certificate(new_authority("home", NOW_S), BUS_NAME, NOW_S),
            BUS_NAME,
        ),
        ("Hostname mismatch", server_certificate(AUTHORITY, REGISTRAR_NAME, NOW_S), BUS_NAME),
        ("expired", server_certificate(AUTHORITY, BUS_NAME, NOW_S - 2 * SERVER_LIFE_S), BUS_NAME),
        ("not yet valid", server_certificate(AUTHORITY, BUS_NAME, NOW_S + 10 * 86_400), BUS_NAME),
        ("permitted subtree violation", forged("example.com", AUTHORITY), "example.com"),
    ],
)
def test_other_servers_are_refused(why: str, served: Certificate, name: str, tmp_path: Path) -> None:
    """Of another authority, with another name of ours, out of time, and with a name of the world by our authority."""
    with pytest.raises(ssl.SSLCertVerificationError, match=why):
        dial(tmp_path, served, AUTHORITY.certificate_pem, name)


def test_nothing_below_the_authority_signs_anything(tmp_path: Path) -> None:
    middle = forged("fallow-bus", AUTHORITY, ca=True)
    leaf = forged(BUS_NAME, middle)
    chain = Certificate(leaf.certificate_pem + middle.certificate_pem, leaf.key_pem)
    with pytest.raises(ssl.SSLCertVerificationError, match="path length constraint exceeded"):
        dial(tmp_path, chain, AUTHORITY.certificate_pem, BUS_NAME)


def test_a_client_gives_a_name_or_gets_nowhere(tmp_path: Path) -> None:
    context = client_context(AUTHORITY.certificate_pem)
    assert context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert len(context.get_ca_certs()) == 1, "no authority of the system's"


def test_the_authority_is_made_once_and_its_key_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    first = load_or_create_authority(folder, "home", NOW_S)
    assert load_or_create_authority(folder, "home", NOW_S) == first
    assert stat.S_IMODE((folder / "authority.key").stat().st_mode) == 0o600
    assert "PRIVATE" not in repr(first)
    (folder / "authority.pem").unlink()
    for load in (lambda: load_or_create_authority(folder, "home", NOW_S), lambda: load_authority(folder)):
        with pytest.raises(ConfigError, match=r"incomplete.*restore both files"):
            load()
    assert (folder / "authority.key").read_text() == first.key_pem, "a key is overwritten by nobody"


class Killed(BaseException):
    """Nothing goes on after it."""


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_founding_that_is_killed_goes_on_and_no_key_lacks_its_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    left = iter(range(writes))

    def dying(path: Path, data: bytes) -> None:
        if next(left, None) is None:
            raise Killed
        write_durably(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(certificates, "write_durably", dying)
        with contextlib.suppress(Killed):
            load_or_create_authority(tmp_path, "home", NOW_S)
    if (tmp_path / "authority.pem").exists() and not (tmp_path / "authority.key").exists():
        with pytest.raises(ConfigError, match="incomplete"):  # as a founded network, it would have lost its key
            load_authority(tmp_path)
    made = load_or_create_authority(tmp_path, "home", NOW_S)
    server_certificate(made, REGISTRAR_NAME, NOW_S)
    assert load_authority(tmp_path) == made


def test_what_cannot_be_used_is_named() -> None:
    with pytest.raises(ConfigError, match="one of"):
        server_certificate(AUTHORITY, "example.com", NOW_S)
    other = new_authority("home", NOW_S)
    for broken in (
        Certificate("", AUTHORITY.key_pem),
        Certificate(AUTHORITY.certificate_pem, "x"),
        Certificate(AUTHORITY.certificate_pem, other.key_pem),
    ):
        with pytest.raises(ConfigError, match="authority"):
            server_certificate(broken, BUS_NAME, NOW_S)
    for pem in (
        "",
        "nonsense",
        AUTHORITY.certificate_pem + other.certificate_pem,
        "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n",
    ):
        with pytest.raises(ConfigError, match="authority"):
            client_context(pem)
