"""Slow and greedy clients, with raw sockets: they are dropped in bounded time, and a neighbour is served meanwhile."""

import asyncio
import json

import httpx

from fallow.gateway.api import ApiLimits
from fallow.gateway.server import ServerLimits
from tests.unit.gateway.gateway_world import MODEL, World, run, saying, until, world

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
FAST = ServerLimits(header_timeout_s=0.5, read_stall_s=0.3, shutdown_s=1, max_connections=8)
FAR_TOO_LONG_S = 5.0


async def neighbour_is_served(here: World) -> None:
    async with httpx.AsyncClient(timeout=FAR_TOO_LONG_S) as http:
        reply = await http.post(f"{here.base_url}/chat/completions", json=CHAT)
    assert reply.json()["choices"][0]["message"]["content"] == "fine"


async def everything_sent_back(reader: asyncio.StreamReader) -> bytes:
    """Whatever comes until the server closes."""
    async with asyncio.timeout(FAR_TOO_LONG_S):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


async def connect(here: World, first: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", here.server.port)
    writer.write(first)
    return reader, writer


def test_headers_that_never_end_are_dropped() -> None:
    async def scenario() -> list[bytes]:
        async with world(saying("fine"), server_limits=FAST) as here:
            starts = (b"", b"POST /v1/chat", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
            clients = [await connect(here, start) for start in starts]

            async def drip(writer: asyncio.StreamWriter) -> None:
                for _ in range(100):
                    writer.write(b"X-A: b\r\n")
                    await asyncio.sleep(0.02)

            dripping = asyncio.create_task(drip(clients[2][1]))
            await neighbour_is_served(here)
            answers = await asyncio.gather(*(everything_sent_back(reader) for reader, _ in clients))
            dripping.cancel()
            for _, writer in clients:
                writer.close()
            return answers

    for answer in run(scenario()):
        assert answer.startswith(b"HTTP/1.1 408 ") or answer == b""


def test_second_request_on_a_kept_connection_has_its_own_time() -> None:
    async def scenario() -> bytes:
        async with world(saying("fine"), server_limits=FAST) as here:
            reader, writer = await connect(here, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.8)  # longer than the time for headers: an idle kept connection is fine
            writer.write(b"GET /health HTTP/1.1\r\n")
            rest = await everything_sent_back(reader)
            writer.close()
            return rest

    assert b"HTTP/1.1 408 " in run(scenario())


def test_body_that_never_ends_is_dropped_and_counted() -> None:
    async def scenario() -> bytes:
        limits = ApiLimits(body_timeout_s=0.3)
        async with world(saying("fine"), limits=limits, server_limits=FAST) as here:
            reader, writer = await connect(
                here, b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{"model"'
            )
            await neighbour_is_served(here)
            answer = await everything_sent_back(reader)
            writer.close()
            assert here.source.open_count == 0
            assert b'status="408"} 1.0' in here.metrics.exposition()
            return answer

    answer = run(scenario())
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] == "invalid_request_error"


def test_headers_beyond_the_limit_are_refused() -> None:
    async def scenario() -> bytes:
        async with world(saying("fine"), server_limits=FAST) as here:
            reader, writer = await connect(here, b"GET /health HTTP/1.1\r\nX-A: " + b"a" * 100_000)
            answer = await everything_sent_back(reader)
            writer.close()
            await neighbour_is_served(here)
            return answer

    answer = run(scenario())
    assert answer.startswith(b"HTTP/1.1 400 ") or answer == b""


def test_garbage_is_refused() -> None:
    async def scenario() -> bytes:
        async with world(saying("fine"), server_limits=FAST) as here:
            reader, writer = await connect(here, bytes(range(256)) * 10 + b"\r\n\r\n")
            answer = await everything_sent_back(reader)
            writer.close()
            await neighbour_is_served(here)
            return answer

    assert run(scenario()).startswith(b"HTTP/1.1 400 ")


def test_more_connections_than_allowed_get_an_answer() -> None:
    async def scenario() -> bytes:
        limits = ServerLimits(max_connections=2, shutdown_s=1)
        async with world(saying("fine"), server_limits=limits) as here:
            held = [await connect(here), await connect(here)]
            await until(lambda: len(here.server._server.server_state.connections) == 2)
            reader, writer = await connect(here, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = await everything_sent_back(reader)
            for _, each in [*held, (reader, writer)]:
                each.close()
            await until(lambda: not here.server._server.server_state.connections)
            await neighbour_is_served(here)
            return answer

    answer = run(scenario())
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: " in answer


def test_client_that_does_not_read_is_dropped_and_its_conversation_freed() -> None:
    async def scenario() -> None:
        # Log-probabilities make chunks of several kilobytes, so that the socket's buffers fill within one answer.
        async with world(server_limits=FAST) as here:
            body = json.dumps(
                CHAT
                | {"temperature": 1, "seed": 2, "stream": True, "max_tokens": 200}
                | {"n": 16, "logprobs": True, "top_logprobs": 20, "logit_bias": {"1": -100}}
            ).encode()
            _reader, writer = await connect(here)
            writer.transport.pause_reading()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await until(lambda: here.source.open_count > 0)
            await until(lambda: here.source.open_count == 0, timeout_s=20)
            assert not any(each.kept for each in here.source.closed)
            writer.transport.abort()

    run(scenario())
