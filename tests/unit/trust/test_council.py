"""Proposals: made, reviewed, signed apart, merged, and refused when they do not hold together."""

from pathlib import Path

import msgspec
import pytest

from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import CharterInvalid, SignatureInvalid
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.ceremonies import Wanted, founding, merge, publication_of, sign
from fallow.trust.council.files import (
    CouncilInvitation,
    CouncilPaths,
    decode_proposal,
    encode_proposal,
    invitation_of,
    invitation_text,
    member_of_text,
    member_text,
    members_of_texts,
)
from fallow.trust.council.pins import Pin, check_pin, pin_of, write_pin
from fallow.trust.council.proposals import first_root_payload, review
from tests.adversarial.council_world import (
    ALICE,
    BOB,
    CAROL,
    COUNCIL,
    LEASE_S,
    LIST,
    MALLORY,
    MODEL,
    NETWORK,
    NOW,
    ONLINE,
    PUBLISHER,
    World,
    identity,
)

SHORTER = FleetPolicy(epoch=2, lease_s=60)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Nothing is published in these tests."""
    return World(tmp_path_factory.mktemp("world"))


def changes(proposed: object) -> list[tuple[str, str, str]]:
    return [(each.what, each.before, each.after) for each in review(proposed).changes]  # type: ignore[arg-type]


def test_a_review_shows_old_and_new(world: World) -> None:
    assert changes(world.propose(policy=SHORTER)) == [("epoch", "1", "2"), ("lease_s", f"{LEASE_S}", "60.0")]
    dave = identity("dave")
    members = {ALICE.node: "alice", BOB.node: "bob", dave.node: "dave"}
    assert changes(world.propose(members=members, threshold=3)) == [
        ("council: removed", f"carol (key {CAROL.node})", ""),
        ("council: added", "", f"dave (key {dave.node})"),
        ("council: signatures needed", "2 of 3", "3 of 3"),
    ]
    assert changes(world.propose(online=dave.node)) == [
        ("registrar's key for timestamps", ONLINE.node, dave.node),
        ("registrar's key for snapshots", ONLINE.node, dave.node),
    ]
    assert changes(world.propose(publishers={"models-dave": dave.node})) == [
        ("publisher removed: models-publisher", f"key {PUBLISHER.node}", ""),
        ("publisher added: models-dave", "", f"key {dave.node}"),
        ("models-publisher: withdrawn", MODEL, ""),
    ]
    assert changes(world.propose(publishers={LIST: dave.node})) == [
        ("publisher's new key: models-publisher", f"key {PUBLISHER.node}", f"key {dave.node}"),
        ("models-publisher: signed anew", MODEL, MODEL),
    ]


def test_a_review_says_who_must_sign(world: World) -> None:
    """A new council is signed by the old one and by itself; what it leaves in force, by itself."""
    dave = identity("dave")
    proposed = world.propose(members={ALICE.node: "alice", dave.node: "dave"})
    needs = {need.document: need for need in review(proposed).needs}
    assert needs["the new council, by the old one"].may_sign == ("alice", "bob", "carol")
    assert needs["the new council, by itself"].may_sign == ("alice", "dave")
    assert needs["the policy"].may_sign == ("alice", "dave")
    signed, _ = sign(proposed, [ALICE, dave])
    assert not review(signed).is_complete  # one of the old council only
    signed, documents = sign(signed, [BOB])
    assert documents == ("root",)
    assert review(signed).is_complete


def test_copies_signed_apart_are_merged_and_a_key_counts_once(world: World) -> None:
    proposed = world.propose(policy=SHORTER)
    first, _ = sign(proposed, [ALICE])
    again, _ = sign(proposed, [ALICE])
    assert not review(merge([first, again, first])).is_complete
    second, _ = sign(proposed, [BOB])
    merged = merge([proposed, first, second])
    assert review(merged).is_complete
    assert merge([second, first]).targets.count("sig") == merged.targets.count("sig")
    publication_of(merged)
    with pytest.raises(CharterInvalid, match=r"1 of the 2 .* bob, carol"):
        publication_of(first)


def test_different_proposals_are_not_merged(world: World) -> None:
    one, other = world.propose(policy=SHORTER), world.propose(policy=FleetPolicy(epoch=2, lease_s=61))
    for pair in ([one, other], [one, world.propose(members={ALICE.node: "a"}, threshold=1)], []):
        with pytest.raises(CharterInvalid):
            merge(pair)


def test_a_stranger_cannot_sign(world: World) -> None:
    with pytest.raises(CharterInvalid, match="neither the old nor the new council"):
        sign(world.propose(policy=SHORTER), [MALLORY])
    signed, documents = sign(world.propose(policy=SHORTER), [MALLORY, CAROL])
    assert documents == ("targets",)
    assert MALLORY.node not in signed.targets


def test_a_proposal_whose_base_lies_is_refused(world: World) -> None:
    """What a member is shown as `now` must have been signed, too."""
    proposed = world.propose(policy=SHORTER)
    base = proposed.base
    assert base is not None
    other_policy = tuf.encode_policy(FleetPolicy(epoch=1, lease_s=60)).decode()
    for lie in (
        msgspec.structs.replace(base, policy=other_policy),
        msgspec.structs.replace(base, roots=()),
        msgspec.structs.replace(base, roots=(base.roots[0], base.roots[0])),
        msgspec.structs.replace(base, targets=base.targets.replace('"version":1', '"version":0')),
        msgspec.structs.replace(base, roots=(base.roots[0].replace('"threshold":2', '"threshold":1'),)),
    ):
        with pytest.raises(CharterInvalid):
            review(msgspec.structs.replace(proposed, base=lie))


def test_what_is_not_listed_cannot_be_withdrawn(world: World) -> None:
    for withdraw in ({LIST: frozenset({"models/publisher/x.json"})}, {"releases-x": frozenset({"releases/x/1.json"})}):
        with pytest.raises(CharterInvalid, match=r"listed|publishes"):
            world.propose(withdraw=withdraw)


def test_a_proposal_that_does_not_hold_together_is_refused(world: World) -> None:
    proposed = world.propose(policy=SHORTER, publishers={LIST: ALICE.node})
    listed = proposed.delegated[LIST]
    version = f'"version":{2 + tuf.LIST_JUMP}'
    assert version in listed
    for broken in (
        msgspec.structs.replace(proposed, policy=tuf.encode_policy(FleetPolicy(epoch=3)).decode()),
        msgspec.structs.replace(proposed, targets=proposed.targets.replace('"version":2', '"version":9')),
        msgspec.structs.replace(proposed, delegated={LIST: listed.replace(version, '"version":9')}),
        msgspec.structs.replace(proposed, delegated={LIST: listed.replace(".json", ".jsom")}),
        msgspec.structs.replace(proposed, delegated={"evil": listed}),
        msgspec.structs.replace(proposed, format=2),
        msgspec.structs.replace(proposed, base=None),
    ):
        with pytest.raises(CharterInvalid):
            review(broken)
    for policy in (FleetPolicy(epoch=1, lease_s=60), FleetPolicy(epoch=0)):
        with pytest.raises(CharterInvalid, match="epoch"):
            world.propose(policy=policy)


@pytest.mark.parametrize(
    ("members", "threshold"), [({}, 1), ({ALICE.node: "a"}, 2), ({ALICE.node: "a"}, 0), ({ONLINE.node: "o"}, 1)]
)
def test_a_council_that_cannot_be_is_not_proposed(world: World, members: dict, threshold: int) -> None:  # type: ignore[type-arg]
    with pytest.raises(CharterInvalid):
        world.propose(members=members, threshold=threshold)
    with pytest.raises(CharterInvalid):
        founding(Wanted(members=members, threshold=threshold, online=ONLINE.node), NOW)


def test_a_founding_proposal_is_recognised_by_its_fingerprint() -> None:
    wanted = Wanted(members=COUNCIL, threshold=2, online=ONLINE.node)
    proposed = founding(wanted, NOW)
    signed, _ = sign(proposed, [ALICE, BOB])
    assert signed.root is not None
    assert review(proposed).founds == review(signed).founds == tuf.sha256(first_root_payload(signed.root))
    other = founding(msgspec.structs.replace(wanted, threshold=1), NOW)
    assert review(other).founds != review(proposed).founds


def test_a_file_of_a_proposal_is_read_as_written_or_refused(world: World) -> None:
    proposed = world.propose(policy=SHORTER)
    assert decode_proposal(encode_proposal(proposed)) == proposed
    for data in (b"", b"[]", b"\xff", b'{"format": 1}', b"[" * 100_000):
        with pytest.raises(CharterInvalid):
            decode_proposal(data)


def test_a_pin_only_moves_forward(tmp_path: Path) -> None:
    """A member is not shown a change as built on a council that was replaced, or on another network's."""
    world = World(tmp_path / "world")
    first = world.base()
    pin = Pin(name="alice", network=NETWORK, first_root=tuf.sha256(first_root_payload(first.roots[0])))
    pin = check_pin(pin, first)
    world.put_in_force(world.propose(members={ALICE.node: "alice", BOB.node: "bob"}), [ALICE, BOB])
    newer = check_pin(pin, world.base())
    assert (newer.version, pin.version) == (2, 1)
    with pytest.raises(CharterInvalid, match="no longer"):
        check_pin(newer, first)
    fork = World(tmp_path / "fork")
    fork.put_in_force(fork.propose(members={ALICE.node: "alice", CAROL.node: "carol"}), [ALICE, CAROL])
    with pytest.raises(CharterInvalid, match="not, or no longer"):
        check_pin(newer, fork.base())
    with pytest.raises(CharterInvalid, match="another network"):
        check_pin(msgspec.structs.replace(newer, first_root="00" * 32), world.base())
    paths = CouncilPaths(tmp_path)
    assert pin_of(paths) is None
    write_pin(paths, newer)
    assert pin_of(paths) == newer


def test_texts_for_people() -> None:
    invitation = CouncilInvitation(name="home", network=NETWORK, first_root="00" * 32, threshold=2, members=3)
    assert invitation_of(" " + invitation_text(invitation) + "\n") == invitation
    text = member_text(BOB, "bob\x1b[2J", NETWORK)
    assert member_of_text(text, NETWORK) == (BOB.node, "bob[2J")
    for wrong in ("", "bob", text[:-4], text[:-20] + "A" * 20, invitation_text(invitation)):
        with pytest.raises(SignatureInvalid):
            member_of_text(wrong, NETWORK)
    with pytest.raises(SignatureInvalid, match="another network"):
        member_of_text(text, "00" * 32)
    with pytest.raises(SignatureInvalid, match="their own"):
        members_of_texts((text, member_text(BOB, "robert", NETWORK)), NETWORK)
