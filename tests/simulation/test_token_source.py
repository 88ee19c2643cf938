"""Goal: conversations are opened, kept, reused and freed as the gateway's contract says.

Method: the real token source, chains, links and relays on virtual time; the coordinator is a table on the bus.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from fallow.domain.errors import ContextExceeded, KvExhausted, NoRoute, UnknownModel
from fallow.domain.fleet import Catalogue, ModelEntry, NodeGone, RouteReply, RouteRequest, Subjects
from fallow.domain.ids import Digest, ModelName
from fallow.domain.model import Span
from fallow.gateway.contract import Conversation
from fallow.gateway.sessions import FleetTokenSource
from fallow.models.store import Store
from fallow.simulator.virtual_time import run_virtual
from fallow.trust.open_doors import OpenLease, OpenRoutes
from tests.simulation.sessions import Fleet, toy_manifest

T = TypeVar("T")
A, B, C = Span(0, 2), Span(2, 4), Span(4, 6)
PROMPT = list(range(60))
KV_BYTES_PER_TOKEN_AND_STAGE = 2 * 2 * 16 * 4


async def answer(conversation: Conversation, count: int) -> list[int]:
    tokens = [int((await conversation.prefill()).ids[0])]
    while len(tokens) < count:
        tokens.append(int((await conversation.decode(tokens[-1])).ids[0]))
    return tokens


def with_fleet(
    folder: Path,
    test: Callable[[Fleet, FleetTokenSource, Digest], Awaitable[T]],
    pieces: tuple[Span, ...] = (A, B, C),
    kv_budget_bytes: int = 1 << 30,
) -> T:
    """Run `test` on a fleet of one node a piece, with a coordinator that is a table."""
    store = Store(folder)
    model = store.put_manifest(toy_manifest())

    async def program() -> T:
        fleet = Fleet(model=model, kv_budget_bytes=kv_budget_bytes)
        subjects = Subjects("test")
        coordinator = fleet.fabric.bus("coordinator")
        config = toy_manifest().config
        entry = ModelEntry(
            name=toy_manifest().name,
            model=model,
            manifest_bytes=1,
            config=config,
            quantisation=toy_manifest().quantisation,
            weights_bytes=(1, 1, (1,) * config.layer_count),
            created_unix_s=0,
        )

        async def on_catalogue(_subject: str, _message: bytes) -> bytes:
            foreign = msgspec.structs.replace(entry, name=ModelName("another store's"), model=Digest("f" * 64))
            return msgspec.json.encode(Catalogue(models=(foreign, entry), stores=()))

        async def on_route(_subject: str, message: bytes) -> bytes:
            asked = msgspec.json.decode(message, type=RouteRequest)
            try:
                hops = await fleet.route(
                    asked.model, asked.session, 0, frozenset(asked.exclude), asked.keep, asked.rebuild_tokens
                )
            except NoRoute as error:
                return msgspec.json.encode(RouteReply(error=error.message))
            return msgspec.json.encode(RouteReply(hops=hops))

        await coordinator.subscribe(subjects.catalogue, on_catalogue)
        await coordinator.subscribe(subjects.route(), on_route)
        await fleet.start(*((piece,) for piece in pieces))
        source = FleetTokenSource(
            fleet.fabric.bus("gateway"),
            fleet.peers,
            store,
            fleet.clock,
            subjects,
            origin=fleet.gateway,
            lease=OpenLease(),
            routes=OpenRoutes(),
        )
        fleet.listeners.append(source)
        await source.start()
        while not source.models():
            await asyncio.sleep(0.01)
        assert [manifest.name for manifest in source.models()] == [entry.name], "only what the own store holds"
        result = await test(fleet, source, model)
        await source.close()
        return result

    return run_virtual(program())


def sessions_on(fleet: Fleet) -> list[int]:
    return [node.relay.session_count for node in fleet.nodes]


def test_a_follow_up_turn_reuses_its_own_keys_cache_only(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        first = await source.open(model, PROMPT, 20, 1, "alice")
        tokens = await answer(first, 5)
        await first.close(keep=True)
        follow_up = [*PROMPT, *tokens[:4], 7, 8]
        stranger = await source.open(model, follow_up, 20, 1, "mallory")
        assert stranger.cached_tokens == 0
        expected = await answer(stranger, 3)
        await stranger.close(keep=False)
        second = await source.open(model, follow_up, 20, 1, "alice")
        assert second.cached_tokens == len(PROMPT) + 4
        reused = await answer(second, 3)
        # Rows that were decoded in the first turn stay as they were decoded; the toy engine tells the phases apart.
        assert len(reused) == len(expected) == 3
        await second.close(keep=False)
        await asyncio.sleep(0.1)
        assert sessions_on(fleet) == [0, 0, 0]

    with_fleet(tmp_path, test)


def test_an_identical_prompt_is_served_from_the_cache_but_for_its_last_token(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> tuple[list[int], list[int], int]:
        first = await source.open(model, PROMPT, 20, 1, "alice")
        one = await answer(first, 5)
        await first.close(keep=True)
        second = await source.open(model, PROMPT, 20, 1, "alice")
        two = await answer(second, 5)
        await second.close(keep=False)
        return one, two, second.cached_tokens

    one, two, cached = with_fleet(tmp_path, test)
    assert one == two
    assert cached == len(PROMPT) - 1


def test_hanging_up_frees_the_cache_everywhere(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await source.open(model, PROMPT, 500, 1, "alice")
        task = asyncio.create_task(answer(conversation, 500))
        await asyncio.sleep(0.3)
        assert sessions_on(fleet) == [1, 1, 1]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert sessions_on(fleet) == [0, 0, 0]
        assert all(node.engine.load_now.sessions == 0 for node in fleet.nodes)

    with_fleet(tmp_path, test)


def test_kept_caches_make_room_and_a_full_fleet_refuses_by_name(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        kept = await source.open(model, PROMPT, 20, 1, "alice")
        await answer(kept, 2)
        await kept.close(keep=True)
        live = await source.open(model, list(range(100, 160)), 20, 1, "bob")
        assert await answer(live, 2)
        with pytest.raises(KvExhausted):
            await source.open(model, PROMPT, 20, 1, "carol")
        assert await live.decode(3), "the neighbour goes on"
        await live.close(keep=False)
        await asyncio.sleep(0.1)
        carol = await source.open(model, PROMPT, 20, 1, "carol")
        await carol.close(keep=False)

    with_fleet(tmp_path, test, kv_budget_bytes=100 * KV_BYTES_PER_TOKEN_AND_STAGE)


def test_what_cannot_be_served_is_named(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        with pytest.raises(UnknownModel):
            await source.open(Digest("0" * 64), PROMPT, 1, 1, "alice")
        with pytest.raises(ContextExceeded, match="4096"):
            await source.open(model, list(range(4000)), 97, 1, "alice")
        for node in fleet.nodes:
            node.alive = False
        with pytest.raises(NoRoute, match="nobody holds layer 0"):
            await source.open(model, PROMPT, 20, 1, "alice")

    with_fleet(tmp_path, test)


def test_a_device_reported_gone_is_probed_and_a_live_one_is_kept(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> tuple[int, int]:
        conversation = await source.open(model, PROMPT, 200, 1, "alice")
        task = asyncio.create_task(answer(conversation, 150))
        await asyncio.sleep(0.1)
        rumour = fleet.fabric.bus("coordinator-2")
        gone = Subjects("test").gone
        await rumour.publish(gone, msgspec.json.encode(NodeGone(node=fleet.nodes[1].id, reason="rumour")))
        await asyncio.sleep(0.1)
        after_rumour = conversation.chain.repairs
        fleet.nodes[1].freeze()
        started_s = fleet.clock.monotonic_s()
        await rumour.publish(gone, msgspec.json.encode(NodeGone(node=fleet.nodes[1].id, reason="bus connection")))
        while conversation.chain.repairs == 0:
            await asyncio.sleep(0.01)
        assert fleet.clock.monotonic_s() - started_s < 0.6, "a probe is quicker than the ping's deadline"
        await task
        await conversation.close(keep=False)
        return after_rumour, conversation.chain.repairs

    assert with_fleet(tmp_path, test, pieces=(A, B, C, B)) == (0, 0)


def test_the_devices_compute_the_next_token_while_text_is_written(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await source.open(model, PROMPT, 20, 1, "alice")
        tokens = await answer(conversation, 3)
        last = fleet.nodes[-1].engine

        async def write() -> None:
            before = last.rows_computed
            async with asyncio.timeout(1.0):
                while last.rows_computed == before:
                    await asyncio.sleep(0.001)

        candidates = await conversation.decode(tokens[-1], write)
        assert len(candidates.ids) == 1
        await conversation.close(keep=False)

    with_fleet(tmp_path, test)
