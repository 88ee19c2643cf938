"""What the council's word means, as properties."""

from hypothesis import given
from hypothesis import strategies as st

from fallow.domain.charter import FleetPolicy, Halt
from fallow.domain.ids import NodeId
from fallow.policy.council import (
    EPOCH_MAX,
    HALT_EPOCHS_AHEAD,
    MEMBERS_MAX,
    halt_holds,
    member_changes,
    policy_changes,
    publisher_name,
    quorum_remark,
    resuming_epoch,
    why_no_publisher_name,
    why_no_quorum,
    why_policy_cannot_follow,
)

NETWORKS = ("home", "away")
nodes = st.sampled_from([NodeId(letter * 64) for letter in "abcd"])
epochs = st.one_of(st.integers(0, 20), st.integers(0, 3 * HALT_EPOCHS_AHEAD))
halts = st.builds(
    Halt, network=st.sampled_from(NETWORKS), epoch=epochs, why=st.just("why"), issued_unix_s=st.floats(0, 2e9)
)
policies = st.builds(FleetPolicy, epoch=epochs, lease_s=st.sampled_from([10.0, 600.0]))


@given(halts, nodes, st.sets(nodes), epochs)
def test_a_halt_holds_only_by_a_member_of_this_network_at_this_epoch_or_little_above(
    halt: Halt, signer: NodeId, council: set[NodeId], epoch: int
) -> None:
    expected = signer in council and halt.network == "home" and 0 <= halt.epoch - epoch <= HALT_EPOCHS_AHEAD
    assert halt_holds(halt, signer, council, "home", epoch) == expected


@given(halts, nodes, st.sets(nodes), epochs, st.integers(0, 20))
def test_a_higher_epoch_never_makes_a_halt_hold_again(
    halt: Halt, signer: NodeId, council: set[NodeId], epoch: int, more: int
) -> None:
    """Out of date once is out of date for good; from too far ahead is refused now, and may be signed anew later."""
    if halt.epoch < epoch:
        assert not halt_holds(halt, signer, council, "home", epoch + more)


@given(st.lists(st.tuples(nodes, halts)), policies)
def test_no_halt_that_held_holds_at_the_resuming_epoch(
    given_halts: list[tuple[NodeId, Halt]], policy: FleetPolicy
) -> None:
    council = {signer for signer, _ in given_halts}
    held = [(who, halt) for who, halt in given_halts if halt_holds(halt, who, council, "home", policy.epoch)]
    epoch = resuming_epoch(policy, [halt for _, halt in held])
    assert policy.epoch < epoch <= policy.epoch + HALT_EPOCHS_AHEAD + 1  # no key alone uses up the epochs
    assert not any(halt_holds(halt, signer, council, "home", epoch) for signer, halt in held)


@given(nodes, halts)
def test_who_is_voted_out_halts_nothing(signer: NodeId, halt: Halt) -> None:
    assert not halt_holds(halt, signer, {NodeId("e" * 64)}, "home", 0)


@given(policies, policies)
def test_a_policy_follows_itself_or_a_lower_epoch(before: FleetPolicy, after: FleetPolicy) -> None:
    may = why_policy_cannot_follow(before, after) is None
    assert may == (after == before or after.epoch > before.epoch)


@given(st.lists(policies, max_size=6))
def test_policies_that_follow_each_other_never_come_back(proposed: list[FleetPolicy]) -> None:
    current: FleetPolicy | None = None
    seen: list[FleetPolicy] = []
    for policy in proposed:
        if why_policy_cannot_follow(current, policy) is None:
            if policy != current:
                assert policy not in seen
                seen.append(policy)
            current = policy


def test_the_last_epoch_is_refused() -> None:
    """One above it could not be written, so nothing could ever be resumed."""
    assert why_policy_cannot_follow(None, FleetPolicy(epoch=EPOCH_MAX)) is not None
    assert why_policy_cannot_follow(None, FleetPolicy(epoch=EPOCH_MAX - 1)) is None


@given(st.integers(-1, MEMBERS_MAX + 2), st.integers(-1, MEMBERS_MAX + 2))
def test_a_quorum_is_k_of_n(members: int, threshold: int) -> None:
    assert (why_no_quorum(members, threshold) is None) == (1 <= threshold <= members <= MEMBERS_MAX)


def test_only_a_majority_that_can_lose_a_key_goes_unremarked() -> None:
    unremarked = {(n, k) for n in range(1, 6) for k in range(1, n + 1) if quorum_remark(n, k) is None}
    assert unremarked == {(3, 2), (4, 3), (5, 3), (5, 4)}


@given(policies, policies)
def test_a_change_is_shown_exactly_when_there_is_one(before: FleetPolicy, after: FleetPolicy) -> None:
    assert bool(policy_changes(before, after)) == (before != after)


def test_a_policys_changes_name_fields_and_list_items() -> None:
    before = FleetPolicy(epoch=1, allowed_models=("a", "b"))  # type: ignore[arg-type]
    after = FleetPolicy(epoch=2, allowed_models=("b", "c"), version_min="0.4")  # type: ignore[arg-type]
    assert [(change.what, change.before, change.after) for change in policy_changes(before, after)] == [
        ("allowed_models: removed", "a", ""),
        ("allowed_models: added", "", "c"),
        ("epoch", "1", "2"),
        ("version_min", "0", "0.4"),
    ]
    assert ("allowed_models", "any", "b, c") in [
        (change.what, change.before, change.after) for change in policy_changes(FleetPolicy(epoch=1), after)
    ]


def test_a_member_with_anothers_name_is_still_seen_to_be_another() -> None:
    old, new = NodeId("a" * 64), NodeId("b" * 64)
    changes = member_changes({old: "alice"}, 1, {new: "alice"}, 1, "council")
    assert [change.what for change in changes] == ["council: removed", "council: added"]
    assert old in changes[0].before
    assert new in changes[1].after


@given(st.text(max_size=80))
def test_whatever_somebody_is_called_there_is_a_publishers_name_near_it(text: str) -> None:
    name = publisher_name(text)
    assert why_no_publisher_name(name) is None
    assert publisher_name(name) == name
    for wrong in (name + "/", name + "*", "-" + name, name * 33, name + "\n", name.upper() + "É", ""):
        assert why_no_publisher_name(wrong) is not None
