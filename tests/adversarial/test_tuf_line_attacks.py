"""Attacks on the way between a device and the registrar that serves the council's documents.

The real client over real HTTPS to a server of the attacker. The server's certificate is the network's own, as a
captured registrar's is, unless the test says otherwise.
"""

import contextlib
import gzip
import http.server
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tuf.api.metadata import MetaFile

from fallow.domain.errors import CharterInvalid, CharterUnavailable
from fallow.domain.network import BUS_NAME, REGISTRAR_NAME
from fallow.trust.certificates import Certificate, new_authority, server_certificate
from fallow.trust.council.client import CharterClient
from fallow.trust.council.fetch import FETCH_MAX_BYTES, HttpFetcher
from tests.adversarial.council_world import MODEL, NETWORK, ONLINE, Forger, World

CHECK_TIMEOUT_S = 60.0
HURRIED_TIMEOUT_S = 0.5
"""Of the checks whose time runs out."""
BOUND_S = 20.0
"""What a check may take at most that must end after `HURRIED_TIMEOUT_S`, on however loaded a machine; without a
bound it would take ten minutes."""

Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes | None], None]
"""How a server answers: with the handler and the honest content, `None` for 404."""


@pytest.fixture(scope="module")
def authority() -> Certificate:
    return new_authority("home", time.time())


def honest(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
    if content is None:
        handler.send_error(404)
        return
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


class Server:
    """HTTPS on a port of 127.0.0.1, answering as the test says."""

    def __init__(self, world: World, certificate: Certificate, folder: Path) -> None:
        self.answer: Answer = honest
        self.asked: list[str] = []
        self.stopping = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                path = self.path.removeprefix("/tuf/")
                outer.asked.append(path)
                file = world.served / path
                with contextlib.suppress(OSError):  # the device hung up
                    outer.answer(self, file.read_bytes() if file.is_file() else None)

            def log_message(self, *_: object) -> None: ...

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        paths = (folder / "server.pem", folder / "server.key")
        paths[0].write_text(certificate.certificate_pem)
        paths[1].write_text(certificate.key_pem)
        context.load_cert_chain(*paths)
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self.http.server_address[1]}/tuf/"
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.stopping.set()
        self.http.shutdown()
        self.http.server_close()
        self._thread.join()


class Line:
    """A world, a server, and a device that knows the server's address."""

    def __init__(self, world: World, authority: Certificate, certificate: Certificate) -> None:
        self.world = world
        self.authority_pem = authority.certificate_pem
        self.server = Server(world, certificate, world.folder)
        self.hurry(CHECK_TIMEOUT_S)

    def hurry(self, check_timeout_s: float) -> None:
        """The device starts again, with this much patience."""
        self.fetcher = HttpFetcher([self.server.url], self.authority_pem, check_timeout_s, check_timeout_s)
        root = self.world.repository.first_root()
        self.client = CharterClient(root, NETWORK, self.world.folder / "remote", self.fetcher)

    def check(self) -> frozenset[str]:
        return frozenset(self.client.check(self.world.now)[0].models)

    def close(self) -> None:
        self.fetcher.close()
        self.server.close()


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return World(tmp_path_factory.mktemp("founded")).folder


@pytest.fixture
def world(founded: Path, tmp_path: Path) -> World:
    shutil.copytree(founded, tmp_path, dirs_exist_ok=True)
    return World(tmp_path)


@pytest.fixture
def line(world: World, authority: Certificate) -> Iterator[Line]:
    made = Line(world, authority, server_certificate(authority, REGISTRAR_NAME, time.time()))
    yield made
    made.close()


def test_an_honest_line(line: Line) -> None:
    """No attack: the same client and server as in all the others."""
    assert line.check() == {MODEL}
    line.server.asked.clear()
    line.world.renew()
    assert line.check() == {MODEL}
    assert line.server.asked == ["metadata/2.root.json", "metadata/timestamp.json", "halts.bin"]


def test_endless_data(line: Line) -> None:
    """
    Attack: the answer never ends.
    Expected: `CharterInvalid` as soon as more came than a timestamp can have.
    Unharmed: memory and time; the next honest answer is believed.
    """
    line.check()
    sent = 0

    def endless(handler: http.server.BaseHTTPRequestHandler, _: bytes | None) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        while not line.server.stopping.is_set():
            sent += handler.wfile.write(b"a" * 65536)

    line.server.answer = endless
    with pytest.raises(CharterInvalid):
        line.check()
    line.server.answer = honest
    line.world.renew()
    assert line.check() == {MODEL}
    assert sent < 64 << 20  # what fits into buffers, and no more


def test_endless_data_that_was_announced(line: Line) -> None:
    """
    Attack: with the stolen online key, the timestamp says that the snapshot has a terabyte, and then it comes.
    Expected: `CharterInvalid`: our own bound holds whatever the metadata claims.
    Unharmed: memory; the bound is `FETCH_MAX_BYTES`.
    """
    line.check()
    Forger(line.world, ONLINE).timestamp(MetaFile(99, 1 << 40, {"sha256": "0" * 64}))
    piece = b"a" * (1 << 20)

    def endless(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
        if "snapshot" not in handler.path:
            honest(handler, content)
            return
        handler.send_response(200)
        handler.end_headers()
        for _ in range(2 * FETCH_MAX_BYTES // len(piece)):
            handler.wfile.write(piece)

    line.server.answer = endless
    with pytest.raises(CharterInvalid) as refusal:
        line.check()
    assert "bytes came" in refusal.value.message


@pytest.mark.parametrize("pause_s", [0.05, 60.0], ids=["a byte at a time", "silence"])
def test_slow_retrieval(line: Line, pause_s: float) -> None:
    """
    Attack: the answer trickles in, a byte at a time, so that no single wait is long; or it never begins.
    Expected: `CharterUnavailable` when the check's time is over.
    Unharmed: the thread that checks; the next honest answer is believed.
    """
    line.check()

    def slow(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "10000")
        handler.end_headers()
        for _ in range(10_000):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            if line.server.stopping.wait(pause_s):
                return

    line.server.answer = slow
    line.hurry(HURRIED_TIMEOUT_S)
    began = time.monotonic()
    with pytest.raises(CharterUnavailable, match=r"in time|within"):
        line.check()
    assert time.monotonic() - began < BOUND_S
    line.hurry(CHECK_TIMEOUT_S)
    line.server.answer = honest
    line.world.renew()
    assert line.check() == {MODEL}


def test_a_compressed_bomb(line: Line) -> None:
    """
    Attack: a small compressed answer that unpacks to 64 MB.
    Expected: `CharterInvalid`: nothing is unpacked.
    Unharmed: the next honest answer is believed.
    """
    line.check()
    bomb = gzip.compress(b" " * (8 << 20))

    def compressed(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(bomb)))
        handler.end_headers()
        handler.wfile.write(bomb)

    line.server.answer = compressed
    with pytest.raises(CharterInvalid):
        line.check()
    line.server.answer = honest
    line.world.renew()
    assert line.check() == {MODEL}


def test_a_redirection(line: Line) -> None:
    """
    Attack: the answer sends the device elsewhere, to make it call an address inside of its own network.
    Expected: `CharterUnavailable`; the device follows nobody.
    Unharmed: whatever is at that address.
    """
    line.check()
    line.server.asked.clear()

    def elsewhere(handler: http.server.BaseHTTPRequestHandler, content: bytes | None) -> None:
        handler.send_response(302)
        handler.send_header("Location", "/tuf/secret")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    line.server.answer = elsewhere
    with pytest.raises(CharterUnavailable, match="302"):
        line.check()
    assert "secret" not in line.server.asked


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_registrar_that_hides(line: Line, status: int) -> None:
    """
    Attack: the registrar answers with errors.
    Expected: `CharterUnavailable`: nothing is extended, and nothing is taken for false.
    Unharmed: the next honest answer is believed.
    """
    line.check()
    line.server.answer = lambda handler, _: handler.send_error(status)
    with pytest.raises(CharterUnavailable):
        line.check()
    line.server.answer = honest
    line.world.renew()
    assert line.check() == {MODEL}


def test_a_server_of_another_authority(world: World, authority: Certificate) -> None:
    """
    Attack: somebody on the line answers with a certificate of their own authority, which names the registrar.
    Expected: `CharterUnavailable`: only the network's authority counts.
    Unharmed: no request was answered.
    """
    stranger = new_authority("home", time.time())
    line = Line(world, authority, server_certificate(stranger, REGISTRAR_NAME, time.time()))
    try:
        with pytest.raises(CharterUnavailable):
            line.check()
        assert line.server.asked == []
    finally:
        line.close()


def test_the_bus_answers_for_the_registrar(world: World, authority: Certificate) -> None:
    """
    Attack: a captured bus server, whose certificate is of the same authority, answers as the registrar.
    Expected: `CharterUnavailable`: the name in it is the bus's.
    Unharmed: no request was answered.
    """
    line = Line(world, authority, server_certificate(authority, BUS_NAME, time.time()))
    try:
        with pytest.raises(CharterUnavailable):
            line.check()
        assert line.server.asked == []
    finally:
        line.close()


def test_a_dead_address_before_a_good_one(line: Line) -> None:
    """No attack: the registrar moved, and the first address that the device knows is nobody's."""
    fetcher = HttpFetcher(["https://127.0.0.1:1/tuf/", line.server.url], line.authority_pem)
    client = CharterClient(line.world.repository.first_root(), NETWORK, line.world.folder / "other", fetcher)
    try:
        assert client.check(line.world.now)[0].models == {MODEL}
    finally:
        fetcher.close()
