"""Whom a gateway's report names beside the accused: everybody who could have brought the refusal about."""

from fallow.domain.fleet import Accusation
from fallow.domain.ids import NodeId
from fallow.gateway.accusations import WAITING_MAX, WAITING_OF_ONE_MAX, Accusations

A, B, C, D = (NodeId(letter * 64) for letter in "abcd")


def told(chain: tuple[NodeId, ...], accused: NodeId, refused_by: NodeId | None) -> tuple[Accusation, ...]:
    accusations = Accusations()
    accusations.note(chain, accused, refused_by)
    return accusations.waiting()


def test_a_report_names_the_device_that_refused_and_those_before_the_accused() -> None:
    assert told((A, B, C, D), C, D) == (Accusation(node=C, others=(A, B, D), refused_by=D),)
    assert told((A, B, C, D), A, B) == (Accusation(node=A, others=(B,), refused_by=B),)
    assert told((A, B, C), C, None) == (Accusation(node=C, others=(A, B)),), "refused by the gateway itself"
    assert told((A, B, A, C), A, C) == (Accusation(node=A, others=(B, C), refused_by=C),), "it was before and after B"
    assert told((A, B, A, C), A, B) == (Accusation(node=A, others=(B,), refused_by=B),), "before B, it was first"
    assert told((A,), A, A) == (Accusation(node=A, refused_by=A),), "it said so itself"
    assert told((A, B), B, B) == (Accusation(node=B, others=(A,), refused_by=B),), "it may be A's rows"


def test_who_is_not_of_the_chain_is_not_accused() -> None:
    assert told((A, B), C, B) == ()
    assert told((), A, None) == ()


def test_a_device_accuses_nobody_after_it_and_a_device_of_another_chain_nobody() -> None:
    assert told((A, B, C), C, B) == () and told((A, B, C), B, A) == ()
    assert told((A, B), A, C) == ()
    assert told((A, B, A), B, A) == (Accusation(node=B, others=(A,), refused_by=A),), "its rows came back to A"


def test_one_that_refuses_much_leaves_room_for_others() -> None:
    accusations = Accusations()
    chain = tuple(NodeId(f"{index:064x}") for index in range(10))
    for accused in chain[:-1]:
        accusations.note(chain, accused, chain[-1])
    assert len(accusations.waiting()) == WAITING_OF_ONE_MAX
    accusations.note((A, B), A, B)
    assert accusations.waiting()[-1].node == A


def test_reports_wait_until_they_are_told_and_so_many_at_most() -> None:
    accusations = Accusations()
    for index in range(2 * WAITING_MAX):
        node = NodeId(f"{index:064x}")
        accusations.note((node,), node, node)
    waiting = accusations.waiting()
    assert len(waiting) == WAITING_MAX
    accusations.note((A,), A, None)
    accusations.told(waiting)
    assert accusations.waiting() == ()
    accusations.note((A, B), A, B)
    accusations.note((A, B), A, B)
    assert len(accusations.waiting()) == 1
