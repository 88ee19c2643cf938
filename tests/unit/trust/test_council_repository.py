"""The council's repository: founding, publishing, renewing, halting, and crashing in between."""

import time
from pathlib import Path

import msgspec
import pytest

from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import CharterInvalid, CharterUnavailable, ConfigError, NotWorking
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.ceremonies import Wanted, proposal, publication_of, sign
from fallow.trust.council.client import CharterClient
from fallow.trust.council.fetch import FolderFetcher
from fallow.trust.council.files import CouncilPaths, found_council_of_one, read_base
from fallow.trust.council.halts import seal_halt
from fallow.trust.council.lists import delisting, listing
from fallow.trust.council.publication import decode_publication
from fallow.trust.council.publisher import publish_model
from fallow.trust.council.repository import Repository
from fallow.trust.keys import load
from tests.adversarial.council_world import (
    ALICE,
    BOB,
    CAROL,
    LEASE_S,
    LIST,
    MANIFEST,
    MODEL,
    NETWORK,
    NOW,
    PUBLISHER,
    World,
    identity,
    path_of,
    write_key,
)

RESUMED = FleetPolicy(epoch=2, lease_s=LEASE_S)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# --- a council of one -----------------------------------------------------------------------------


def test_a_council_of_one_is_founded_once_and_fast(tmp_path: Path) -> None:
    began = time.process_time()
    root = found_council_of_one(tmp_path, "home", NOW)
    assert publish_model(tmp_path, MANIFEST, NOW) == MODEL
    assert time.process_time() - began < 0.3
    before = files(tmp_path)
    assert found_council_of_one(tmp_path, "another name", NOW + 1) == root
    assert publish_model(tmp_path, MANIFEST, NOW + 1) == MODEL
    assert files(tmp_path) == before
    paths = CouncilPaths(tmp_path)
    client = CharterClient(root, NETWORK, tmp_path / "device", FolderFetcher(paths.repository))
    charter, halts = client.check(NOW + 1)
    assert (charter.policy.epoch, charter.models, halts) == (1, {MODEL}, ())
    assert list(charter.council.values()) == [load(paths.member_key).node]
    for path in (paths.member_key, paths.publisher_key, paths.online_keys / "1.key"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_council_of_one_goes_on_by_itself_after_years(tmp_path: Path) -> None:
    """Nobody at home knows that a council must meet."""
    root = found_council_of_one(tmp_path, "home", NOW)
    publish_model(tmp_path, MANIFEST, NOW)
    later = NOW + tuf.LIST_LIFE_S + tuf.ROOT_LIFE_S
    assert found_council_of_one(tmp_path, "home", later) == root
    repository = CouncilPaths(tmp_path).open_repository(NETWORK)
    repository.renew_timestamp(later)
    client = CharterClient(root, NETWORK, tmp_path / "device", FolderFetcher(repository.folder))
    assert client.check(later)[0].models == {MODEL}


def test_a_council_of_one_whose_publisher_is_another_goes_on_without_their_list(tmp_path: Path) -> None:
    """It cannot sign for them, and must not stop for that."""
    root = found_council_of_one(tmp_path, "home", NOW)
    publish_model(tmp_path, MANIFEST, NOW)
    paths = CouncilPaths(tmp_path)
    repository = paths.open_repository(NETWORK)
    base = read_base(FolderFetcher(repository.folder))
    wanted = Wanted(publishers={"models-dora": PUBLISHER.node})
    proposed, _ = sign(proposal(base, wanted, NOW), [load(paths.member_key), PUBLISHER])
    repository.publish(publication_of(proposed), NOW)
    repository.publish(listing(repository.in_force(), tuf.MODELS, {MODEL: MANIFEST}, PUBLISHER, NOW), NOW)
    later = NOW + tuf.LIST_LIFE_S - tuf.ROOT_LIFE_S / 4  # her list is old, and its half life gone
    found_council_of_one(tmp_path, "home", later)
    repository.renew_timestamp(later)
    client = CharterClient(root, NETWORK, tmp_path / "device", FolderFetcher(repository.folder))
    assert client.check(later)[0].models == {MODEL}
    later = NOW + tuf.LIST_LIFE_S + 1
    found_council_of_one(tmp_path, "home", later)
    repository.renew_timestamp(later)
    assert client.check(later)[0].models == frozenset()
    repository.publish(listing(repository.in_force(), tuf.MODELS, {}, PUBLISHER, later), later)
    assert client.check(later)[0].models == {MODEL}


def test_a_council_of_one_signs_its_own_list_anew_and_leaves_anothers_to_them(tmp_path: Path) -> None:
    """One publisher's list that ran out takes away that publisher's models."""
    root = found_council_of_one(tmp_path, "home", NOW)
    publish_model(tmp_path, MANIFEST, NOW)
    paths = CouncilPaths(tmp_path)
    repository = paths.open_repository(NETWORK)
    held = tuf.publishers(repository.in_force().targets.signed)
    wanted = Wanted(publishers={**held, "models-dora": PUBLISHER.node})
    proposed, _ = sign(
        proposal(read_base(FolderFetcher(repository.folder)), wanted, NOW), [load(paths.member_key), PUBLISHER]
    )
    repository.publish(publication_of(proposed), NOW)
    hers = {tuf.sha256(b"hers"): b"hers"}
    repository.publish(listing(repository.in_force(), tuf.MODELS, hers, PUBLISHER, NOW), NOW)
    client = CharterClient(root, NETWORK, tmp_path / "device", FolderFetcher(repository.folder))
    assert client.check(NOW)[0].models == {MODEL, *hers}
    for later in (NOW + tuf.LIST_LIFE_S - tuf.ROOT_LIFE_S / 4, NOW + tuf.LIST_LIFE_S + 1):
        found_council_of_one(tmp_path, "home", later)
        repository.renew_timestamp(later)
    assert client.check(later)[0].models == {MODEL}
    repository.publish(listing(repository.in_force(), tuf.MODELS, {}, PUBLISHER, later), later)
    assert client.check(later)[0].models == {MODEL, *hers}


def test_a_machine_without_a_publishers_key_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no device loads it before a publisher signed it"):
        publish_model(tmp_path, MANIFEST, NOW)


# --- publishing -----------------------------------------------------------------------------------


def test_a_refused_publication_changes_no_file(world: World) -> None:
    proposed, _ = sign(world.propose(policy=RESUMED), [ALICE, BOB])
    good = publication_of(proposed)
    before = files(world.repository.folder)
    assert good.targets is not None
    old = world.repository.in_force()
    too_old, _ = sign(world.propose(policy=RESUMED), [ALICE])
    for bad in (
        msgspec.structs.replace(good, policy=b"{}"),
        msgspec.structs.replace(good, policy=None),
        msgspec.structs.replace(good, targets=good.targets.replace(b'"version":2', b'"version":3')),
        msgspec.structs.replace(good, targets=too_old.targets.encode()),
        msgspec.structs.replace(good, root=old.root_bytes.replace(b'"version":1', b'"version":2')),
        msgspec.structs.replace(good, delegated={LIST: b"{}"}),
        msgspec.structs.replace(good, delegated={"evil": old.delegated[LIST][1]}),
    ):
        with pytest.raises(CharterInvalid):
            world.repository.publish(bad, world.now)
    assert files(world.repository.folder) == before
    world.repository.publish(good, world.now)
    assert world.repository.policy() == RESUMED


def test_a_model_needs_its_file(world: World) -> None:
    path = path_of(b"new")
    state = world.repository.in_force()
    publication = listing(state, tuf.MODELS, {tuf.sha256(b"new"): b"new"}, PUBLISHER, world.now)
    for broken in ({}, {path: b"old"}, {path: b"newer"}):
        with pytest.raises(CharterInvalid):
            world.repository.publish(msgspec.structs.replace(publication, files=broken), world.now)
    world.repository.publish(publication, world.now)
    assert world.repository.file(f"targets/models/publisher/{tuf.sha256(b'new')}.{tuf.sha256(b'new')}.json") == b"new"


def test_a_delisted_model_is_gone(world: World) -> None:
    publication = delisting(world.repository.in_force(), tuf.MODELS, MODEL, PUBLISHER, world.now)
    world.repository.publish(publication, world.now)
    world.serve()
    assert world.check().models == frozenset()


def test_publishing_the_same_again_changes_nothing_in_force(world: World) -> None:
    """A member whose connection broke does not know whether it arrived."""
    proposed, _ = sign(world.propose(policy=RESUMED, members={ALICE.node: "a", BOB.node: "b"}), [ALICE, BOB])
    first = world.repository.publish(publication_of(proposed), world.now)
    second = world.repository.publish(publication_of(proposed), world.now)
    assert (first.root_bytes, first.targets_bytes) == (second.root_bytes, second.targets_bytes)
    world.is_unharmed(epoch=2)


@pytest.mark.parametrize("crash_at", range(1, 7))
def test_a_crash_while_publishing_is_completed_by_publishing_again(
    world: World, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Goal: no crash leaves a repository that can neither serve the old state nor be brought to the new one.
    Method: writing stops at each file in turn; the old state must be there, or the same publication must complete it.
    """
    from fallow.trust.council import repository as module

    proposed, _ = sign(world.propose(policy=RESUMED, members={ALICE.node: "a", BOB.node: "b"}), [ALICE, BOB])
    written = 0
    write = module.write_durably

    def crashing(path: Path, data: bytes, *how: object) -> None:
        nonlocal written
        written += 1
        if written == crash_at:
            raise OSError("the power went off")
        write(path, data, *how)

    monkeypatch.setattr(module, "write_durably", crashing)
    with pytest.raises(OSError, match="power"):
        world.repository.publish(publication_of(proposed), world.now)
    monkeypatch.undo()
    world.repository = Repository(world.repository.folder, world.folder / "online", NETWORK)
    world.serve()
    assert world.check().policy.epoch in {1, 2}
    world.repository.publish(publication_of(proposed), world.now)
    world.is_unharmed(epoch=2)


def test_a_publication_travels(world: World) -> None:
    publication = publication_of(sign(world.propose(policy=RESUMED), [ALICE, BOB])[0])
    assert decode_publication(msgspec.msgpack.encode(publication)) == publication
    for data in (b"", b"\xc1", b"\x81\xa4root\x01", b"\x81\xa5extra\xc0"):
        with pytest.raises(CharterInvalid):
            decode_publication(data)


# --- renewing and halting -------------------------------------------------------------------------


def test_a_timestamp_is_renewed_for_a_lease(world: World) -> None:
    assert world.repository.renew_timestamp(world.now + 10) == world.now + 10 + LEASE_S
    assert world.repository.timestamp_expires_unix_s() == world.now + 10 + LEASE_S
    assert world.repository.renew_timestamp(world.now, lease_s=5) == world.now + 5


def test_the_snapshot_is_renewed_in_time(world: World) -> None:
    for _ in range(5):
        world.renew(tuf.SNAPSHOT_LIFE_S * 0.4)
        world.check()


def test_a_renewal_costs_little(world: World) -> None:
    """It is asked for often. Measured on a quiet core: 1 ms of work, and what the disk takes for one file."""
    world.repository.renew_timestamp(world.now)
    began = time.process_time()
    for _ in range(50):
        world.repository.renew_timestamp(world.now)
    assert (time.process_time() - began) / 50 < 0.010


def test_publishing_without_the_networks_name_extends_no_lease_while_halts_are_kept(world: World) -> None:
    """`fallow model add` opens the repository so: it cannot read halts, and must not renew past one."""
    world.repository.add_halt(seal_halt(ALICE, NETWORK, 1, "smoke", world.now))
    expires = world.repository.timestamp_expires_unix_s()
    nameless = Repository(world.repository.folder, world.folder / "online")
    files = {tuf.sha256(b"new"): b"new"}
    nameless.publish(listing(nameless.in_force(), tuf.MODELS, files, PUBLISHER, world.now), world.now + 60)
    assert world.repository.timestamp_expires_unix_s() == expires


def test_nothing_is_renewed_while_a_halt_holds(world: World) -> None:
    assert world.repository.add_halt(seal_halt(CAROL, NETWORK, 1, "smoke", world.now)) is not None
    for repository in (world.repository, Repository(world.repository.folder, world.folder / "online", NETWORK)):
        with pytest.raises(NotWorking, match="smoke") as refusal:
            repository.renew_timestamp(world.now)
        assert refusal.value.standing == "halted"
    world.put_in_force(world.propose(policy=RESUMED), [ALICE, BOB])
    assert world.repository.halts() == ()
    world.is_unharmed(epoch=2)


def test_a_publication_that_does_not_end_a_halt_extends_nothing(world: World) -> None:
    world.repository.add_halt(seal_halt(CAROL, NETWORK, 5, "smoke", world.now))
    expires = world.repository.timestamp_expires_unix_s()
    world.now += 60
    world.put_in_force(world.propose(policy=RESUMED), [ALICE, BOB])
    assert world.repository.timestamp_expires_unix_s() == expires
    with pytest.raises(NotWorking):
        world.repository.renew_timestamp(world.now)


def test_a_device_that_knows_of_no_halt_hears_why_nothing_is_renewed(world: World) -> None:
    """Its check fails, since the timestamp expired; the words say that somebody meant it."""
    world.repository.add_halt(seal_halt(CAROL, NETWORK, 1, "smoke in the cellar", world.now))
    world.serve()
    world.now += LEASE_S + 1
    with pytest.raises(CharterInvalid, match="smoke in the cellar"):
        world.check()


def test_the_online_key_is_taken_from_those_in_the_folder(world: World) -> None:
    new = identity("second online key")
    with pytest.raises(CharterUnavailable, match="none of the keys"):
        world.put_in_force(world.propose(online=new.node), [ALICE, BOB])
    assert world.repository.in_force().root.signed.version == 1
    write_key(world.folder / "online", new)
    world.put_in_force(world.propose(online=new.node), [ALICE, BOB])
    world.is_unharmed()


def test_a_folder_without_a_repository_says_so(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "none", tmp_path / "online", NETWORK)
    assert not repository.exists
    with pytest.raises(CharterUnavailable):
        repository.renew_timestamp(NOW)
