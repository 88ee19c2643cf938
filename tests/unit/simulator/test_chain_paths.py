"""`one_chain_serves` follows stages, of which a device may be two in one chain."""

from fallow.domain.ids import NodeId, SessionId, at_visit
from fallow.simulator.invariants import Paths, one_chain_serves

GATEWAY, A, B, C = (NodeId(f"{index:064x}") for index in range(4))
SESSION = SessionId("5" * 32)
AGAIN = at_visit(SESSION, 1)


def test_a_device_that_is_in_a_chain_twice_feeds_two_others() -> None:
    paths = Paths()
    way = [(GATEWAY, A, SESSION), (A, B, SESSION), (B, A, AGAIN), (A, C, SESSION)]
    assert [one_chain_serves(paths, *hop, 2) for hop in [*way, *way]] == [None] * 8


def test_a_device_that_is_there_once_feeds_one_other() -> None:
    paths = Paths()
    for hop in [(GATEWAY, A, SESSION), (A, B, SESSION)]:
        assert one_chain_serves(paths, *hop, 2) is None
    broken = one_chain_serves(paths, A, C, SESSION, 2)
    assert broken is not None and "before it fed" in broken
    assert one_chain_serves(paths, A, C, SESSION, 3) is None, "another epoch, another way"


def test_a_stage_that_two_feed_is_noticed_although_one_of_them_is_there_twice() -> None:
    paths = Paths()
    for hop in [(GATEWAY, A, SESSION), (A, B, SESSION), (B, A, AGAIN)]:
        assert one_chain_serves(paths, *hop, 2) is None
    assert one_chain_serves(paths, C, B, SESSION, 2) is not None
