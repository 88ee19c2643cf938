"""More is asked over HTTP than can be answered: fairness, refusals that say when, and clients that hang up."""

import asyncio
import time
from typing import Any

import httpx

from fallow.gateway.keys import ApiKey, new_key
from fallow.gateway.memory import hash_predictor
from fallow.policy.admission import AdmissionRules
from tests.unit.gateway.gateway_world import VOCABULARY, World, run, until, world

HEAVY, LIGHT = new_key(), new_key()
KEYS = (ApiKey(id="heavy", sha256=HEAVY[1]), ApiKey(id="light", sha256=LIGHT[1]))
DECODE_S = 0.01
TOKENS = 20
BODY = {"model": "tiny-chat", "prompt": "a b c", "max_tokens": TOKENS, "logit_bias": {"1": -100}}


def busy_world(**rules: Any) -> Any:
    admission = AdmissionRules(places_first=2, places_min=2, places_max=2, **rules)
    return world(hash_predictor(VOCABULARY), keys=KEYS, admission=admission, decode_s=DECODE_S)


async def ask(http: httpx.AsyncClient, here: World, secret: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret}"}
    return await http.post(f"{here.base_url}/completions", json=BODY, headers=headers, timeout=30)


def shown(here: World, name: str) -> float:
    line = next(line for line in here.metrics.exposition().decode().splitlines() if line.startswith(name + " "))
    return float(line.split()[1])


def test_a_key_that_asks_seldom_is_answered_before_the_queue_of_one_that_asks_much() -> None:
    async def scenario() -> tuple[list[str], list[int]]:
        async with busy_world() as here, httpx.AsyncClient() as http:
            order: list[str] = []

            async def note(name: str, secret: str) -> int:
                reply = await ask(http, here, secret)
                order.append(name)
                return reply.status_code

            tasks = [asyncio.create_task(note("heavy", HEAVY[0])) for _ in range(10)]
            await until(lambda: shown(here, "fallow_waiting_requests") == 8)
            tasks.append(asyncio.create_task(note("light", LIGHT[0])))
            return order, await asyncio.gather(*tasks)

    order, statuses = run(scenario())
    assert statuses == [200] * 11
    assert order.index("light") <= 4, f"behind those that ran, not behind those that waited: {order}"


def test_who_would_wait_too_long_is_told_at_once_when_to_come_again() -> None:
    async def scenario() -> tuple[list[httpx.Response], list[float]]:
        async with busy_world(wait_max_s=0.5) as here, httpx.AsyncClient() as http:
            await ask(http, here, HEAVY[0])  # so that it is known how long answers take
            took_s: list[float] = []

            async def timed() -> httpx.Response:
                began_s = time.monotonic()
                reply = await ask(http, here, HEAVY[0])
                if reply.status_code != 200:
                    took_s.append(time.monotonic() - began_s)
                return reply

            return await asyncio.gather(*(timed() for _ in range(30))), took_s

    replies, took_s = run(scenario())
    refused = [reply for reply in replies if reply.status_code != 200]
    assert {reply.status_code for reply in replies} == {200, 503}
    assert len(refused) >= 10
    for reply in refused:
        error = reply.json()["error"]
        assert (error["code"], error["type"]) == ("overloaded", "server_error")
        assert int(reply.headers["retry-after"]) >= 1
    # 30 answers of 0.2 s on two places take 3 s; nobody may hear "no" only then.
    assert max(took_s) < 1.5


def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue_and_the_fleet_alone() -> None:
    async def scenario() -> tuple[float, int]:
        async with busy_world() as here, httpx.AsyncClient() as http:
            running = [asyncio.create_task(ask(http, here, HEAVY[0])) for _ in range(2)]
            await until(lambda: shown(here, "fallow_active_choices") == 2)
            waiting = asyncio.create_task(ask(http, here, HEAVY[0]))
            await until(lambda: shown(here, "fallow_waiting_requests") == 1)
            waiting.cancel()
            await until(lambda: shown(here, "fallow_waiting_requests") == 0)
            still_running = shown(here, "fallow_active_choices")
            await asyncio.gather(*running)
            await until(lambda: shown(here, "fallow_active_choices") == 0)
            return still_running, len(here.source.closed)

    still_running, opened = run(scenario())
    assert still_running == 2, "it left before the others had ended"
    assert opened == 2, "and its answer was never begun"


def test_a_key_with_too_many_waiting_gets_429_and_others_are_let_in() -> None:
    async def scenario() -> tuple[list[int], int]:
        async with busy_world(waiting_key_max=3) as here, httpx.AsyncClient() as http:
            tasks = [asyncio.create_task(ask(http, here, HEAVY[0])) for _ in range(9)]
            await until(lambda: shown(here, "fallow_waiting_requests") == 3)
            light = await ask(http, here, LIGHT[0])
            return sorted(reply.status_code for reply in await asyncio.gather(*tasks)), light.status_code

    statuses, light = run(scenario())
    assert statuses == [200] * 5 + [429] * 4
    assert light == 200
