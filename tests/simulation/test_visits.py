"""Goal: a repair computes anew what was lost and nothing else, also where a survivor has to come twice in the chain.

Method: as in `test_failover.py`, on virtual time with the toy engine; here the routes are the coordinator's policy's,
and what every device computes is counted, in rows times layers. No randomness: each case is enumerated; the Hypothesis
test draws who holds what, when a device dies, and how.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.domain.errors import KvExhausted, NoRoute
from fallow.domain.fleet import Hop, RouteRequest
from fallow.domain.frames import Flow, Frame, Phase, RenewGrant
from fallow.domain.grants import GRANT_LIFE_S, Grant
from fallow.domain.ids import Digest, NodeId, SessionId, at_visit
from fallow.domain.model import Span, StageSpec
from fallow.engine.contract import Step, Stepped
from fallow.engine.memory import MemoryEngine
from fallow.gateway.chain import Chain
from fallow.gateway.renewals import Renewals
from fallow.node.stage_session import UNFLOWED_ROWS_MAX
from fallow.policy.routing import Carrier, ModelShape, route
from fallow.simulator.virtual_time import run_virtual
from fallow.trust.open_doors import OpenGrants
from tests.simulation.sessions import LAYERS, Fleet, generate, toy_manifest

A, B, C = Span(0, 2), Span(2, 4), Span(4, 6)
AB, BC = Span(0, 4), Span(2, 6)
PROMPT = list(range(100))
COUNT = 40
TOKENS = len(PROMPT) + COUNT - 1
"""The last token of an answer is not computed."""
KV_BYTES_PER_TOKEN_LAYER = MemoryEngine._kv_bytes_per_token(toy_manifest(), 1)
Route = list[tuple[int, Span, int]]
"""Node, span and visit of each hop."""


class CountingFleet(Fleet):
    """Routed by the coordinator's policy; counts what each device computes, in rows times layers."""

    async def start(self, *hosted: Sequence[Span], log_budget_bytes: int = 1 << 20) -> None:
        await super().start(*hosted, log_budget_bytes=log_budget_bytes)
        self.computed = [0] * len(self.nodes)
        self.routes: list[Route] = []
        for index, node in enumerate(self.nodes):
            self._count(index, node.engine.step)

    def _count(self, index: int, step: object) -> None:
        async def counted(asked: Step) -> Stepped:
            held = self.nodes[index].engine._held(asked.session)
            self.computed[index] += asked.count * held.span.layer_count
            return await step(asked)  # type: ignore[operator,no-any-return]

        self.nodes[index].engine.step = counted  # type: ignore[method-assign]

    async def route(
        self, model: Digest, session: SessionId, reserve_tokens: int, exclude: frozenset[NodeId], keep: Sequence[Hop],
        rebuild_tokens: int = 0, spare: bool = False,
    ) -> tuple[Hop, ...]:  # fmt: skip
        if self.script:
            return await super().route(model, session, reserve_tokens, exclude, keep, rebuild_tokens)
        carriers = [
            Carrier(
                address=node.endpoint.address,
                stage=StageSpec(model=model, pieces=node.pieces),
                kv_free_bytes=node.engine.load_now.kv_free_bytes,
            )
            for node in self.nodes
            if node.alive
        ]
        request = RouteRequest(
            model=model, session=session, reserve_tokens=reserve_tokens, exclude=tuple(sorted(exclude)),
            keep=tuple(keep), rebuild_tokens=rebuild_tokens,
        )  # fmt: skip
        shape = ModelShape(layer_count=LAYERS, kv_bytes_per_token_layer=KV_BYTES_PER_TOKEN_LAYER)
        reply = route(request, shape, carriers)
        if not reply.hops:
            raise (KvExhausted if reply.code == KvExhausted.code else NoRoute)(reply.error or "")
        self.routes.append(self.seen(reply.hops))
        return reply.hops

    def seen(self, hops: Sequence[Hop]) -> Route:
        index = {node.id: at for at, node in enumerate(self.nodes)}
        return [(index[hop.address.node], hop.span, hop.visit) for hop in hops]


async def until(chain: Chain, tokens: int) -> None:
    while len(chain.tokens) < tokens:
        await asyncio.sleep(0.001)


async def undisturbed(prompt: Sequence[int] = PROMPT, count: int = COUNT) -> list[int]:
    """The answer of one device, which nothing happens to."""
    fleet = Fleet()
    await fleet.start((Span(0, 6),))
    return await generate(fleet.chain(), prompt, count)


CASES = {
    "the kept last stage's device takes the first": ([(A, B), (B,), (A, C)], [(0, AB), (2, C)], 0,
        [(2, A, 1), (1, B, 0), (2, C, 0)], {2: LAYERS // 3, 1: LAYERS // 3}),
    "the kept first stage's device takes the last": ([(A, C), (B,), (B, C)], [(0, A), (2, BC)], 2,
        [(0, A, 0), (1, B, 0), (0, C, 1)], {0: LAYERS // 3, 1: LAYERS // 3}),
    "rows go from a device to itself": ([(A,), (A, B, C)], [(0, A), (1, BC)], 0,
        [(1, A, 1), (1, BC, 0)], {1: LAYERS // 3}),
    "a device's own log rebuilds its next stage": ([(A, B), (B, C), (C,)], [(0, A), (1, BC)], 1,
        [(0, A, 0), (0, B, 1), (2, C, 0)], {0: LAYERS // 3, 2: LAYERS // 3}),
}  # fmt: skip


@pytest.mark.parametrize("fault", ["kill", "freeze", "crash_engine"])
@pytest.mark.parametrize("case", CASES)
def test_only_what_was_lost_is_computed_anew(case: str, fault: str) -> None:
    hosted, before, victim, after, rebuilt = CASES[case]

    async def program() -> None:
        fleet = CountingFleet()
        await fleet.start(*hosted)
        fleet.script = [before]
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT, ahead=False))
        await until(chain, len(PROMPT) + COUNT // 2)
        lost = fleet.nodes[victim]
        if fault == "crash_engine":
            lost.engine.crash()
            lost.relay.engine_lost("the worker was killed")
            lost.alive = False
        else:
            getattr(lost, fault)()
        assert await task == await undisturbed()
        assert (fleet.seen(chain.hops), chain.repairs) == (after, 1)
        for node in set(range(len(fleet.nodes))) - {victim}:
            kept = sum(span.layer_count for at, span in before if at == node)
            assert fleet.computed[node] == TOKENS * (kept + rebuilt.get(node, 0)), f"device {node}"
        chain.close()
        await asyncio.sleep(0.1)
        assert [node.relay.session_count for node in fleet.nodes if node is not lost] == [0] * (len(fleet.nodes) - 1)

    run_virtual(program())


def test_a_chain_that_comes_twice_to_a_device_survives_its_loss_and_serves_a_follow_up_turn() -> None:
    """Device 2 takes over a second stage, then dies with both; device 3 has a copy of everything."""

    async def program() -> None:
        fleet = CountingFleet()
        await fleet.start((A, B), (B,), (A, C), (A, B, C))
        fleet.nodes[3].alive = False
        fleet.script = [[(0, AB), (2, C)]]
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        await until(chain, len(PROMPT) + 5)
        fleet.nodes[0].kill()
        await until(chain, len(PROMPT) + 15)
        assert [visit for node, _, visit in fleet.seen(chain.hops) if node == 2] == [1, 0]
        fleet.nodes[3].alive = True
        fleet.nodes[2].kill()
        assert await task == await undisturbed()
        assert chain.repairs == 2
        await chain.establish(keep_tokens=50)
        follow_up = [*PROMPT[:50], 7, 8, 9]
        candidates = await chain.advance(follow_up[50:], Phase.PREFILL)
        assert [int(candidates.ids[0])] == await undisturbed(follow_up, 1)

    run_virtual(program())


def test_a_follow_up_turn_keeps_both_stages_of_a_device() -> None:
    async def program() -> None:
        fleet = CountingFleet()
        await fleet.start((A, B), (B,), (A, C))
        fleet.script = [[(0, AB), (2, C)]]
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        await until(chain, len(PROMPT) + 5)
        fleet.nodes[0].kill()
        await task
        before = list(fleet.computed)
        await chain.establish(keep_tokens=50)
        follow_up = [*PROMPT[:50], 7, 8, 9]
        candidates = await chain.advance(follow_up[50:], Phase.PREFILL)
        assert [int(candidates.ids[0])] == await undisturbed(follow_up, 1)
        assert [after - was for after, was in zip(fleet.computed, before, strict=True)] == [0, 3 * 2, 3 * 4]

    run_virtual(program())


def test_each_stage_of_a_device_has_its_own_grant_renewed() -> None:
    class Renewed(OpenGrants):
        def __init__(self) -> None:
            self.heard: list[tuple[SessionId, SessionId, bytes]] = []

        def renew(self, gateway: NodeId, renewal: RenewGrant, current: Grant) -> Grant:
            self.heard.append((renewal.session, current.session, renewal.grant))
            return current

    class GrantingFleet(CountingFleet):
        async def route(self, *asked: Any, **more: Any) -> tuple[Hop, ...]:
            hops = await super().route(*asked, **more)
            return tuple(replace(hop, grant=f"{hop.span} {hop.visit}".encode()) for hop in hops)

    async def program() -> None:
        fleet = GrantingFleet()
        await fleet.start((A, B), (B,), (A, C))
        fleet.script = [[(0, AB), (2, C)]]
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        await until(chain, len(PROMPT) + 5)
        fleet.nodes[0].kill()
        await task
        book = Renewed()
        fleet.nodes[2].relay._allowances._grants = book
        chain.granted_s -= GRANT_LIFE_S
        renewals = Renewals(fleet, fleet.peers, fleet.clock)
        renewals.look([chain])
        await asyncio.sleep(0.1)
        name, again = chain.session, at_visit(chain.session, 1)
        assert book.heard == [(again, again, b"[0,2) 1"), (name, name, b"[4,6) 0")]
        await renewals.close()

    run_virtual(program())


def test_each_stage_of_a_device_takes_its_own_room() -> None:
    """There is room for one stage of this session on device 2, and it must not be promised a second one."""

    async def program(kv_stages: float) -> tuple[list[Route], bool]:
        reserve = 400
        fleet = CountingFleet(kv_budget_bytes=int(kv_stages * reserve * 2 * KV_BYTES_PER_TOKEN_LAYER))
        await fleet.start((A,), (B,), (A, C), (A,))
        fleet.script = [[(0, A), (1, B), (2, C)]]
        chain = fleet.chain(reserve_tokens=reserve)
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        await until(chain, len(PROMPT) + 5)
        fleet.nodes[3].alive = False
        fleet.nodes[0].kill()
        await asyncio.sleep(1)
        fleet.nodes[3].alive = True
        return fleet.routes, await task == await undisturbed()

    assert run_virtual(program(2.5)) == ([[(2, A, 1), (1, B, 0), (2, C, 0)]], True)
    assert run_virtual(program(1.5)) == ([[(3, A, 0), (1, B, 0), (2, C, 0)]], True)


def test_a_long_log_that_a_device_sends_to_itself_is_expected_there() -> None:
    """Device 0 takes the layers right behind its own: it has all the rows at once, more than wait without a flow. Its
    link brings one flow after the other."""
    prompt = list(range(UNFLOWED_ROWS_MAX + 500))

    async def program() -> None:
        fleet = CountingFleet()
        await fleet.start((A, B), (B, C), (C,))
        fleet.script = [[(0, A), (1, BC)]]
        chain = fleet.chain(reserve_tokens=len(prompt) + 100)
        task = asyncio.create_task(generate(chain, prompt, 10))
        await until(chain, len(prompt) + 5)
        relay = fleet.nodes[0].relay
        told: list[SessionId] = []
        handle = relay.handle

        def one_by_one(peer: NodeId, frame: Frame) -> bool:
            if not isinstance(frame.header, Flow):
                return handle(peer, frame)
            told.append(frame.header.session)
            asyncio.get_running_loop().call_later(0.01 * (len(told) - 1), handle, peer, frame)
            return True

        relay.handle = one_by_one  # type: ignore[method-assign]
        fleet.nodes[1].kill()
        assert len(await task) == 10
        assert told == [at_visit(chain.session, 1), chain.session]
        assert (fleet.seen(chain.hops), chain.repairs) == ([(0, A, 0), (0, B, 1), (2, C, 0)], 1)
        assert fleet.computed[0] == (len(prompt) + 9) * AB.layer_count, "once"

    run_virtual(program())


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.sets(st.sampled_from([A, B, C]), min_size=1, max_size=3), min_size=3, max_size=4),
    victims=st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 0.2)), min_size=1, max_size=2),
)
def test_no_loss_changes_an_answer_or_costs_a_cache_that_lives(
    pieces: list[set[Span]], victims: list[tuple[int, float]]
) -> None:
    """As long as every layer is held by a survivor; for one loss, the work is exactly that of the layers lost."""
    ordered = [sorted(held) for held in pieces]
    dead = {victim % len(ordered) for victim, _ in victims}
    left = [held for at, held in enumerate(pieces) if at not in dead]
    if set().union(*left) != {A, B, C} or set().union(*pieces) != {A, B, C}:
        return

    async def program() -> tuple[bool, int, int, int]:
        fleet = CountingFleet()
        await fleet.start(*(tuple(held) for held in ordered))
        chain = fleet.chain()
        task = asyncio.create_task(generate(chain, PROMPT, COUNT))
        lost_layers = 0
        for victim, after_s in victims:
            await asyncio.sleep(after_s)
            node = fleet.nodes[victim % len(ordered)]
            if node.alive and not task.done():
                lost_layers += sum(hop.span.layer_count for hop in chain.hops if hop.address.node == node.id)
                node.kill()
        same = await task == await undisturbed()
        return same, sum(fleet.computed), lost_layers, chain.repairs

    try:
        same, computed, lost_layers, repairs = run_virtual(program())
    except NoRoute:
        return  # two losses may leave every layer on a survivor and yet no chain that uses each newcomer once
    assert same
    if repairs <= 1:
        assert computed <= TOKENS * (LAYERS + lost_layers)
