"""Rights on the bus: a subject that names its sender is that sender's alone, for every role, device and cell."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.credentials import Role
from fallow.domain.errors import RequestRefused
from fallow.domain.fleet import Subjects
from fallow.domain.ids import NodeId
from fallow.policy.bus_rights import BusRights, claims_rights, inbox, lease_bucket, presence_rights, rights_of
from tests.unit.fabric.support import STEADY, node_id

CELL = "home"
SUBJECTS = Subjects(CELL)
nodes = st.integers(1, 1 << 250).map(node_id)
roles = st.sampled_from(Role)
cells = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=32)


def overlap(pattern: str, other: str) -> bool:
    """Whether some subject matches both of two NATS patterns."""
    a, b = pattern.split("."), other.split(".")
    for mine, theirs in zip(a, b, strict=False):
        if ">" in (mine, theirs):
            return True
        if "*" not in (mine, theirs) and mine != theirs:
            return False
    return len(a) == len(b)


def may_say(rights: BusRights, subject: str) -> bool:
    return any(overlap(pattern, subject) for pattern in rights.publish)


def may_hear(rights: BusRights, subject: str) -> bool:
    return any(overlap(pattern, subject) for pattern in rights.subscribe)


@pytest.mark.parametrize(
    ("pattern", "other", "expected"),
    [
        ("a.b", "a.b", True), ("a.b", "a.c", False), ("a.*", "a.b", True), ("a.*", "a.b.c", False),
        ("a.>", "a.b.c", True), ("a.>", "a", False), ("*.b", "a.*", True), (">", "a.b", True),
        ("a.*.c", "a.b.*", True), ("a.b", "a.b.c", False),
    ],
)  # fmt: skip
def test_patterns_overlap_as_nats_has_it(pattern: str, other: str, expected: bool) -> None:
    assert overlap(pattern, other) is expected


@STEADY
@given(role=roles, me=nodes, other=nodes, cell=cells)
def test_nobody_speaks_in_anothers_name(role: Role, me: NodeId, other: NodeId, cell: str) -> None:
    rights, subjects = rights_of(role, me, cell), Subjects(cell)
    named = [
        of(other)
        for of in (subjects.heartbeat, subjects.leaving, subjects.coordinator, subjects.route, subjects.gateway)
    ]
    for subject in (*named, subjects.store(other), subjects.relay("*", other), f"{inbox(other)}.>"):
        assert me == other or not may_say(rights, subject), subject


@STEADY
@given(role=roles, me=nodes, other=nodes, cell=cells)
def test_only_coordinators_order_lead_and_declare_gone(role: Role, me: NodeId, other: NodeId, cell: str) -> None:
    rights, subjects = rights_of(role, me, cell), Subjects(cell)
    for subject in (subjects.command(other), subjects.command(me), subjects.leader, subjects.gone, subjects.digest):
        assert may_say(rights, subject) is (role is Role.COORDINATOR)
    for subject in (subjects.ask, Subjects("other").ask):
        assert may_say(rights, subject) is (role is Role.COORDINATOR)
    assert may_say(rights, subjects.revocations) is (role is Role.REGISTRAR)
    assert may_say(rights, subjects.halt) is (role in {Role.REGISTRAR, Role.OPERATOR})
    assert may_say(rights, subjects.hello) is (role in {Role.REGISTRAR, Role.COORDINATOR})
    assert may_say(rights, subjects.charter) is (role is Role.REGISTRAR)


@STEADY
@given(role=roles, me=nodes, other=nodes, cell=cells)
def test_nobody_hears_what_is_not_for_them(role: Role, me: NodeId, other: NodeId, cell: str) -> None:
    rights, subjects = rights_of(role, me, cell), Subjects(cell)
    if other != me:
        for subject in (subjects.command(other), subjects.relay(other), f"{inbox(other)}.>"):
            assert not may_hear(rights, subject), subject
    assert may_hear(rights, subjects.command(me)) is (role is Role.NODE)
    for subject in (subjects.heartbeat(), subjects.route(), subjects.status, subjects.catalogue):
        assert may_hear(rights, subject) is (role is Role.COORDINATOR)
    assert may_hear(rights, f"{inbox(me)}.x.y")
    assert may_hear(rights, subjects.halt)


@STEADY
@given(role=roles, me=nodes, cell=cells, other=cells)
def test_a_cell_ends_at_its_name(role: Role, me: NodeId, cell: str, other: str) -> None:
    if cell == other:
        return
    rights, elsewhere = rights_of(role, me, cell), Subjects(other)
    for subject in (elsewhere.heartbeat(), elsewhere.leader, elsewhere.command("*"), elsewhere.halt, elsewhere.gone):
        assert not may_say(rights, subject)
    for subject in (elsewhere.heartbeat(), elsewhere.route(), elsewhere.command("*"), elsewhere.relay("*")):
        assert not may_hear(rights, subject)


@STEADY
@given(role=roles, me=nodes, cell=cells)
def test_jetstream_and_the_system_are_out_of_reach(role: Role, me: NodeId, cell: str) -> None:
    rights = rights_of(role, me, cell)
    assert not may_say(rights, "$SYS.>") and not may_hear(rights, "$SYS.>")
    assert not may_hear(rights, "$JS.>")
    leads = role is Role.COORDINATOR
    assert may_say(rights, "$JS.>") is leads and may_say(rights, "$KV.>") is leads
    for forbidden in ("STREAM.DELETE", "STREAM.PURGE", "STREAM.UPDATE", "CONSUMER.CREATE", "STREAM.MSG.DELETE"):
        assert not may_say(rights, f"$JS.API.{forbidden}.>")
    for other in ("fallow_elsewhere", "x"):
        if other != lease_bucket(cell):
            assert not may_say(rights, f"$KV.{other}.>") and not may_say(rights, f"$JS.API.STREAM.INFO.KV_{other}")


def test_no_right_is_wider_than_a_cell_and_no_list_is_empty() -> None:
    """NATS takes an empty list for "everything"."""
    for role in Role:
        rights = rights_of(role, node_id(1), CELL)
        assert rights.publish and rights.subscribe
        for pattern in (*rights.publish, *rights.subscribe):
            assert pattern.split(".")[0] in {"fallow", "_INBOX", "$JS", "$KV"}
            assert not pattern.endswith(">") or pattern == f"{inbox(node_id(1))}.>"


def test_system_credentials_do_one_thing_each() -> None:
    me, account = node_id(1), "A" * 56
    watcher, registrar = presence_rights(me, account), claims_rights(me, (account, "S" * 56))
    assert not may_say(watcher, "$SYS.REQ.CLAIMS.UPDATE") and not may_say(watcher, "$SYS.REQ.SERVER.>")
    assert not may_hear(watcher, "$SYS.ACCOUNT.B.>") and not may_hear(registrar, "$SYS.>")
    assert not may_say(registrar, "$SYS.REQ.CLAIMS.DELETE") and not may_say(registrar, "$SYS.REQ.SERVER.>")
    assert may_say(registrar, f"$SYS.REQ.ACCOUNT.{'S' * 56}.CLAIMS.LOOKUP")
    assert not may_say(registrar, "$SYS.REQ.ACCOUNT.B.CLAIMS.LOOKUP")


@pytest.mark.parametrize("cell", ["", "a.b", "*", ">", "a b", "x" * 33, "home\n", "ä"])
def test_a_cell_that_is_no_word_has_no_rights(cell: str) -> None:
    with pytest.raises(RequestRefused, match="cell"):
        rights_of(Role.NODE, node_id(1), cell)


@pytest.mark.parametrize("node", ["", "*", ">", "ab", "G" * 64, "0" * 63 + "*", "0" * 64 + "\n"])
def test_a_node_that_is_no_key_has_no_rights(node: str) -> None:
    with pytest.raises(RequestRefused, match="public key"):
        rights_of(Role.NODE, NodeId(node), CELL)
