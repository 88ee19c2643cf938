"""Spare copies lie on idle devices, apart from what they are copies of where that can be."""

import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.ids import NodeId
from fallow.policy.routing import Carrier
from fallow.policy.spares import BUSY_MAX_SHARE, REGIONS_MAX, ROOM_SHARE, WAIT_MAX_S, apart, idle_part
from tests.unit.policy.routing_world import carrier, node_id


@st.composite
def cells_in_regions(draw: st.DrawFn) -> tuple[list[Carrier], frozenset[NodeId]]:
    """Devices of up to six regions, and some of them that a chain is made of."""
    dice = random.Random(draw(st.integers(0, 2**32 - 1)))
    regions = "abcdef"[: draw(st.integers(1, 6))]
    cell = [
        msgspec.structs.replace(
            carrier(index, 0, 6),
            region=dice.choice(regions),
            busy_share=dice.choice([0.0, 0.2, BUSY_MAX_SHARE, 0.6]),
            rebuild_wait_s=dice.choice([0.0, WAIT_MAX_S, 1.5]),
        )
        for index in range(draw(st.integers(0, 20)))
    ]
    return cell, frozenset(one.node for one in cell if dice.random() < 0.2)


@given(cells_in_regions())
def test_what_is_offered_is_idle_and_apart_as_far_as_can_be(drawn: tuple[list[Carrier], frozenset[NodeId]]) -> None:
    cell, first_chain = drawn
    by_node = {one.node: one for one in cell}
    taken = {by_node[node].region for node in first_chain}
    ways = list(apart(cell, first_chain))
    free = {one.node for one in cell if one.busy_share <= BUSY_MAX_SHARE and one.rebuild_wait_s <= WAIT_MAX_S}
    idle = free - first_chain
    assert {one.node for one in ways[-1]} == idle, "anywhere, in the end"
    assert len(ways) <= 2 + REGIONS_MAX
    for way in ways:
        assert {one.node for one in way} <= idle
        assert all(one.kv_free_bytes == int(by_node[one.node].kv_free_bytes * ROOM_SHARE) for one in way)
    elsewhere = {node for node in idle if by_node[node].region not in taken}
    if elsewhere:
        assert {one.node for one in ways[0]} == elsewhere, "first where the chain is not"
    for way in ways[bool(elsewhere) : -1]:
        assert len({one.region for one in way}) == 1, "then in one region"


def test_a_device_is_idle_up_to_a_share_of_its_time_and_while_little_was_promised_on_it() -> None:
    cell = [msgspec.structs.replace(carrier(index, 0, 6), busy_share=index / 10) for index in range(11)]
    assert [one.node for one in idle_part(cell)] == [node_id(index) for index in range(6)]
    waiting = [msgspec.structs.replace(carrier(index, 0, 6), rebuild_wait_s=index / 2) for index in range(11)]
    assert [one.node for one in idle_part(waiting)] == [node_id(index) for index in range(3)]
