"""Attacks on what the council signs: on the metadata, on the way that it comes, and with stolen keys.

The real client over a real repository (a folder; HTTPS where the line is the attack). Each test states the attack, the
refusal that is expected, and what stayed unharmed. Unless it says otherwise, the attacker serves the device whatever it
likes (a captured registrar, a captured line), and has the keys that the test names.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Root, TargetFile, Targets, Timestamp
from typer.testing import CliRunner, Result

from fallow.cli.app import app
from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import CharterInvalid, ConfigError, NotWorking, SignatureInvalid
from fallow.policy.council import HALT_EPOCHS_AHEAD, PUBLISHERS_MAX, resuming_epoch
from fallow.trust.council import retention
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.ceremonies import publication_of, sign
from fallow.trust.council.client import CharterClient
from fallow.trust.council.fetch import FolderFetcher
from fallow.trust.council.figures import FIGURES_FIELD
from fallow.trust.council.files import read_base
from fallow.trust.council.halts import HaltBook, halt_text, seal_halt
from fallow.trust.council.lists import delisting, listing
from fallow.trust.council.pins import Pin, check_pin
from fallow.trust.council.proposals import PROPOSAL_MAX_BYTES, Proposal, first_root_payload, review
from fallow.trust.council.publication import Publication, verify
from fallow.trust.council.repository import Repository
from tests.adversarial.council_world import (
    ALICE,
    BOB,
    CAROL,
    COUNCIL,
    LEASE_S,
    LIST,
    MALLORY,
    MANIFEST,
    MODEL,
    NETWORK,
    ONLINE,
    POLICY,
    PUBLISHER,
    Forger,
    World,
    identity,
    path_of,
    write_key,
)

LOOSE = FleetPolicy(epoch=2, lease_s=86_400.0)
"""What an attacker would like to be the policy."""


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return World(tmp_path_factory.mktemp("founded")).folder


@pytest.fixture
def world(founded: Path, tmp_path: Path) -> World:
    shutil.copytree(founded, tmp_path, dirs_exist_ok=True)
    made = World(tmp_path)
    assert made.check().models == {MODEL}
    return made


def refused(world: World, match: str | None = None) -> None:
    with pytest.raises(CharterInvalid, match=match):
        world.check()
    with pytest.raises(CharterInvalid):  # and after a restart
        world.new_client().check(world.now)


# --- rollback -------------------------------------------------------------------------------------


def test_an_old_timestamp_comes_back(world: World) -> None:
    """
    Attack: the timestamp of a minute ago is served again, to hide what was published since.
    Expected: `CharterInvalid`, also after a restart of the device.
    Unharmed: the honest timestamp is believed as before.
    """
    old = (world.served / "metadata" / "timestamp.json").read_bytes()
    world.renew()
    world.check()
    Forger(world).put("timestamp.json", old)
    refused(world, "version")
    world.is_unharmed()


def test_an_old_snapshot_comes_back(world: World) -> None:
    """
    Attack: with the stolen online key, a newer timestamp names the snapshot from before the last publication.
    Expected: `CharterInvalid`.
    Unharmed: the honest repository, once the council gave the registrar another key.
    """
    thief = Forger(world, ONLINE)
    version = thief.state.snapshot.signed.version - 1
    data = (thief.metadata / f"{version}.snapshot.json").read_bytes()
    thief.timestamp(MetaFile(version, len(data), {"sha256": tuf.sha256(data)}))
    refused(world, "version")
    world.recovers()


def test_an_old_policy_comes_back_under_a_new_snapshot(world: World) -> None:
    """
    Attack: with the stolen online key, a new snapshot names the policy's metadata from before a change.
    Expected: `CharterInvalid`.
    Unharmed: the policy of the higher epoch stays in force.
    """
    old = world.repository.in_force().targets_bytes
    world.put_in_force(world.propose(policy=FleetPolicy(epoch=2, lease_s=60)), [ALICE, BOB])
    world.serve()
    assert world.check().policy.epoch == 2
    Forger(world, ONLINE).lists({"targets": old})
    refused(world)
    world.recovers(epoch=2)


def test_a_removed_model_comes_back(world: World) -> None:
    """
    Attack: with the stolen online key, the publisher's list from before a model was added (or withdrawn) is served.
    Expected: `CharterInvalid`: lists have versions, too.
    Unharmed: the newer list.
    """
    old = world.repository.in_force().delegated[LIST][1]
    added = world.publish_model(b'{"name":"second"}')
    world.serve()
    assert world.check().models == {MODEL, added}
    Forger(world, ONLINE).lists({LIST: old})
    refused(world)


def test_a_list_vanishes_from_the_snapshot(world: World) -> None:
    """
    Attack: with the stolen online key, a new snapshot has no entry for the publisher's list any more.
    Expected: `CharterInvalid`.
    Unharmed: the honest repository.
    """
    thief = Forger(world, ONLINE)
    meta = dict(thief.state.snapshot.signed.meta)
    del meta[f"{LIST}.json"]
    thief.snapshot(meta)
    refused(world, LIST)
    fresh = CharterClient(world.repository.first_root(), NETWORK, world.folder / "fresh", FolderFetcher(world.served))
    with pytest.raises(CharterInvalid, match="leaves the list"):  # and a device that never saw the list
        fresh.check(world.now)
    world.recovers()


def test_an_old_council_comes_back(world: World) -> None:
    """
    Attack: after Carol was voted out, the registrar hides the new root, or serves the old one under the next number.
    Expected: the device stays with the new council; the renumbered root is refused.
    Unharmed: the council without Carol.
    """
    world.put_in_force(world.propose(members={ALICE.node: "alice", BOB.node: "bob"}), [ALICE, BOB])
    world.serve()
    assert CAROL.node not in world.check().council.values()
    (world.served / "metadata" / "2.root.json").unlink()
    assert CAROL.node not in world.check().council.values()
    assert CAROL.node not in world.new_client().check(world.now)[0].council.values()
    Forger(world).put("3.root.json", (world.served / "metadata" / "1.root.json").read_bytes())
    refused(world, "version")
    world.is_unharmed()


# --- freeze ---------------------------------------------------------------------------------------


def test_a_frozen_repository(world: World) -> None:
    """
    Attack: the registrar goes on serving what it served, so that a halt or a new policy never shows.
    Expected: `CharterInvalid` from the moment on that the timestamp expires, one lease after its last renewal.
    Unharmed: the device works again as soon as a new timestamp comes.
    """
    world.now += LEASE_S - 1
    world.check()
    world.now += 1
    refused(world, "expired")
    world.is_unharmed()


def test_a_frozen_repository_and_a_clock_set_back(world: World) -> None:
    """
    Attack: as before, and the device's clock is set back to before the expiry.
    Expected: `CharterInvalid`. The reference time is the caller's floor, which no clock takes back: it is far from this
    machine's clock in all of these tests, and is what decides.
    Unharmed: nothing was extended; a new timestamp is believed.
    """
    real_time = tuf.read(Timestamp, (world.served / "metadata" / "timestamp.json").read_bytes()).signed
    assert not real_time.is_expired()  # by the clock of this machine, which is behind, it would be good
    world.now += LEASE_S + 1
    refused(world, "expired")
    world.is_unharmed()


def test_an_expired_council(world: World) -> None:
    """
    Attack: keys of a council that has not met for more than a year may have leaked since; the root is expired.
    Expected: `CharterInvalid`, even with a fresh timestamp.
    Unharmed: a council that meets again is believed (it may be late).
    """
    world.now += tuf.ROOT_LIFE_S + 1
    world.renew()
    refused(world, "expired")
    world.put_in_force(world.propose(), [ALICE, CAROL, PUBLISHER])
    world.is_unharmed()


# --- mix and match --------------------------------------------------------------------------------


def test_documents_of_two_states_are_mixed(world: World) -> None:
    """
    Attack: two changes of the same version were signed by the quorum, one was published; the other one's policy
    metadata is served in its place.
    Expected: `CharterInvalid`: the snapshot names the digest of the published one.
    Unharmed: the published change.
    """
    published = world.propose(policy=FleetPolicy(epoch=2, lease_s=60))
    dropped, _ = sign(world.propose(policy=LOOSE), [ALICE, BOB])
    world.put_in_force(published, [ALICE, BOB])
    world.serve()
    Forger(world).put("2.targets.json", dropped.targets.encode())
    refused(world, r"(?i)length|hash")
    world.is_unharmed(epoch=2)


def test_a_snapshot_of_another_state(world: World) -> None:
    """
    Attack: the timestamp is new, the snapshot file behind its name is an old one.
    Expected: `CharterInvalid`.
    Unharmed: the honest repository.
    """
    old = (world.served / "metadata" / "2.snapshot.json").read_bytes()
    world.publish_model(b'{"name":"second"}')
    world.serve()
    Forger(world).put("3.snapshot.json", old)
    refused(world)
    world.serve()
    assert len(world.check().models) == 2


# --- signatures -----------------------------------------------------------------------------------


def test_a_timestamp_by_a_stranger(world: World) -> None:
    """
    Attack: a timestamp that never ends, signed with a key that the root does not name.
    Expected: `CharterInvalid`.
    Unharmed: nothing of it was kept.
    """
    meta = tuf.read(Timestamp, (world.served / "metadata" / "timestamp.json").read_bytes()).signed.snapshot_meta
    Forger(world, MALLORY).timestamp(meta, version=1000, expires_unix_s=world.now + 1e9)
    refused(world, "signed by 0/1")
    world.is_unharmed()


def test_a_policy_by_a_stranger(world: World) -> None:
    """
    Attack: with the stolen online key, a policy signed by two strangers.
    Expected: `CharterInvalid`.
    Unharmed: the policy in force.
    """
    Forger(world, ONLINE).policy(LOOSE, MALLORY, identity("trudy"))
    refused(world, "signed by 0/2")
    world.recovers()


def test_a_policy_by_the_registrar(world: World) -> None:
    """
    Attack: a captured registrar signs a policy with its own key.
    Expected: `CharterInvalid`: its key counts for timestamps and snapshots only.
    Unharmed: the policy in force.
    """
    Forger(world, ONLINE).policy(LOOSE, ONLINE)
    refused(world, "signed by 0/2")


def test_a_policy_with_too_few_signatures(world: World) -> None:
    """
    Attack: one council key and the online key are stolen; a policy comes with one signature of the two that it needs.
    Expected: `CharterInvalid` on the device; the repository does not publish it either.
    Unharmed: the policy in force.
    """
    Forger(world, ONLINE).policy(LOOSE, CAROL)
    refused(world, "signed by 1/2")
    proposed, _ = sign(world.propose(policy=LOOSE), [CAROL])
    with pytest.raises(CharterInvalid, match="1 of the 2"):
        publication_of(proposed)
    publication = Publication(targets=proposed.targets.encode(), policy=proposed.policy.encode())
    with pytest.raises(CharterInvalid, match="1 valid signatures of the 2"):
        world.repository.publish(publication, world.now)
    world.recovers()


def test_a_council_by_one_member(world: World) -> None:
    """
    Attack: a thief of one member's key makes themselves the whole council.
    Expected: `CharterInvalid`: a new council needs the threshold of the old one.
    Unharmed: the council.
    """
    root = copy.deepcopy(world.repository.in_force().root.signed)
    root.version = 2
    for role in ("root", "targets"):
        root.roles[role].keyids = []
        root.roles[role].threshold = 1
        root.add_key(tuf.public_key(CAROL.node), role)
    Forger(world, CAROL).root(root)
    refused(world, "signed by 1/2")
    world.is_unharmed()


def test_a_council_of_strangers_signed_by_itself(world: World) -> None:
    """
    Attack: a new root, well signed by the strangers that it names, and by nobody of the old council.
    Expected: `CharterInvalid`.
    Unharmed: the council.
    """
    root = copy.deepcopy(world.repository.in_force().root.signed)
    root.version = 2
    for role in ("root", "targets"):
        root.roles[role].keyids = []
        for stranger in (MALLORY, identity("trudy")):
            root.add_key(tuf.public_key(stranger.node), role)
    Forger(world, MALLORY, identity("trudy")).root(root)
    refused(world, "signed by 0/2")
    world.is_unharmed()


# --- one key counted twice ------------------------------------------------------------------------


def test_one_signature_given_twice(world: World) -> None:
    """
    Attack: one member's signature stands twice in the list of signatures.
    Expected: `CharterInvalid`, on the device and in a proposal.
    Unharmed: the policy in force.
    """
    signed, _ = sign(world.propose(policy=LOOSE), [CAROL])
    doubled = json.loads(signed.targets)
    doubled["signatures"] *= 2
    data = json.dumps(doubled).encode()
    thief = Forger(world, ONLINE)
    thief.put("2.targets.json", data)
    meta = dict(thief.state.snapshot.signed.meta)
    meta["targets.json"] = MetaFile(2, len(data), {"sha256": tuf.sha256(data)})
    thief.snapshot(meta)
    refused(world)
    with pytest.raises(CharterInvalid):
        publication_of(msgspec.structs.replace(signed, targets=data.decode()))


def doubled_root(world: World, version: int) -> Root:
    """A council of Carol, twice: her key under its own id, and under another one."""
    root = copy.deepcopy(world.repository.in_force().root.signed)
    root.version = version
    other = SSlibKey("0" * 64, "ed25519", "ed25519", {"public": CAROL.node.upper()})
    for role in ("root", "targets"):
        root.roles[role].keyids = []
        root.add_key(tuf.public_key(CAROL.node), role)
        root.add_key(other, role)
    return root


def doubly_signed(metadata: Metadata[Root] | Metadata[Targets]) -> bytes:
    """Carol signs twice, once under each id."""
    tuf.sign(metadata, [CAROL])
    key = tuf.signer_of(CAROL)
    other = SSlibKey("0" * 64, "ed25519", "ed25519", {"public": CAROL.node.upper()})
    metadata.sign(CryptoSigner(key._private_key, other), append=True)
    return metadata.to_bytes()


def test_one_key_under_two_ids(world: World) -> None:
    """
    Attack: the quorum was tricked into a council in which Carol's key stands twice, under two ids (and in other
    spelling), so that she alone is two of two. python-tuf counts ids.
    Expected: `CharterInvalid` on the device; the repository does not publish it, and nobody can propose it.
    Unharmed: what was in force stays known; no policy of hers is believed.
    """
    metadata = tuf.sign(Metadata(doubled_root(world, 2)), [ALICE, BOB])
    data = doubly_signed(metadata)
    with pytest.raises(CharterInvalid, match="twice"):
        world.repository.publish(Publication(root=data), world.now)
    Forger(world, ONLINE).put("2.root.json", data)
    targets = tuf.read(Targets, world.repository.in_force().targets_bytes)
    targets.signed.version += 1
    Forger(world, ONLINE).lists({"targets": doubly_signed(targets)})
    refused(world, "twice")


def test_one_key_under_two_ids_on_the_way_to_a_clean_council(world: World) -> None:
    """
    Attack: as before, and at once a third root with clean keys, signed by Carol's two ids: the newest root looks fine.
    Expected: `CharterInvalid`: every root on the way is looked at.
    Unharmed: no policy of the captured council is believed.
    """
    Forger(world).put("2.root.json", doubly_signed(tuf.sign(Metadata(doubled_root(world, 2)), [ALICE, BOB])))
    clean = copy.deepcopy(world.repository.in_force().root.signed)
    clean.version = 3
    for role in ("root", "targets"):
        clean.roles[role].keyids = []
        clean.roles[role].threshold = 1
        clean.add_key(tuf.public_key(MALLORY.node), role)
    Forger(world).put("3.root.json", doubly_signed(tuf.sign(Metadata(clean), [MALLORY])))
    targets = tuf.read(Targets, world.repository.in_force().targets_bytes)
    targets.signed.version += 1
    Forger(world, ONLINE).lists({"targets": tuf.sign(targets, [MALLORY]).to_bytes()})
    refused(world, "twice")


def test_a_publisher_counted_twice(world: World) -> None:
    """
    Attack: the quorum was shown one key under two ids as two publishers, in one role or in two.
    Expected: `CharterInvalid`.
    Unharmed: no model of that publisher is loaded.
    """
    targets = tuf.read(Targets, world.repository.in_force().targets_bytes)
    targets.signed.version += 1
    assert targets.signed.delegations is not None
    other = SSlibKey("0" * 64, "ed25519", "ed25519", {"public": PUBLISHER.node.upper()})
    targets.signed.add_key(other, LIST)
    targets.signatures.clear()
    Forger(world, ONLINE).lists({"targets": tuf.sign(targets, [ALICE, BOB]).to_bytes()})
    refused(world, "twice")
    with pytest.raises(CharterInvalid, match="two publishers"):
        world.propose(publishers={LIST: PUBLISHER.node, "models-twin": PUBLISHER.node})


# --- fast forward ---------------------------------------------------------------------------------


def test_fast_forward_and_recovery(world: World) -> None:
    """
    Attack: with the stolen online key, versions jump to 2^50, so that no honest timestamp is ever newer.
    Expected: the thief's is believed (it has the key), and honest ones are then refused: devices stop with their lease.
    Unharmed: the council gives the registrar another key; devices drop what the old key signed, and go on.
    """
    far = 1 << 50
    thief = Forger(world, ONLINE)
    thief.lists({}, snapshot_version=far, timestamp_version=far)
    assert world.check().timestamp_version == far
    world.renew()
    refused(world, "version")
    world.recovers()
    assert world.check().root_version == 2
    Forger(world, ONLINE).lists({}, snapshot_version=far + 1, timestamp_version=far + 1)
    refused(world, "signed by 0/1")  # the stolen key is worth nothing now


# --- publishers -----------------------------------------------------------------------------------


def lists_of(world: World, targets: dict[str, TargetFile], delegations: Delegations | None = None) -> bytes:
    """A list of models with these entries, signed by the publisher whose key was stolen."""
    current = world.repository.in_force().delegated[LIST][0].signed
    expires = tuf.utc(world.now + tuf.LIST_LIFE_S)
    merged = {**current.targets, **targets}
    signed = Targets(version=current.version + 1, expires=expires, targets=merged, delegations=delegations)
    return tuf.sign(Metadata(signed), [PUBLISHER]).to_bytes()


def target(path: str, data: bytes) -> dict[str, TargetFile]:
    return {path: TargetFile.from_data(path, data, ["sha256"])}


def test_a_publisher_signs_a_policy(world: World) -> None:
    """
    Attack: a publisher's and the online key are stolen; the list of models has an entry `policy.json`.
    Expected: it is not there for devices; the repository does not publish it (`CharterInvalid`).
    Unharmed: the policy in force, and the models.
    """
    data = tuf.encode_policy(LOOSE)
    forged = lists_of(world, target(tuf.POLICY, data))
    with pytest.raises(CharterInvalid, match="may not sign this"):
        world.repository.publish(Publication(delegated={LIST: forged}, files={tuf.POLICY: data}), world.now)
    thief = Forger(world, ONLINE)
    thief.target(f"{tuf.sha256(data)}.{tuf.POLICY}", data)
    thief.lists({LIST: forged})
    assert world.check().policy == POLICY
    assert world.check().models == {MODEL}


def test_a_publisher_of_models_signs_a_release(world: World) -> None:
    """
    Attack: a publisher of models lists `releases/publisher/9.9.9.json`.
    Expected: no device takes it for a release.
    Unharmed: models and releases.
    """
    Forger(world, ONLINE).lists({LIST: lists_of(world, target("releases/publisher/9.9.9.json", b"evil"))})
    assert world.check().releases == frozenset()
    assert world.check().models == {MODEL}


def test_a_model_under_another_models_digest(world: World) -> None:
    """
    Attack: a publisher lists an evil file under the path of a digest that people trust.
    Expected: the entry is not there for devices: path and digest must be the same.
    Unharmed: the honest model.
    """
    trusted = "7" * 64
    Forger(world, ONLINE).lists({LIST: lists_of(world, target(f"models/publisher/{trusted}.json", b"evil"))})
    assert world.check().models == {MODEL}


@pytest.mark.parametrize(
    "path",
    [
        "models/../policy.json",
        "models/publisher/../policy.json",
        "models/publisher/a/b.json",
        "/models/publisher/x.json",
        "models/publisher/" + "A" * 64 + ".json",
        "models/publisher/.json",
        "models/publisher",
        f"{tuf.sha256(b'evil')}.json",
        f"models/publisher/{tuf.sha256(b'evil')}",
    ],
)
def test_a_path_that_escapes(world: World, path: str) -> None:
    """
    Attack: a publisher lists a path outside of its own, or one that a file system reads differently.
    Expected: it is not there for devices, and is not published.
    Unharmed: the honest model.
    """
    forged = lists_of(world, target(path, b"evil"))
    with pytest.raises(CharterInvalid):
        world.repository.publish(Publication(delegated={LIST: forged}, files={path: b"evil"}), world.now)
    Forger(world, ONLINE).lists({LIST: forged})
    assert world.check().models == {MODEL}


def test_a_model_that_nobody_signed(world: World) -> None:
    """
    Attack: a coordinator orders a device to load a model that is in no metadata, or in a list signed by a stranger.
    Expected: its digest is not among the charter's models; the stranger's list is refused, `CharterInvalid`.
    Unharmed: the honest model.
    """
    evil = tuf.sha256(b"evil")
    assert evil not in world.check().models
    current = world.repository.in_force().delegated[LIST][0].signed
    forged = Targets(version=current.version + 1, expires=tuf.utc(world.now + 1000))
    forged.targets = {**current.targets, **target(path_of(b"evil"), b"evil")}
    Forger(world, ONLINE).lists({LIST: tuf.sign(Metadata(forged), [MALLORY]).to_bytes()})
    refused(world, "signed by 0/1")
    with pytest.raises(CharterInvalid, match="has not made"):
        listing(world.repository.in_force(), tuf.MODELS, {}, MALLORY, world.now)


def test_a_model_that_the_policy_does_not_allow(world: World) -> None:
    """
    Attack: a stolen publisher's key signs an evil model; the council allows named models only.
    Expected: it is listed, and still not among the charter's models.
    Unharmed: the allowed model.
    """
    allowed = FleetPolicy(epoch=2, lease_s=LEASE_S, allowed_models=(MODEL,))
    world.put_in_force(world.propose(policy=allowed), [ALICE, BOB])
    world.publish_model(b"evil")
    world.is_unharmed(epoch=2)


def test_a_publisher_who_was_voted_out(world: World) -> None:
    """
    Attack: a publisher whose key was replaced goes on publishing.
    Expected: `CharterInvalid`, in the repository and on devices.
    Unharmed: the list, which the new key signed anew.
    """
    heir = identity("heir")
    world.put_in_force(world.propose(publishers={LIST: heir.node}), [ALICE, BOB, heir])
    world.serve()
    assert world.check().models == {MODEL}
    forged = lists_of(world, target(path_of(b"evil"), b"evil"))
    with pytest.raises(CharterInvalid, match="0 valid signatures of the 1"):
        world.repository.publish(Publication(delegated={LIST: forged}), world.now)
    Forger(world, ONLINE).lists({LIST: forged})
    refused(world, "signed by 0/1")


def test_a_list_that_runs_out_on_purpose(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """
    Attack: with a publisher's stolen key, a list that expires in a minute is published, so that no check succeeds then.
    Expected: `CharterInvalid`: what is published lives a week or more; one that did run out lists nothing, and is
    warned of once.
    Unharmed: policy, council and lease; the models, once their publisher signs again.
    """
    for life_s in (60.0, tuf.LIFE_MIN_S - 60):
        expires = tuf.utc(world.now + life_s)
        current = world.repository.in_force().delegated[LIST][0].signed
        short = Targets(version=current.version + 1, expires=expires, targets=current.targets)
        signed = tuf.sign(Metadata(short), [PUBLISHER]).to_bytes()
        with pytest.raises(CharterInvalid, match="7 days"):
            world.repository.publish(Publication(delegated={LIST: signed}), world.now)
    expires = tuf.utc(world.now + tuf.LIFE_MIN_S + 1)
    week = Targets(version=current.version + 1, expires=expires, targets=current.targets)
    signed = tuf.sign(Metadata(week), [PUBLISHER]).to_bytes()
    world.repository.publish(Publication(delegated={LIST: signed}), world.now)
    world.renew(tuf.LIFE_MIN_S + 2)
    for _ in range(3):
        charter = world.check()
        assert (charter.models, charter.policy) == (frozenset(), POLICY)
    assert charter.timestamp_expires_unix_s == pytest.approx(world.now + LEASE_S, abs=1)
    assert sum("lists nothing" in each.message for each in caplog.records) == 1
    world.publish_model(MANIFEST)
    world.is_unharmed()


def test_a_publisher_who_vetoes_the_own_replacement(world: World) -> None:
    """
    Attack: a thief of a publisher's key sees the council's proposal to replace it, and publishes list after list
    meanwhile, so that the one in the proposal is never the next; the thief lists a model of its own.
    Expected: the proposal is in force all the same, and what it withdraws is gone; the thief publishes no more.
    Unharmed: the honest model, which the new key signed anew.
    """
    evil = world.publish_model(b"evil")
    heir = identity("heir")
    wanted = {
        "publishers": {LIST: heir.node},
        "withdraw": {LIST: frozenset({tuf.path_of(LIST, evil)})},
    }
    proposed = world.propose(**wanted)
    assert (f"{LIST}: withdrawn", evil, "") in shown(proposed)
    assert (f"{LIST}: signed anew", MODEL, MODEL) in shown(proposed)
    for index in range(5):
        world.publish_model(b"evil %d" % index)
    world.put_in_force(proposed, [ALICE, BOB, heir])
    world.is_unharmed()
    with pytest.raises(CharterInvalid, match="has not made"):
        world.publish_model(b"evil again")
    world.is_unharmed()


def test_a_publisher_who_withdraws_what_the_own_replacement_keeps(world: World) -> None:
    """
    Attack: a thief of a publisher's key sees the council's proposal to replace it, and takes the honest model off the
    list, so that the proposal names an entry whose file does not come; or has drafted one with false figures in it.
    Expected: the proposal is in force all the same: the file is still here, and is checked again; `CharterInvalid` for
    an entry that is not what Fallow makes of its file.
    Unharmed: the honest model, which the new key signed anew.
    """
    heir = identity("heir")
    proposed = world.propose(publishers={LIST: heir.node})
    world.repository.publish(delisting(world.repository.in_force(), tuf.MODELS, MODEL, PUBLISHER, world.now), world.now)
    world.publish_model(b"evil")
    forged = tuf.read(Targets, proposed.delegated[LIST])
    forged.signed.targets[path_of(MANIFEST)].unrecognized_fields["custom"] = {FIGURES_FIELD: {"name": "evil"}}
    signed, _ = sign(proposed, [ALICE, BOB, heir])
    lying = {LIST: tuf.sign(forged, [heir]).to_bytes()}
    with pytest.raises(CharterInvalid, match="other figures"):
        world.repository.publish(msgspec.structs.replace(publication_of(signed), delegated=lying), world.now)
    world.put_in_force(proposed, [ALICE, BOB, heir])
    world.is_unharmed()
    assert world.repository.file(f"targets/models/publisher/{tuf.sha256(b'evil')}.{tuf.sha256(b'evil')}.json") is None


def test_one_publisher_of_two_vetoes_the_own_removal(world: World) -> None:
    """
    Attack: of two publishers one was captured, publishes meanwhile, and signs nothing of the proposal that removes it.
    Expected: the proposal needs no word of it and is in force; whatever it signed is gone, and it publishes no more.
    Unharmed: the other's models.
    """
    role = world.add_publisher(MALLORY, "other")
    evil = world.publish_model(b"evil", MALLORY)
    proposed = world.propose(publishers={LIST: PUBLISHER.node})
    assert (f"{role}: withdrawn", evil, "") in shown(proposed)
    world.publish_model(b"evil, too", MALLORY)
    world.serve()
    assert len(world.check().models) == 3
    forged = world.repository.in_force().delegated[role][1]
    world.put_in_force(proposed, [ALICE, BOB])
    world.is_unharmed()
    with pytest.raises(CharterInvalid, match="has not made"):
        world.publish_model(b"evil again", MALLORY)
    with pytest.raises(CharterInvalid, match="delegated nothing to"):
        world.repository.publish(Publication(delegated={role: forged}), world.now)
    world.is_unharmed()


def shown(proposed: Proposal) -> set[tuple[str, str, str]]:
    return {(each.what, each.before, each.after) for each in review(proposed).changes}


# --- publishers against each other ----------------------------------------------------------------


def test_a_publisher_withdraws_anothers_model(world: World) -> None:
    """
    Attack: a publisher signs the other's list without the other's models, or the next version of it, empty.
    Expected: `CharterInvalid`: a list counts by its own publisher's key; nobody's command even makes such a list.
    Unharmed: the other's models, on devices, too, where a thief of the online key serves the forged list.
    """
    world.add_publisher(MALLORY, "other")
    with pytest.raises(CharterInvalid, match="not listed in models-other"):
        delisting(world.repository.in_force(), tuf.MODELS, MODEL, MALLORY, world.now)
    current = world.repository.in_force().delegated[LIST][0].signed
    empty = Targets(version=current.version + 1, expires=tuf.utc(world.now + tuf.LIST_LIFE_S))
    forged = tuf.sign(Metadata(empty), [MALLORY]).to_bytes()
    with pytest.raises(CharterInvalid, match="0 valid signatures of the 1"):
        world.repository.publish(Publication(delegated={LIST: forged}), world.now)
    world.is_unharmed()
    Forger(world, ONLINE).lists({LIST: forged})
    refused(world, "signed by 0/1")
    world.recovers()


def test_a_publisher_replaces_anothers_model(world: World) -> None:
    """
    Attack: a publisher lists a file of its own under the path of the other's model, and one under the other's digest.
    Expected: `CharterInvalid` in the repository; the entries are not there for devices.
    Unharmed: the other's model, and the file that stands behind its digest.
    """
    role = world.add_publisher(MALLORY, "other")
    for path in (path_of(MANIFEST), path_of(b"evil"), tuf.path_of(role, MODEL)):
        current = world.repository.in_force().delegated[role][0].signed
        listed = Targets(version=current.version + 1, expires=tuf.utc(world.now + tuf.LIST_LIFE_S))
        listed.targets = target(path, b"evil")
        forged = tuf.sign(Metadata(listed), [MALLORY]).to_bytes()
        with pytest.raises(CharterInvalid, match="may not sign this"):
            world.repository.publish(Publication(delegated={role: forged}, files={path: b"evil"}), world.now)
        world.serve()
        Forger(world, ONLINE).lists({role: forged})
        assert world.check().models == {MODEL}
        shutil.rmtree(world.folder / "device")
        world.client = world.new_client()
    assert world.repository.file(f"targets/models/publisher/{MODEL}.{MODEL}.json") == MANIFEST


def test_a_publisher_who_signs_anothers_model_and_withdraws_it_again(world: World) -> None:
    """
    Attack: a publisher signs the model of the other as well, so as to be the one whose word on it is the last.
    Expected: it is signed twice; what the one takes back is the own signature.
    Unharmed: the other's, and so the model; it is gone when both have taken it back.
    """
    world.add_publisher(MALLORY, "other")
    assert world.publish_model(MANIFEST, MALLORY) == MODEL
    world.is_unharmed()
    for publisher, left in ((MALLORY, {MODEL}), (PUBLISHER, set())):
        state = world.repository.in_force()
        world.repository.publish(delisting(state, tuf.MODELS, MODEL, publisher, world.now), world.now)
        world.renew()
        assert world.check().models == left


def test_a_publisher_shadows_anothers_list(world: World) -> None:
    """
    Attack: with the stolen online key, a publisher's list delegates the other's role, or the other's paths, to a key
    of its own, so that devices load that list in the place of the other's.
    Expected: what publishers delegate is never fetched; a list of another key in the other's place is refused.
    Unharmed: the other's models.
    """
    role = world.add_publisher(MALLORY, "a-first-one")
    key = tuf.public_key(MALLORY.node)
    expires = tuf.utc(world.now + tuf.LIST_LIFE_S)
    for paths in (["models/*/*.json"], ["*", "models/publisher/*.json", "models/a-first-one/*.json"]):
        delegations = Delegations(
            {key.keyid: key}, {LIST: DelegatedRole(LIST, [key.keyid], 1, terminating=True, paths=paths)}
        )
        current = world.repository.in_force().delegated[role][0].signed
        listed = Targets(version=current.version + 1, expires=expires, delegations=delegations)
        shadow = Targets(version=world.repository.in_force().delegated[LIST][0].signed.version, expires=expires)
        forged = tuf.sign(Metadata(listed), [MALLORY]).to_bytes()
        with pytest.raises(CharterInvalid, match="delegate nothing further"):
            world.repository.publish(Publication(delegated={role: forged}), world.now)
        world.serve()
        Forger(world, ONLINE).lists({role: forged})
        assert world.check().models == {MODEL}
        thief = Forger(world, ONLINE)
        both = {role: forged, LIST: tuf.sign(Metadata(shadow), [MALLORY]).to_bytes()}
        thief.lists(both, snapshot_version=thief.state.snapshot.signed.version + 2)
        refused(world, "signed by 0/1")
        shutil.rmtree(world.folder / "device")
        world.client = world.new_client()
    world.recovers()


def test_a_publisher_whose_list_breaks_takes_away_only_its_own(world: World) -> None:
    """
    Attack: a publisher lets its list run out (and with the stolen online key serves one that cannot be read), so that
    checks fail, or everybody's models vanish.
    Expected: that list lists nothing.
    Unharmed: the other's models, policy and lease.
    """
    role = world.add_publisher(MALLORY, "other")
    evil = world.publish_model(b"evil", MALLORY)
    expires = tuf.utc(world.now + tuf.LIFE_MIN_S + 1)
    current = world.repository.in_force().delegated[role][0].signed
    week = Targets(version=current.version + 1, expires=expires, targets=current.targets)
    short = tuf.sign(Metadata(week), [MALLORY]).to_bytes()
    world.repository.publish(Publication(delegated={role: short}), world.now)
    world.serve()
    assert world.check().models == {MODEL, evil}
    world.renew(tuf.LIFE_MIN_S + 2)
    world.is_unharmed()
    Forger(world, ONLINE).lists({role: b"\x00 no metadata"}, versions={role: current.version + 2})
    assert (world.check().models, world.check().policy) == ({MODEL}, POLICY)


def test_a_publisher_bloats_its_list(world: World) -> None:
    """
    Attack: a publisher's list grows until no proposal of the council, which brings all lists along, can be read.
    Expected: `CharterInvalid` beyond `TARGETS_MAX_BYTES`; all lists of that size fit into a proposal.
    Unharmed: the proposal that removes the publisher.
    """
    role = world.add_publisher(MALLORY, "other")
    many = {path: each for n in range(8000) for path, each in target(path_of(b"%d" % n, role), b"%d" % n).items()}
    listed = Targets(version=2, expires=tuf.utc(world.now + tuf.LIST_LIFE_S), targets=many)
    forged = tuf.sign(Metadata(listed), [MALLORY]).to_bytes()
    with pytest.raises(CharterInvalid, match="up to 1048576 bytes"):
        world.repository.publish(Publication(delegated={role: forged}), world.now)
    escaped = 2  # at worst, a quote or a backslash in the proposal's JSON
    assert escaped * tuf.TARGETS_MAX_BYTES * PUBLISHERS_MAX * len(tuf.KINDS) < PROPOSAL_MAX_BYTES
    world.put_in_force(world.propose(publishers={LIST: PUBLISHER.node}), [ALICE, BOB])
    world.is_unharmed()


def nested(depth: int) -> list[object]:
    found: list[object] = []
    for _ in range(depth):
        found = [found]
    return found


def raw(metadata: Metadata[Targets]) -> bytes:
    """Well signed, and not in ASCII as Fallow writes it."""
    return json.dumps(metadata.to_dict(), ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


LONG = {"x": "\u00e9" * 4500}


def custom(entry: TargetFile, value: object) -> None:
    entry.unrecognized_fields["custom"] = value


Forge = Callable[[Metadata[Targets], TargetFile], bytes | None]

FORMS: dict[str, tuple[Forge, str]] = {
    "nested deeply": (lambda list_, _: list_.signed.unrecognized_fields.update(x=nested(300)), "nested"),
    "nested deeply in an entry": (lambda _, entry: custom(entry, nested(300)), "nested"),
    "an unknown field": (lambda list_, _: list_.signed.unrecognized_fields.update(x=1), "does not use"),
    "an unknown field beside what is signed": (lambda list_, _: list_.unrecognized_fields.update(x=1), "does not use"),
    "an unknown field in an entry": (lambda _, entry: entry.unrecognized_fields.update(x=1), "does not use"),
    "another digest in an entry": (lambda _, entry: entry.hashes.update(sha512="a" * 128), "does not use"),
    "more beside the figures": (lambda _, entry: custom(entry, {"x": 1}), "other figures"),
    "longer when it is signed again": (lambda list_, entry: custom(entry, LONG) or raw(list_), "in the form"),
    "no room to be signed again": (lambda _, entry: custom(entry, "x" * (tuf.TARGETS_MAX_BYTES - 4000)), "too long"),
}


@pytest.mark.parametrize(("forge", "match"), FORMS.values(), ids=FORMS.keys())
def test_a_publishers_list_in_a_form_that_others_read_differently(world: World, forge: Forge, match: str) -> None:
    """
    Attack: with a publisher's stolen key, a list is published that can be verified here and not read there (nested so
    deep that it depends on the caller's stack), or that becomes too long when it is signed again, so that the network
    stops, and the publisher can neither be replaced nor removed.
    Expected: `CharterInvalid` before any file changes.
    Unharmed: the registrar's renewals, halts, and the proposals that remove or replace the publisher.
    """
    role = world.add_publisher(MALLORY, "other")
    folder = world.repository.folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    current, data = world.repository.in_force().delegated[role][0].signed, b"evil"
    entry = TargetFile.from_data(tuf.path_of(role, tuf.sha256(data)), data, ["sha256"])
    listed = Targets(version=current.version + 1, expires=tuf.utc(world.now + tuf.LIST_LIFE_S))
    listed.targets = {entry.path: entry}
    metadata = Metadata(listed)
    forge(metadata, entry)
    tuf.sign(metadata, [MALLORY])
    forged = forge(metadata, entry) or metadata.to_bytes()  # once more: now it is signed
    with pytest.raises(CharterInvalid, match=match):
        world.repository.publish(Publication(delegated={role: forged}, files={entry.path: data}), world.now)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    restarted = Repository(folder, world.folder / "online", NETWORK)
    assert restarted.halts() == () and restarted.renew_timestamp(world.now) > world.now
    heir = identity("heir")
    held = tuf.publishers(world.repository.in_force().targets.signed)
    world.put_in_force(world.propose(publishers={**held, role: heir.node}), [ALICE, BOB, heir])
    world.put_in_force(world.propose(publishers={LIST: PUBLISHER.node}), [ALICE, BOB])
    world.is_unharmed()


def test_a_publication_that_cannot_be_finished(world: World) -> None:
    """
    Attack: something that a publication needs besides its documents (here the list of halts) was damaged.
    Expected: the error, before any file changes.
    Unharmed: what was in force, once the damage is mended.
    """
    halts = world.repository.folder / "halts.bin"
    halts.write_bytes(b"\xc1")
    before = {path: path.read_bytes() for path in world.repository.folder.rglob("*") if path.is_file()}
    with pytest.raises(SignatureInvalid):
        world.publish_model(b'{"name":"second"}')
    assert {path: path.read_bytes() for path in world.repository.folder.rglob("*") if path.is_file()} == before
    halts.unlink()
    world.is_unharmed()


def test_a_stranger_publishes_what_is_in_force(world: World) -> None:
    """
    Attack: somebody without any key posts empty publications, and what is in force, again and again: each would write
    a snapshot and move the timestamp's expiry.
    Expected: nothing is written.
    Unharmed: the lease, which only the registrar's renewal extends; a publication that brings something.
    """
    state = world.repository.in_force()
    lists = {LIST: state.delegated[LIST][1]}
    replay = Publication(
        root=state.root_bytes,
        targets=state.targets_bytes,
        policy=state.policy_bytes,
        delegated=lists,
        files={path_of(MANIFEST): MANIFEST},
    )
    before = {path: path.stat().st_mtime_ns for path in world.repository.folder.rglob("*") if path.name != ".lock"}
    for publication in (Publication(), Publication(delegated=lists), replay):
        world.repository.publish(publication, world.now + 60)
    after = {path: path.stat().st_mtime_ns for path in world.repository.folder.rglob("*") if path.name != ".lock"}
    assert after == before
    world.is_unharmed()


def test_a_publisher_fills_the_registrars_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Attack: with a publisher's stolen key, models are listed and taken off again without end: each leaves a file, a
    list and a snapshot behind.
    Expected: `CharterInvalid` beyond `FILES_BYTES_MAX`; of lists and snapshots the newest `SNAPSHOTS_KEPT` stay.
    Unharmed: the other publisher, the device; after the council's next word there is room again.
    """
    monkeypatch.setattr(retention, "SNAPSHOTS_KEPT", 4)
    monkeypatch.setattr(retention, "FILES_BYTES_MAX", 6 * retention.FILE_BYTES_MIN)
    role = world.add_publisher(MALLORY, "other")

    def relist(index: int) -> None:
        evil = world.publish_model(b"%d" % index, MALLORY)
        state = world.repository.in_force()
        world.repository.publish(delisting(state, tuf.MODELS, evil, MALLORY, world.now), world.now)

    for index in range(6):
        relist(index)
    with pytest.raises(CharterInvalid, match="council next signs"):
        relist(6)
    metadata = world.repository.folder / "metadata"
    assert len([*metadata.glob("*.snapshot.json")]) == 4
    assert len([*metadata.glob(f"*.{role}.json")]) <= 5
    second = world.publish_model(b"honest, too")
    world.serve()
    assert world.check().models == {MODEL, second}
    world.put_in_force(world.propose(), [ALICE, BOB])
    assert not [*(world.repository.folder / "targets" / "models" / "other").iterdir()]
    relist(6)
    restarted = Repository(world.repository.folder, world.folder / "online", NETWORK)
    assert restarted.renew_timestamp(world.now) > world.now
    world.serve()
    assert world.check().models == {MODEL, second}


def test_a_proposal_that_turns_the_publishers_around(world: World) -> None:
    """
    Attack: a proposal names the publishers in another order, and so gives the names that two of them claim away.
    Expected: `sign` shows it, also where a new one is put before the others.
    Unharmed: an order that stays is not spoken of.
    """
    role = world.add_publisher(MALLORY, "other")
    what = "publishers of models, who has a name first"
    turned = world.propose(publishers={role: MALLORY.node, LIST: PUBLISHER.node})
    assert (what, f"{LIST}, {role}", f"{role}, {LIST}") in shown(turned)
    heir = identity("heir").node
    before = world.propose(publishers={"models-new": heir, LIST: PUBLISHER.node, role: MALLORY.node})
    assert (what, f"{LIST}, {role}", f"models-new, {LIST}, {role}") in shown(before)
    for publishers in (
        {LIST: PUBLISHER.node},
        {LIST: PUBLISHER.node, role: heir},
        {LIST: PUBLISHER.node, role: MALLORY.node, "models-new": heir},
    ):
        assert what not in {each.what for each in review(world.propose(publishers=publishers)).changes}


def test_a_withdrawn_model_comes_back_with_the_councils_word(world: World) -> None:
    """
    Attack: a captured registrar shows the member who proposes the list from before a model was withdrawn; the council's
    next word would bring the model back. Without its key, somebody on the way alters which list is the newest.
    Expected: `CharterInvalid`: for every member who has seen the newer list, and for all where the key did not sign.
    Unharmed: what is built on the newest list.
    """
    bad = world.publish_model(b'{"name":"bad"}')
    stale = world.base()
    state = world.repository.in_force()
    world.repository.publish(delisting(state, tuf.MODELS, bad, PUBLISHER, world.now), world.now)
    pin = Pin(name="alice", network=NETWORK, first_root=tuf.sha256(first_root_payload(stale.roots[0])))
    pin = check_pin(check_pin(pin, stale), world.base())
    with pytest.raises(CharterInvalid, match="what was withdrawn since would come back"):
        check_pin(pin, stale)
    assert check_pin(pin, world.base()) == pin
    world.serve()
    thief = Forger(world, MALLORY)
    thief.lists({LIST: state.delegated[LIST][1]})
    with pytest.raises(CharterInvalid, match="0 valid signatures of the 1"):
        read_base(FolderFetcher(world.served))
    world.is_unharmed()


def test_an_online_key_that_comes_back(world: World) -> None:
    """
    Attack: the council is asked to give the registrar a key again that it took away: what the key signed before would
    count again, and devices, which saw higher versions since, would stop.
    Expected: `CharterInvalid`, at the proposal and in the repository.
    Unharmed: the key of today, which stays through other changes, and any new one.
    """
    world.recovers()
    with pytest.raises(CharterInvalid, match="does not come back"):
        review(world.propose(online=ONLINE.node))
    state = world.repository.in_force()
    root = copy.deepcopy(state.root.signed)
    root.version += 1
    old = tuf.read(Root, world.repository.first_root()).signed
    for role in ("snapshot", "timestamp"):
        root.roles[role] = old.roles[role]
    root.keys |= old.keys
    signed = tuf.sign(Metadata(root), [ALICE, BOB]).to_bytes()
    with pytest.raises(CharterInvalid, match="does not come back"):
        world.repository.publish(Publication(root=signed), world.now)
    world.put_in_force(world.propose(members={**COUNCIL, CAROL.node: "caroline"}), [ALICE, BOB])
    world.is_unharmed()
    world.recovers()


def test_a_publisher_fills_the_council_with_names(world: World) -> None:
    """
    Attack: somebody has the council delegate to more and more publishers, and remove them again, until a snapshot has
    no room for their lists.
    Expected: `CharterInvalid` beyond `PUBLISHERS_MAX` at once, and beyond `LISTS_KEPT_MAX` ever.
    Unharmed: the network; a new online key makes room again.
    """
    many = {f"models-n{index}": identity(f"n{index}").node for index in range(PUBLISHERS_MAX + 1)}
    with pytest.raises(CharterInvalid, match="up to 32 publishers"):
        world.propose(publishers=many)
    role = world.add_publisher(MALLORY, "other")
    world.put_in_force(world.propose(publishers={LIST: PUBLISHER.node}), [ALICE, BOB])
    state = world.repository.in_force()
    assert set(state.retired) == {role}
    full = msgspec.structs.replace(state, retired={f"models-old{index}": MetaFile(1) for index in range(255)})
    proposed, _ = sign(world.propose(policy=FleetPolicy(epoch=2, lease_s=LEASE_S)), [ALICE, BOB])
    verify(publication_of(proposed), full, lambda _: bytes, world.now)
    full = msgspec.structs.replace(full, retired={**full.retired, role: MetaFile(1)})
    with pytest.raises(CharterInvalid, match="another online key"):
        verify(publication_of(proposed), full, lambda _: bytes, world.now)
    world.recovers()
    assert world.repository.in_force().retired == {}


def test_a_publisher_who_comes_back_brings_an_old_list_back(world: World) -> None:
    """
    Attack: a publisher was removed and is made one again, under the same name; with the stolen online key, the list
    of before is served.
    Expected: `CharterInvalid`: the new list's version goes on above the old one's.
    Unharmed: the new list.
    """
    role = world.add_publisher(MALLORY, "other")
    world.publish_model(b"of before", MALLORY)
    old = world.repository.in_force().delegated[role]
    world.put_in_force(world.propose(publishers={LIST: PUBLISHER.node}), [ALICE, BOB])
    world.is_unharmed()
    world.add_publisher(MALLORY, "other")
    assert world.repository.in_force().delegated[role][0].signed.version == old[0].signed.version + 1
    world.is_unharmed()
    Forger(world, ONLINE).lists({role: old[1]})
    refused(world)
    world.recovers()


def test_a_repository_with_one_list_for_all_publishers(world: World) -> None:
    """
    Attack: the quorum is asked to sign delegations of the old form, in which all publishers of models share one list.
    Expected: `CharterInvalid`, which says what to do, from the repository, the device and a member's own check.
    Unharmed: the publishers' own lists.
    """
    targets = tuf.read(Targets, world.repository.in_force().targets_bytes)
    targets.signed.version += 1
    keys = {key.keyid: key for key in (tuf.public_key(PUBLISHER.node), tuf.public_key(MALLORY.node))}
    shared = DelegatedRole(tuf.MODELS, [*keys], 1, True, paths=["models/*.json"])
    targets.signed.delegations = Delegations(keys, {tuf.MODELS: shared})
    targets.signatures.clear()
    data = tuf.sign(targets, [ALICE, BOB]).to_bytes()
    policy = world.repository.in_force().policy_bytes
    with pytest.raises(CharterInvalid, match="Found the network anew"):
        world.repository.publish(Publication(targets=data, policy=policy), world.now)
    old = world.folder / "old"
    shutil.copytree(world.repository.folder, old)
    Forger(world, ONLINE).lists({"targets": data})
    refused(world, "shared one list")
    shutil.copytree(world.served, old, dirs_exist_ok=True)
    with pytest.raises(CharterInvalid, match="shared one list"):
        read_base(FolderFetcher(old))
    with pytest.raises(CharterInvalid, match="shared one list"):
        Repository(old, world.folder / "online", NETWORK).in_force()
    world.recovers()


def test_a_publisher_jumps_the_lists_version(world: World) -> None:
    """
    Attack: with a publisher's stolen key, the list's version is raised far beyond what the council will ever reach.
    Expected: `CharterInvalid`: a publisher alone raises it by one.
    Unharmed: the list.
    """
    metadata = tuf.read(Targets, lists_of(world, {}))
    metadata.signed.version += tuf.LIST_JUMP
    metadata.signatures.clear()
    forged = tuf.sign(metadata, [PUBLISHER]).to_bytes()
    with pytest.raises(CharterInvalid, match="expected version"):
        world.repository.publish(Publication(delegated={LIST: forged}), world.now)
    world.is_unharmed()


def test_a_proposal_that_lists_a_model(world: World) -> None:
    """
    Attack: who drafts the council's proposal slips a model of their own into the list that a new publisher signs.
    Expected: `CharterInvalid`: a list in a proposal may lose entries, and gain none.
    Unharmed: nobody signs it.
    """
    heir = identity("heir")
    proposed = world.propose(publishers={LIST: heir.node})
    metadata = tuf.read(Targets, proposed.delegated[LIST])
    metadata.signed.targets |= target(path_of(b"evil"), b"evil")
    forged = msgspec.structs.replace(proposed, delegated={LIST: metadata.to_bytes().decode()})
    with pytest.raises(CharterInvalid, match="what was not there"):
        review(forged)
    with pytest.raises(CharterInvalid, match="what was not there"):
        sign(forged, [ALICE, heir])
    world.is_unharmed()


def test_too_many_delegations(world: World) -> None:
    """
    Attack: a publisher delegates to 1000 further roles, each of which lists evil models (with the stolen online key).
    Expected: bounded work, and none of their models is believed; the repository does not publish it.
    Unharmed: the publisher's own honest model.
    """
    evil = {f"evil{index}": target(path_of(b"evil"), b"evil") for index in range(1000)}
    key = tuf.public_key(MALLORY.node)
    roles = {name: DelegatedRole(name, [key.keyid], 1, False, paths=["models/publisher/*.json"]) for name in evil}
    forged = lists_of(world, {}, Delegations({key.keyid: key}, roles))
    with pytest.raises(CharterInvalid, match="delegate nothing further"):
        world.repository.publish(Publication(delegated={LIST: forged}), world.now)
    lists = {
        name: tuf.sign(Metadata(Targets(expires=tuf.utc(world.now + 1000), targets=listed)), [MALLORY]).to_bytes()
        for name, listed in list(evil.items())[:200]
    }
    thief = Forger(world, ONLINE)
    thief.lists({LIST: forged, **lists})
    try:
        assert world.check().models == {MODEL}
    except CharterInvalid as error:  # the snapshot of so many roles is too large
        assert "length" in error.message or "bytes" in error.message
    kept = {path.name for path in (world.folder / "device" / "metadata").iterdir()}
    assert not [name for name in kept if name.startswith("evil")]


def test_a_delegation_that_fallow_does_not_know(world: World) -> None:
    """
    Attack: the quorum was tricked into delegating everything (`*`) to a stranger.
    Expected: `CharterInvalid`: only publishers' roles are delegated, each for its own paths.
    Unharmed: the policy in force, which is never looked up in a delegated role.
    """
    targets = tuf.read(Targets, world.repository.in_force().targets_bytes)
    targets.signed.version += 1
    key = tuf.public_key(MALLORY.node)
    assert targets.signed.delegations is not None
    assert targets.signed.delegations.roles is not None
    targets.signed.delegations.keys[key.keyid] = key
    targets.signed.delegations.roles["all"] = DelegatedRole("all", [key.keyid], 1, True, paths=["*"])
    targets.signatures.clear()
    data = tuf.sign(targets, [ALICE, BOB]).to_bytes()
    policy = world.repository.in_force().policy_bytes
    with pytest.raises(CharterInvalid, match="expected delegations of"):
        world.repository.publish(Publication(targets=data, policy=policy), world.now)
    Forger(world, ONLINE).lists({"targets": data})
    refused(world)


# --- the policy -----------------------------------------------------------------------------------


def test_a_policy_that_nobody_signed(world: World) -> None:
    """
    Attack: the file of the policy is replaced where it is served.
    Expected: `CharterInvalid`: its digest is in the signed metadata.
    Unharmed: the policy in force.
    """
    stored = f"{tuf.sha256(tuf.encode_policy(POLICY))}.{tuf.POLICY}"
    fresh = world.folder / "fresh"
    Forger(world).target(stored, tuf.encode_policy(LOOSE))
    world.client = type(world.client)(world.repository.first_root(), NETWORK, fresh, world.client._fetcher)
    with pytest.raises(CharterInvalid, match=r"(?i)length|hash"):
        world.check()
    world.is_unharmed()


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_policy_of_a_lower_epoch(world: World, epoch: int) -> None:
    """
    Attack: two council keys and the online key are stolen, and an older epoch (or another policy of the same) is
    signed, to take back what was decided.
    Expected: `CharterInvalid`, in the repository, on the device, and after its restart.
    Unharmed: the epoch that the device has seen.
    """
    world.put_in_force(world.propose(policy=FleetPolicy(epoch=2, lease_s=LEASE_S)), [ALICE, BOB])
    world.serve()
    world.check()
    forged = FleetPolicy(epoch=epoch, lease_s=86_400.0)
    data = tuf.encode_policy(forged)
    targets = tuf.read(Targets, world.repository.in_force().targets_bytes)
    targets.signed.version += 1
    targets.signed.targets[tuf.POLICY] = TargetFile.from_data(tuf.POLICY, data, ["sha256"])
    targets.signatures.clear()
    publication = Publication(targets=tuf.sign(targets, [ALICE, BOB]).to_bytes(), policy=data)
    with pytest.raises(CharterInvalid, match="epoch"):
        world.repository.publish(publication, world.now)
    Forger(world, ONLINE).policy(forged, ALICE, BOB)
    refused(world, "epoch")


# --- form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}",
        b'{"signed": {}, "signatures": []}',
        b'{"signed": {"_type": "timestamp", "version": 1e400}, "signatures": []}',
        b'{"signed": {"_type": "root"}, "signatures": {}}',
        b'{"signed": ' + b"9" * 10_000 + b', "signatures": []}',
        b" " * (tuf.TIMESTAMP_MAX_BYTES + 1),
    ],
    ids=["empty", "no text", "nested", "bare", "hollow", "infinite", "other type", "huge number", "too long"],
)
def test_a_malformed_timestamp(world: World, data: bytes) -> None:
    """
    Attack: bytes that are meant to crash a parser, or to exhaust it.
    Expected: `CharterInvalid`.
    Unharmed: the client, which believes the next honest timestamp.
    """
    Forger(world).put("timestamp.json", data)
    refused(world)
    world.is_unharmed()


def test_a_root_with_keys_of_another_kind(world: World) -> None:
    """
    Attack: the quorum was tricked into a council key of another algorithm, which fewer eyes have checked.
    Expected: `CharterInvalid`.
    Unharmed: nothing under that council is believed.
    """
    key = CryptoSigner.generate_ecdsa().public_key
    root = copy.deepcopy(world.repository.in_force().root.signed)
    root.version = 2
    for role in ("root", "targets"):
        root.add_key(key, role)
    data = tuf.sign(Metadata(root), [ALICE, BOB]).to_bytes()
    with pytest.raises(CharterInvalid, match="Ed25519"):
        world.repository.publish(Publication(root=data), world.now)
    Forger(world).put("2.root.json", data)
    refused(world, "Ed25519")


def test_a_registrar_with_a_seat_in_the_council(world: World) -> None:
    """
    Attack: the registrar's online key is voted into the council, so that a captured registrar counts there.
    Expected: `CharterInvalid`: keys that are online have no seat.
    Unharmed: the council.
    """
    with pytest.raises(CharterInvalid, match="registrar"):
        world.propose(members={**COUNCIL, ONLINE.node: "registrar"})


def test_endlessly_many_councils(world: World) -> None:
    """
    Attack: a chain of new roots without end (two stolen keys sign them), to keep devices busy.
    Expected: bounded: one check follows `ROOT_ROTATIONS_MAX` of them.
    Unharmed: the device's check still ends, and goes on from there the next time.
    """
    root = copy.deepcopy(world.repository.in_force().root.signed)
    for version in range(2, tuf.ROOT_ROTATIONS_MAX + 12):
        root.version = version
        Forger(world, ALICE, BOB).root(root)
    assert world.check().root_version == tuf.ROOT_ROTATIONS_MAX + 1
    assert world.check().root_version == tuf.ROOT_ROTATIONS_MAX + 11


# --- halts ----------------------------------------------------------------------------------------


def test_a_halt_by_a_stranger(world: World) -> None:
    """
    Attack: somebody outside of the council, or the registrar itself, signs a halt to stop the network.
    Expected: it holds nowhere; the repository does not keep it.
    Unharmed: the network works.
    """
    for stranger in (MALLORY, ONLINE, PUBLISHER):
        envelope = seal_halt(stranger, NETWORK, 1, "stop", world.now)
        assert world.repository.add_halt(envelope) is None
        Forger(world).halts(envelope)
        assert world.halts() == ()
    world.is_unharmed()


def test_a_forged_halt(world: World) -> None:
    """
    Attack: a member's halt with other words, or of another network whose council has a common member.
    Expected: `SignatureInvalid` in the repository; devices leave it out.
    Unharmed: the network works.
    """
    foreign = seal_halt(ALICE, "00" * 32, 1, "stop", world.now)
    real = seal_halt(ALICE, NETWORK, 1, "stop it", world.now)
    for envelope in (foreign, real.replace(b"stop it", b"stop ut")):
        with pytest.raises(SignatureInvalid):
            world.repository.add_halt(envelope)
        Forger(world).halts(envelope)
        assert world.halts() == ()
    world.is_unharmed()


def test_a_halt_from_before_it_was_resumed(world: World) -> None:
    """
    Attack: an old halt is replayed after the quorum resumed at a higher epoch.
    Expected: it does not hold.
    Unharmed: the network works.
    """
    envelope = seal_halt(ALICE, NETWORK, 1, "a drill", world.now)
    assert world.repository.add_halt(envelope) is not None
    world.put_in_force(world.propose(policy=FleetPolicy(epoch=2, lease_s=LEASE_S)), [BOB, CAROL])
    assert world.repository.add_halt(envelope) is None
    world.serve()
    Forger(world).halts(envelope)
    assert world.halts() == ()
    world.is_unharmed(epoch=2)


@pytest.mark.parametrize("data", [b"\xc1", b"\x93\x01\x02\x03", b"\xdd\xff\xff\xff\xff", b"A" * 1_000_000])
def test_a_damaged_list_of_halts(world: World, data: bytes) -> None:
    """
    Attack: the registrar serves a list of halts that cannot be read, to hide one.
    Expected: `CharterInvalid`: where evidence is missing, the answer is no.
    Unharmed: the next honest check.
    """
    (world.served / "halts.bin").write_bytes(data)
    refused(world)
    world.is_unharmed()


def test_a_halt_that_uses_up_the_epochs(world: World) -> None:
    """
    Attack: with Carol's stolen key, a halt names the highest epoch there is, so that no policy can ever end it.
    Expected: it holds nowhere: a halt reaches `HALT_EPOCHS_AHEAD` above the policy, and not further.
    Unharmed: the network works; the thief's highest halt that does hold is resumed from, as often as it comes.
    """
    for epoch in ((1 << 53) - 2, 1 << 53, 2 + HALT_EPOCHS_AHEAD):
        burning = seal_halt(CAROL, NETWORK, epoch, "for ever", world.now)
        assert world.repository.add_halt(burning) is None
        Forger(world).halts(burning)
        assert world.halts() == ()
    world.is_unharmed()
    policy = world.repository.policy()
    for _ in range(2):
        highest = seal_halt(CAROL, NETWORK, policy.epoch + HALT_EPOCHS_AHEAD, "again", world.now)
        assert world.repository.add_halt(highest) is not None
        held = [halt for _, halt in world.repository.halts()]
        policy = FleetPolicy(epoch=resuming_epoch(policy, held), lease_s=LEASE_S)
        world.put_in_force(world.propose(policy=policy), [ALICE, BOB])
        world.is_unharmed(epoch=policy.epoch)
    assert policy.epoch == 1 + 2 * (HALT_EPOCHS_AHEAD + 1)


def test_one_stolen_council_key(world: World) -> None:
    """
    Attack: Carol's key is stolen. The thief halts the network, with the highest epoch that holds, and halts it again.
    Expected: it halts each time, and renewals stop; the thief alone can neither resume nor change anything.
    Unharmed: Alice and Bob vote Carol out, and none of the thief's halts holds any more.
    """
    thief = 1 + HALT_EPOCHS_AHEAD
    assert world.repository.add_halt(seal_halt(CAROL, NETWORK, thief, "ransom", world.now)) is not None
    world.serve()
    assert [halt.why for halt in world.halts()] == ["ransom"]
    with pytest.raises(NotWorking, match="ransom"):
        world.repository.renew_timestamp(world.now)
    for wanted in ({"policy": FleetPolicy(epoch=thief + 1)}, {"members": {CAROL.node: "carol"}, "threshold": 1}):
        alone, _ = sign(world.propose(**wanted), [CAROL])
        with pytest.raises(CharterInvalid, match="signatures that it needs"):
            publication_of(alone)
    expires = world.repository.timestamp_expires_unix_s()
    world.publish_model(b'{"name":"while halted"}')  # a publication extends no lease
    assert world.repository.timestamp_expires_unix_s() == expires
    dave = identity("dave")
    council = {ALICE.node: "alice", BOB.node: "bob", dave.node: "dave"}
    world.put_in_force(world.propose(members=council), [ALICE, BOB])
    world.renew()
    assert world.halts() == ()
    assert world.repository.add_halt(seal_halt(CAROL, NETWORK, thief, "again", world.now)) is None
    assert world.check().models >= {MODEL}


def test_two_stolen_council_keys(world: World) -> None:
    """
    Attack: k keys are stolen, and a loose policy of a higher epoch is signed, together with a council of the thief's.
    Expected: it is in force. This is what a quorum is, and nothing inside of the network repairs it.
    Unharmed: what a device has seen before does not come back: no lower epoch, no older council.
    """
    world.put_in_force(world.propose(policy=LOOSE, members={MALLORY.node: "m"}, threshold=1), [ALICE, BOB, MALLORY])
    world.serve()
    charter = world.check()
    assert (charter.policy, set(charter.council.values())) == (LOOSE, {MALLORY.node})
    Forger(world, ONLINE).policy(POLICY, MALLORY)
    refused(world, "epoch")


def test_a_captured_registrar_hides_a_halt(world: World) -> None:
    """
    Attack: a captured registrar does not show Carol's halt, and goes on signing timestamps.
    Expected: by this way nobody hears of the halt, and leases go on (the bus carries it, too); the council takes the
    registrar's key away, and from then on its timestamps are refused, `CharterInvalid`.
    Unharmed: policy and models, which the registrar cannot sign.
    """
    assert world.repository.add_halt(seal_halt(CAROL, NETWORK, 1, "hidden", world.now)) is not None
    thief = Forger(world, ONLINE)
    thief.timestamp(tuf.read(Timestamp, (thief.metadata / "timestamp.json").read_bytes()).signed.snapshot_meta)
    assert world.halts() == ()
    assert world.check().policy == POLICY
    new_key = identity("a clean registrar")
    write_key(world.folder / "online", new_key)
    world.put_in_force(world.propose(online=new_key.node), [ALICE, BOB])
    newest = (world.repository.folder / "metadata" / "2.root.json").read_bytes()
    thief.put("2.root.json", newest)  # it reached the device by any way
    refused(world, "signed by 0/1")
    (world.served / "metadata" / "2.root.json").unlink()
    refused(world, "signed by 0/1")  # and stays with it
    world.serve()
    with pytest.raises(CharterInvalid):  # the honest timestamp was not renewed past the halt
        world.client.check(world.now + LEASE_S)
    assert [halt.why for halt in world.halts()] == ["hidden"]


def test_a_captured_registrar_and_bus_swallow_a_halt(world: World) -> None:
    """
    Attack: both servers are captured: no device hears of Carol's halt, and the registrar goes on signing timestamps.
    Expected: `fallow council obey TEXT` on the device's machine writes the halt down for a process that runs and for
    its next start; what a stranger signed, or the council ended, is refused there, `SignatureInvalid`.
    Unharmed: no other machine has to be reached.
    """
    state = world.folder / "machine"
    folder = state / "device"
    folder.mkdir(parents=True)
    (folder / "network.json").write_bytes(b"{}")
    network = tuf.sha256(b"{}")
    runner = CliRunner()

    def obey(envelope: bytes) -> Result:
        return runner.invoke(app, ["council", "obey", halt_text(envelope), "--state-dir", str(state)])

    carried = seal_halt(CAROL, network, 1, "carried by hand", world.now)
    assert isinstance(obey(carried).exception, ConfigError)  # it never checked, and so it has no lease to take
    client = CharterClient(world.repository.first_root(), network, folder / "charter", FolderFetcher(world.served))
    charter, halts = client.check(world.now)
    assert halts == ()
    running = HaltBook(folder / "halts", network)
    for nobody in (seal_halt(MALLORY, network, 1, "no", world.now), seal_halt(CAROL, network, 0, "no", world.now)):
        assert isinstance(obey(nobody).exception, SignatureInvalid)
    assert isinstance(obey(seal_halt(CAROL, NETWORK, 1, "of another network", world.now)).exception, SignatureInvalid)
    assert obey(carried).exit_code == 0
    running.prune(charter.council, charter.policy.epoch)  # as its next check does
    for book in (running, HaltBook(folder / "halts", network)):
        assert [halt.why for _, halt in book.holding(charter.council.values(), 1)] == ["carried by hand"]


def test_the_repositorys_keys_cannot_be_fetched(world: World) -> None:
    """
    Attack: a client of the registrar asks for files beside the repository: keys, locks, the parent folder.
    Expected: there is no such file.
    Unharmed: the key.
    """
    key = next((world.folder / "online").iterdir()).name
    for path in (f"../online/{key}", f"metadata/../../online/{key}", "..", ".lock", "", "/etc/passwd", "metadata"):
        assert world.repository.file(path) is None
    assert world.repository.file("metadata/timestamp.json") is not None
    assert world.repository.file(f"targets/models/publisher/{MODEL}.{MODEL}.json") == MANIFEST
