"""Bad requests and rude clients at a running service: each gets its named error, and a neighbour's answer is the same.

What each field may be is tested against the app (test_openai_api_errors.py), and each kind of slow client against the
server (test_openai_api_slow.py); here all of them come at once to a real gateway with a real device behind it.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from fallow.gateway.server import ServerLimits
from fallow.processes.local_service import LocalService
from tests.system.harness import KEYS, MODEL, Answer, OneDevice, ask
from tests.system.hostile import Neighbour, resident_bytes
from tests.system.stalls import Stalls

QUESTION = "Name three colours and say why you like them."
ANSWER_TOKENS = 16
CONTEXT = 8192
ROOMY_TOKENS = 4000
"""More than half of what the device can hold at a time."""
GROWTH_MAX_BYTES = 128 << 20
SLOW_CLIENTS = 60
HUNG_UP_CLIENTS = 16
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
HEADERS_DUE_S = ServerLimits().header_timeout_s


@pytest.fixture(scope="module")
def fleet(one_device: OneDevice) -> LocalService:
    return one_device.lend()


@pytest.fixture(scope="module")
def calm(fleet: LocalService) -> Answer:
    answer = ask(fleet.api_url, QUESTION, ANSWER_TOKENS, KEYS["neighbour"][0])
    assert answer.error is None
    return answer


@pytest.fixture(scope="module")
def before(fleet: LocalService, calm: Answer) -> dict[str, int]:
    return resident_bytes(fleet)


@pytest.fixture(scope="module")
def neighbour(fleet: LocalService, calm: Answer, before: dict[str, int]) -> Iterator[Neighbour]:
    """It streams from the first rude client to the last."""
    with Neighbour(fleet.api_url, KEYS["neighbour"][0], QUESTION, ANSWER_TOKENS, calm) as streaming:
        yield streaming


@pytest.fixture(scope="module")
def stalls(fleet: LocalService) -> Iterator[Stalls]:
    with Stalls() as watching:
        yield watching


@pytest.fixture
def undisturbed(fleet: LocalService, stalls: Stalls, neighbour: Neighbour, before: dict[str, int]) -> Iterator[None]:
    yield
    neighbour.check()
    after = resident_bytes(fleet)
    assert after.keys() == before.keys(), "a process ended or was started"
    assert not [name for name, size in before.items() if after[name] - size > GROWTH_MAX_BYTES]
    logs = "".join(file.read_text(errors="replace") for file in fleet.state_dir.glob("logs/*"))
    assert "Traceback" not in logs
    repairs = [line for line in logs.splitlines() if "repairing after" in line]
    if stalls.counted:  # which may cost a link, and nothing else
        repairs = [line for line in repairs if "is gone (" not in line]
    assert not repairs, f"and the machine stood still for {stalls.longest_s:.2f} s at most"


def encoded(**changes: Any) -> bytes:
    return json.dumps(CHAT | changes).encode()


LONG = {"messages": [{"role": "user", "content": "one two three " * CONTEXT}]}
BAD: dict[str, tuple[bytes, int, str | None, str | None]] = {
    "not JSON": (b'{"model": "x", ', 400, None, None),
    "nothing": (b"", 400, None, None),
    "bytes that are no text": (b"\xff\xfe\x00", 400, None, None),
    "nested 100,000 deep": (b"[" * 100_000, 400, None, None),
    "a list": (b"[1]", 400, None, None),
    "NaN": (encoded()[:-1] + b', "temperature": NaN}', 400, None, "temperature"),
    "infinity": (encoded()[:-1] + b', "top_p": 1e999}', 400, None, "top_p"),
    "a hot temperature": (encoded(temperature=1e9), 400, None, "temperature"),
    "no messages": (encoded(messages=[]), 400, None, "messages"),
    "an unknown model": (encoded(model="gpt-9"), 404, "model_not_found", "model"),
    "a model that is a path": (encoded(model="../../etc/passwd"), 404, "model_not_found", "model"),
    "a prompt beyond the context": (encoded(**LONG), 400, "context_length_exceeded", None),
    "a completion beyond the context": (encoded(max_tokens=CONTEXT), 400, "context_length_exceeded", None),
    "a body of 64 MB": (b" " * (64 << 20), 413, None, None),
}


def test_bad_requests_are_named(fleet: LocalService, undisturbed: None) -> None:
    headers = {"authorization": f"Bearer {KEYS['rude'][0]}"}
    with httpx.Client(base_url=fleet.api_url, headers=headers, timeout=30.0, trust_env=False) as client:
        for name, (body, status, code, param) in BAD.items():
            reply = client.post("/v1/chat/completions", content=body)
            assert reply.status_code == status, (name, reply.text)
            error = reply.json()["error"]
            assert error["message"], name
            assert code in (None, error["code"]), (name, error)
            assert param in (None, error["param"]), (name, error)
        ids = client.post("/v1/completions", json={"model": MODEL, "prompt": [1, 49_152]})
        assert (ids.status_code, ids.json()["error"]["param"]) == (400, "prompt")


WRONG_KEYS = {
    "none": "",
    "empty": "Bearer",
    "made up": "Bearer sk-wrong",
    "its hash": f"Bearer {KEYS['rude'][1]}",
    "another scheme": f"Basic {KEYS['rude'][0]}",
}


@pytest.mark.parametrize("key", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_a_wrong_key_is_refused(fleet: LocalService, undisturbed: None, key: str) -> None:
    """The hash of a key in the configuration file is not a key."""
    headers = {"authorization": key} if key else {}
    for path in ("/v1/models", "/v1/chat/completions"):
        reply = httpx.request(
            "GET" if path == "/v1/models" else "POST",
            fleet.api_url + path,
            content=b"" if path == "/v1/models" else encoded(),
            headers=headers,
            trust_env=False,
        )
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.fixture(scope="module")
def slow_clients(fleet: LocalService, neighbour: Neighbour) -> Iterator["Future[list[tuple[bytes, float]]]"]:
    """60 clients that send a header line now and then, for longer than headers may take; other tests run meanwhile.

    What each of them was answered, and after how many seconds."""
    address = urlsplit(fleet.api_url)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"

    async def slow() -> tuple[bytes, float]:
        began_s = time.monotonic()
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(head)
        answer = asyncio.create_task(reader.read())
        while not answer.done():
            await asyncio.wait([answer], timeout=1.0)
            if not answer.done():
                writer.write(b"X-A: b\r\n")
        writer.close()
        try:
            return answer.result(), time.monotonic() - began_s
        except ConnectionResetError:
            return b"", time.monotonic() - began_s

    async def all_of_them() -> list[tuple[bytes, float]]:
        return await asyncio.gather(*(slow() for _ in range(SLOW_CLIENTS)))

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(asyncio.run, all_of_them())


def test_clients_that_hang_up_free_their_room(fleet: LocalService, slow_clients: object, undisturbed: None) -> None:
    def hang_up(index: int) -> None:
        body = CHAT | {"max_tokens": 2000, "stream": True, "temperature": 1, "seed": index}
        headers = {"authorization": f"Bearer {KEYS['rude'][0]}"}
        with (
            httpx.Client(base_url=fleet.api_url, headers=headers, timeout=60.0, trust_env=False) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as reply,
        ):
            if index % 2:
                next(reply.iter_lines())

    def at_rest(status: Any) -> bool:
        """Only the neighbour's conversation and kept ones, of short answers, are left."""
        return all(gateway.sessions <= 1 for gateway in status.gateways) and all(
            beat.session_count <= 4 for beat in status.nodes
        )

    with ThreadPoolExecutor(HUNG_UP_CLIENTS) as pool:
        list(pool.map(hang_up, range(HUNG_UP_CLIENTS)))
    fleet.wait_for(at_rest, 30.0, "the room of clients that hung up")


def test_slow_clients_are_dropped(slow_clients: "Future[list[tuple[bytes, float]]]", undisturbed: None) -> None:
    for answer, lasted_s in slow_clients.result():
        assert answer.startswith(b"HTTP/1.1 408 ") or answer == b""
        assert HEADERS_DUE_S - 1 < lasted_s < HEADERS_DUE_S + 10


def test_a_kept_conversation_makes_room_for_a_newcomers(fleet: LocalService, undisturbed: None) -> None:
    """A client reserves most of the room, says one sentence, and its cache is kept; another needs as much."""
    for name in ("rude", "newcomer", "rude"):
        question = f"I am {name}. Who are you?"
        answer = ask(fleet.api_url, question, ROOMY_TOKENS, KEYS[name][0], stop=["."])
        assert answer.error is None
        assert answer.pieces
