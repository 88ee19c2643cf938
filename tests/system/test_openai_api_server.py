"""The server itself: binding, closing with answers under way, and its own part of the time of a token."""

import asyncio
import signal
import time

import httpx
import pytest

from fallow.domain.errors import ConfigError
from fallow.gateway.server import ServerLimits, serve
from tests.unit.gateway.gateway_world import MODEL, app_of, run, saying, until, world

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}


def test_port_is_reported_and_a_taken_one_refused() -> None:
    async def scenario() -> None:
        async with world() as here:
            assert here.server.port > 0
            assert here.server.url == f"http://127.0.0.1:{here.server.port}"
            with pytest.raises(ConfigError, match="Cannot listen"):
                await serve(here.app, "127.0.0.1", here.server.port)
        with pytest.raises(ConfigError):
            await serve(app_of()[1], "no such host.invalid", 0)

    run(scenario())


def test_signal_handlers_stay_the_process_s_own() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    async def scenario() -> None:
        async with world():
            # asyncio.run has its own SIGINT handler while it runs; the server must not replace that either.
            assert signal.getsignal(signal.SIGTERM) == before[1]
            assert "uvicorn" not in repr(signal.getsignal(signal.SIGINT))

    run(scenario())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_closing_ends_running_answers_after_a_grace_and_frees_them() -> None:
    async def scenario() -> None:
        async with world(saying("word " * 30), decode_s=0.2, server_limits=ServerLimits(shutdown_s=1)) as here:
            async with httpx.AsyncClient(timeout=10) as http:
                asking = asyncio.create_task(http.post(f"{here.base_url}/chat/completions", json=CHAT))
                await until(lambda: here.source.open_count == 1)
                started_s = time.monotonic()
                await here.server.close()
                assert time.monotonic() - started_s < 4
                await asyncio.wait([asking])
                asking.exception()
            await until(lambda: here.source.open_count == 0)
            assert [each.kept for each in here.source.closed] == [False]
            await here.server.close()

    run(scenario())


def test_tokens_arrive_as_they_are_made_and_cost_little() -> None:
    """Goal: under 1 ms of this process's time a token, client and predictor included; about 0.25 ms is usual."""

    async def scenario() -> tuple[int, float]:
        async with world(saying("a b c d e " * 15)) as here, httpx.AsyncClient(timeout=10) as http:
            url = f"{here.base_url}/chat/completions"
            await http.post(url, json=CHAT)
            events = 0
            started_s = time.process_time()
            async with http.stream("POST", url, json=CHAT | {"stream": True}) as reply:
                async for line in reply.aiter_lines():
                    events += line.startswith("data:")
            return events, time.process_time() - started_s

    events, spent_s = run(scenario())
    assert events > 70
    assert spent_s / events < 1e-3
