"""Goal: conversations are opened, kept, reused and freed as the gateway's contract says.

Method: the real token source, chains, links and relays on virtual time; the coordinator is a table on the bus.
"""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from fallow.domain.charter import Standing
from fallow.domain.errors import ContextExceeded, GrantRefused, KvExhausted, NoRoute, NotWorking, UnknownModel
from fallow.domain.fleet import Catalogue, Hop, ModelEntry, NodeGone, RouteReply, RouteRequest, Subjects
from fallow.domain.grants import GRANT_LIFE_S
from fallow.domain.ids import Digest, ModelName
from fallow.domain.model import Span
from fallow.gateway.contract import Conversation
from fallow.gateway.progress import STALL_TIMEOUT_S
from fallow.gateway.renewals import RETRY_S
from fallow.gateway.sessions import FleetTokenSource
from fallow.models.store import Store
from fallow.simulator.virtual_time import run_virtual
from fallow.trust.contract import Lease, Routes
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
    lease: Lease | None = None,
    routes: Routes | None = None,
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
            if fleet.replies:
                return fleet.replies.pop(0)
            asked = msgspec.json.decode(message, type=RouteRequest)
            try:
                hops = await fleet.route(
                    asked.model,
                    asked.session,
                    0,
                    frozenset(asked.exclude),
                    asked.keep,
                    asked.rebuild_tokens,
                    asked.spare,
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
            lease=lease or OpenLease(),
            routes=routes or OpenRoutes(),
        )
        fleet.listeners.append(source)
        await source.start()
        while not source.models():
            await asyncio.sleep(0.01)
        assert [manifest.name for manifest in source.models()] == [entry.name], "only what the own store holds"
        try:
            return await test(fleet, source, model)
        finally:
            await source.close()

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


def test_a_live_answer_has_kept_conversations_make_room_for_its_repair(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        fleet.nodes[1].alive = False
        kept = await source.open(model, list(range(100, 160)), 200, 1, "bob")
        await answer(kept, 2)
        await kept.close(keep=True)
        fleet.nodes[1].alive = True
        fleet.nodes[3].engine._kv_budget_bytes = 300 * KV_BYTES_PER_TOKEN_AND_STAGE
        conversation = await source.open(model, PROMPT, 200, 1, "alice")
        task = asyncio.create_task(answer(conversation, 60))
        await asyncio.sleep(0.1)
        assert not task.done()
        began_s = fleet.clock.monotonic_s()
        fleet.nodes[1].kill()
        assert len(await task) == 60
        assert fleet.clock.monotonic_s() - began_s < 2.0
        await conversation.close(keep=False)
        await asyncio.sleep(0.1)
        assert [node.relay.session_count for node in fleet.nodes if node.alive] == [0, 0, 0]

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_device_that_answers_and_computes_nothing_is_done_without(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        calm = await source.open(model, PROMPT, 200, 1, "alice")
        expected = await answer(calm, 60)
        await calm.close(keep=False)
        conversation = await source.open(model, PROMPT, 200, 1, "alice")
        task = asyncio.create_task(answer(conversation, 60))
        await asyncio.sleep(0.1)
        assert not task.done()
        began_s = fleet.clock.monotonic_s()
        fleet.nodes[1].compute_nothing()
        async with asyncio.timeout(10 * STALL_TIMEOUT_S):
            assert await task == expected
        assert fleet.clock.monotonic_s() - began_s < 2 * STALL_TIMEOUT_S + 5, "asked once, then avoided"
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_fleet_that_computes_nothing_is_a_named_error(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await source.open(model, PROMPT, 200, 1, "alice")
        fleet.kept_spans.clear()
        for index in (1, 3):
            fleet.nodes[index].compute_nothing()
        with pytest.raises(NoRoute, match="computed nothing"):
            async with asyncio.timeout(10 * STALL_TIMEOUT_S):
                await answer(conversation, 2)
        assert fleet.kept_spans[:2] == [(A, B, C), (A, C)], "first all is kept, then what does not hold the others up"
        assert set(fleet.kept_spans[2:]) == {()}, "then nothing"
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_a_device_that_takes_grants_and_refuses_the_rows_is_done_without(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        calm = await source.open(model, PROMPT, 200, 1, "alice")
        expected = await answer(calm, 10)
        await calm.close(keep=False)
        fleet.nodes[1].refuse_rows()
        conversation = await source.open(model, PROMPT, 200, 1, "alice")
        async with asyncio.timeout(5):
            assert await answer(conversation, 10) == expected
        assert conversation.chain.repairs == 2, "another grant might have done"
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, B))


def test_the_patience_that_a_rebuild_has_ends_with_it(tmp_path: Path) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await source.open(model, list(range(2000)), 200, 1, "alice")
        tokens = await answer(conversation, 5)
        fleet.nodes[1].kill()
        tokens.append(int((await conversation.decode(tokens[-1])).ids[0]))
        assert conversation.chain.repairs == 1
        fleet.nodes[2].compute_nothing()
        began_s = fleet.clock.monotonic_s()
        tokens.append(int((await conversation.decode(tokens[-1])).ids[0]))
        assert fleet.clock.monotonic_s() - began_s < 2 * STALL_TIMEOUT_S + 5
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, B, C))


class _Distrustful(OpenRoutes):
    """What is between the gateway and the coordinator puts one reply of its own on the bus."""

    forged = 0

    def check(self, request: RouteRequest, hop: Hop, grant: bytes) -> None:
        if self.forged:
            self.forged -= 1
            raise GrantRefused("A route came without a coordinator's grant.")


NO_LEASE = msgspec.json.encode(RouteReply(error="No lease yet.", code=Standing.NO_LEASE))
GARBAGE = b"{"
NO_GRANT = msgspec.json.encode(RouteReply(error="No grant for that.", code=GrantRefused.code))


@pytest.mark.parametrize("replies", [[NO_LEASE] * 3, [GARBAGE], [NO_GRANT], [b"forged"]])
def test_an_answer_outlasts_what_a_coordinator_or_the_bus_says_for_a_moment(
    tmp_path: Path, replies: list[bytes]
) -> None:
    routes = _Distrustful()

    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await source.open(model, PROMPT, 200, 1, "alice")
        task = asyncio.create_task(answer(conversation, 60))
        await asyncio.sleep(0.1)
        if replies == [b"forged"]:
            routes.forged = 1
        else:
            fleet.replies.extend(replies)
        fleet.nodes[1].kill()
        assert len(await task) == 60
        assert not (fleet.replies or routes.forged)
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, B), routes=routes)


@pytest.mark.parametrize("replies", [[NO_LEASE] * 3, [GARBAGE]])
def test_a_conversation_opens_though_the_coordinator_has_just_come_to_lead(
    tmp_path: Path, replies: list[bytes]
) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        fleet.replies.extend(replies)
        conversation = await source.open(model, PROMPT, 20, 1, "alice")
        await conversation.close(keep=False)

    with_fleet(tmp_path, test)


def test_the_gateways_own_lease_ends_an_answer_at_once(tmp_path: Path) -> None:
    class Ending(OpenLease):
        standing: Standing = Standing.WORKING  # type: ignore[misc]

    lease = Ending()

    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await source.open(model, PROMPT, 200, 1, "alice")
        task = asyncio.create_task(answer(conversation, 60))
        await asyncio.sleep(0.1)
        lease.standing = Standing.HALTED
        fleet.nodes[1].kill()
        began_s = fleet.clock.monotonic_s()
        with pytest.raises(NotWorking):
            await task
        assert fleet.clock.monotonic_s() - began_s < 0.1
        await conversation.close(keep=False)

    with_fleet(tmp_path, test, pieces=(A, B, C, B), lease=lease)


def test_a_renewal_that_comes_back_as_garbage_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        conversation = await source.open(model, PROMPT, 200, 1, "alice")
        chain = conversation.chain
        chain.hops = tuple(msgspec.structs.replace(hop, grant=b"leave") for hop in chain.hops)
        chain.granted_s -= GRANT_LIFE_S
        due_since_s = chain.granted_s
        fleet.replies.append(GARBAGE)
        await asyncio.sleep(5.0)
        assert (fleet.replies, chain.granted_s) == ([], due_since_s)
        await asyncio.sleep(RETRY_S)
        assert chain.granted_s > due_since_s
        await conversation.close(keep=False)

    with_fleet(tmp_path, test)
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_a_device_that_leaves_does_not_wait_for_sessions_that_nobody_knows(tmp_path: Path) -> None:
    """Its gateway let one go, and the word of it was lost."""

    async def program(fleet: Fleet, source: FleetTokenSource, model: Digest) -> None:
        await source.open(model, PROMPT, 10, 4, "alice")
        source._live.clear()
        assert [node.relay.session_count for node in fleet.nodes] == [1, 1, 1]
        fleet.nodes[1].relay.drain()
        await asyncio.sleep(0.1)
        assert [node.relay.session_count for node in fleet.nodes] == [1, 0, 1]

    with_fleet(tmp_path, program)
