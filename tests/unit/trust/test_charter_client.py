"""A device's check of the repository, where nobody attacks. Attacks are in tests/adversarial/test_tuf_*.py."""

from pathlib import Path

import msgspec
import pytest
from tuf.ngclient._internal import trusted_metadata_set

from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import CharterInvalid, CharterUnavailable
from fallow.trust.council.client import LAST_POLICY, CharterClient, last_known
from fallow.trust.council.fetch import FolderFetcher
from tests.adversarial.council_world import (
    ALICE,
    BOB,
    COUNCIL,
    LEASE_S,
    MODEL,
    NETWORK,
    World,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_charter_says_what_was_signed(world: World) -> None:
    charter = world.check()
    assert charter.policy == FleetPolicy(epoch=1, lease_s=LEASE_S)
    assert set(charter.council.values()) == set(COUNCIL)
    assert charter.models == {MODEL}
    assert charter.releases == frozenset()
    assert charter.timestamp_expires_unix_s == world.now + LEASE_S
    assert (charter.root_version, charter.timestamp_version) == (1, 2)


def test_a_renewal_is_a_newer_timestamp_and_the_rest_is_the_same(world: World) -> None:
    before = world.check()
    world.renew(10)
    after = world.check()
    assert after.timestamp_version == before.timestamp_version + 1
    assert after.timestamp_expires_unix_s == before.timestamp_expires_unix_s + 10
    assert after.models == before.models


@pytest.mark.parametrize("ahead_s", [-1e9, -1.0, 0.0, LEASE_S - 1])
def test_expiry_is_judged_by_the_time_that_is_given(world: World, ahead_s: float) -> None:
    """The clock of this machine is years away from the time of these tests, in either direction."""
    world.client.check(world.now + ahead_s)


def test_what_was_seen_is_known_after_a_restart(world: World) -> None:
    world.put_in_force(world.propose(policy=FleetPolicy(epoch=7, lease_s=LEASE_S)), [ALICE, BOB])
    world.serve()
    assert world.check().policy.epoch == 7
    again = world.new_client()
    assert again.check(world.now)[0].policy.epoch == 7
    council, epoch = last_known(world.folder / "device") or ({}, 0)
    assert set(council.values()) == set(COUNCIL) and epoch == 7


def test_a_python_tuf_that_keeps_its_time_elsewhere_is_not_trusted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better no lease than one judged by a clock that can be set back."""

    class Other(trusted_metadata_set.TrustedMetadataSet):
        @property
        def reference_time(self) -> None: ...

        @reference_time.setter
        def reference_time(self, _: object) -> None: ...

    monkeypatch.setattr("tuf.ngclient.updater.TrustedMetadataSet", Other)
    with pytest.raises(CharterUnavailable, match="time of python-tuf"):
        world.check()


def test_a_damaged_memory_of_the_last_policy_stops_rather_than_forgets(world: World) -> None:
    world.check()
    (world.folder / "device" / "last_policy.json").write_bytes(b"{")
    with pytest.raises(CharterUnavailable, match="does not know which policies are old"):
        world.new_client()


def test_a_damaged_cache_is_fetched_again(world: World) -> None:
    world.check()
    for path in (world.folder / "device").rglob("*.json"):
        if path.is_file() and path.name != "last_policy.json" and "root" not in path.name:
            path.write_bytes(b"\xff")
    assert world.new_client().check(world.now)[0].models == {MODEL}


def test_a_folder_of_another_network_is_not_trusted(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The descriptor's root counts, whatever lies in the folder."""
    other = World(tmp_path_factory.mktemp("other"))
    other.put_in_force(other.propose(members={ALICE.node: "alice", BOB.node: "bob"}), [ALICE, BOB])
    other.serve()
    other.check()
    root = world.repository.first_root().replace('"threshold":2', '"threshold":3')
    client = CharterClient(root, NETWORK, other.folder / "device", FolderFetcher(other.served))
    with pytest.raises(CharterInvalid):  # nobody signed that root
        client.check(other.now)


def test_a_repository_that_is_not_there_is_unavailable(world: World) -> None:
    root = world.repository.first_root()
    client = CharterClient(root, NETWORK, world.folder / "device2", FolderFetcher(world.folder / "nowhere"))
    with pytest.raises(CharterUnavailable):
        client.check(world.now)


def test_in_another_network_policies_begin_anew_and_back_in_the_same_they_do_not(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What a device keeps when it leaves, or when its network is founded anew by the same people with the same keys:
    another network's epochs and versions say nothing."""
    folder = world.folder / "device"
    other = World(tmp_path_factory.mktemp("other"))
    other.put_in_force(other.propose(policy=FleetPolicy(epoch=7, lease_s=LEASE_S)), [ALICE, BOB])
    other.serve()
    root, fetcher = other.repository.first_root(), FolderFetcher(other.served)
    theirs = CharterClient(root, "0b" * 32, folder, fetcher)
    assert theirs.check(other.now)[0].policy.epoch == 7
    assert world.new_client().check(world.now)[0].policy.epoch == 1
    assert last_known(folder) is not None
    kept = folder / LAST_POLICY
    seen = kept.read_bytes().replace(b'"epoch":1', b'"epoch":2')
    kept.write_bytes(seen)
    with pytest.raises(CharterInvalid, match="cannot follow"):  # the same network's last word was of epoch 2
        world.new_client().check(world.now)


def test_a_last_policy_from_before_networks_were_written_down_counts_and_is_written_anew(world: World) -> None:
    world.check()
    kept = world.folder / "device" / LAST_POLICY
    kept.write_bytes(msgspec.json.encode(FleetPolicy(epoch=2, lease_s=LEASE_S)))
    with pytest.raises(CharterInvalid, match="cannot follow"):
        world.new_client().check(world.now)
    kept.write_bytes(msgspec.json.encode(FleetPolicy(epoch=1, lease_s=LEASE_S)))
    world.new_client().check(world.now)
    assert NETWORK.encode() in kept.read_bytes()
