"""Attacks on what the council signs: on the metadata, on the way that it comes, and with stolen keys.

The real client over a real repository (a folder; HTTPS where the line is the attack). Each test states the attack, the
refusal that is expected, and what stayed unharmed. Unless it says otherwise, the attacker serves the device whatever it
likes (a captured registrar, a captured line), and has the keys that the test names.
"""

import copy
import json
import shutil
from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Root, TargetFile, Targets, Timestamp
from typer.testing import CliRunner, Result

from fallow.cli.app import app
from fallow.domain.charter import FleetPolicy
from fallow.domain.errors import CharterInvalid, ConfigError, NotWorking, SignatureInvalid
from fallow.policy.council import HALT_EPOCHS_AHEAD, resuming_epoch
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.ceremonies import publication_of, sign
from fallow.trust.council.client import CharterClient
from fallow.trust.council.fetch import FolderFetcher
from fallow.trust.council.halts import HaltBook, halt_text, seal_halt
from fallow.trust.council.proposals import review
from fallow.trust.council.publication import Publication
from fallow.trust.council.publisher import listing
from tests.adversarial.council_world import (
    ALICE,
    BOB,
    CAROL,
    COUNCIL,
    LEASE_S,
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
    old = world.repository.in_force().delegated[tuf.MODELS][1]
    added = world.publish_model(b'{"name":"second"}')
    world.serve()
    assert world.check().models == {MODEL, added}
    Forger(world, ONLINE).lists({tuf.MODELS: old})
    refused(world)


def test_a_list_vanishes_from_the_snapshot(world: World) -> None:
    """
    Attack: with the stolen online key, a new snapshot has no entry for the publisher's list any more.
    Expected: `CharterInvalid`.
    Unharmed: the honest repository.
    """
    thief = Forger(world, ONLINE)
    meta = dict(thief.state.snapshot.signed.meta)
    del meta["models.json"]
    thief.snapshot(meta)
    refused(world, "models")
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
    Attack: two of two publishers must sign; the quorum was shown one key under two ids as two publishers.
    Expected: `CharterInvalid`.
    Unharmed: no model of that publisher is loaded.
    """
    targets = tuf.read(Targets, world.repository.in_force().targets_bytes)
    targets.signed.version += 1
    assert targets.signed.delegations is not None
    other = SSlibKey("0" * 64, "ed25519", "ed25519", {"public": PUBLISHER.node.upper()})
    targets.signed.add_key(other, tuf.MODELS)
    targets.signatures.clear()
    Forger(world, ONLINE).lists({"targets": tuf.sign(targets, [ALICE, BOB]).to_bytes()})
    refused(world, "twice")


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
    current = world.repository.in_force().delegated[tuf.MODELS][0].signed
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
        world.repository.publish(Publication(delegated={tuf.MODELS: forged}, files={tuf.POLICY: data}), world.now)
    thief = Forger(world, ONLINE)
    thief.target(f"{tuf.sha256(data)}.{tuf.POLICY}", data)
    thief.lists({tuf.MODELS: forged})
    assert world.check().policy == POLICY
    assert world.check().models == {MODEL}


def test_a_publisher_of_models_signs_a_release(world: World) -> None:
    """
    Attack: a publisher of models lists `releases/9.9.9.json`.
    Expected: no device takes it for a release.
    Unharmed: models and releases.
    """
    Forger(world, ONLINE).lists({tuf.MODELS: lists_of(world, target("releases/9.9.9.json", b"evil"))})
    assert world.check().releases == frozenset()
    assert world.check().models == {MODEL}


def test_a_model_under_another_models_digest(world: World) -> None:
    """
    Attack: a publisher lists an evil file under the path of a digest that people trust.
    Expected: the entry is not there for devices: path and digest must be the same.
    Unharmed: the honest model.
    """
    trusted = "7" * 64
    Forger(world, ONLINE).lists({tuf.MODELS: lists_of(world, target(f"models/{trusted}.json", b"evil"))})
    assert world.check().models == {MODEL}


@pytest.mark.parametrize(
    "path",
    ["models/../policy.json", "models/a/b.json", "/models/x.json", "models/" + "A" * 64 + ".json", "models/.json"],
)
def test_a_path_that_escapes(world: World, path: str) -> None:
    """
    Attack: a publisher lists a path outside of its own, or one that a file system reads differently.
    Expected: it is not there for devices, and is not published.
    Unharmed: the honest model.
    """
    forged = lists_of(world, target(path, b"evil"))
    with pytest.raises(CharterInvalid):
        world.repository.publish(Publication(delegated={tuf.MODELS: forged}, files={path: b"evil"}), world.now)
    Forger(world, ONLINE).lists({tuf.MODELS: forged})
    assert world.check().models == {MODEL}


def test_a_model_that_nobody_signed(world: World) -> None:
    """
    Attack: a coordinator orders a device to load a model that is in no metadata, or in a list signed by a stranger.
    Expected: its digest is not among the charter's models; the stranger's list is refused, `CharterInvalid`.
    Unharmed: the honest model.
    """
    evil = tuf.sha256(b"evil")
    assert evil not in world.check().models
    current = world.repository.in_force().delegated[tuf.MODELS][0].signed
    forged = Targets(version=current.version + 1, expires=tuf.utc(world.now + 1000))
    forged.targets = {**current.targets, **target(f"models/{evil}.json", b"evil")}
    Forger(world, ONLINE).lists({tuf.MODELS: tuf.sign(Metadata(forged), [MALLORY]).to_bytes()})
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
    Unharmed: the list, which the new publisher signed anew.
    """
    heir = identity("heir")
    world.put_in_force(world.propose(publishers={tuf.MODELS: {heir.node: "heir"}}), [ALICE, BOB, heir])
    world.serve()
    assert world.check().models == {MODEL}
    forged = lists_of(world, target(f"models/{tuf.sha256(b'evil')}.json", b"evil"))
    with pytest.raises(CharterInvalid, match="0 valid signatures of the 1"):
        world.repository.publish(Publication(delegated={tuf.MODELS: forged}), world.now)
    Forger(world, ONLINE).lists({tuf.MODELS: forged})
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
        current = world.repository.in_force().delegated[tuf.MODELS][0].signed
        short = Targets(version=current.version + 1, expires=expires, targets=current.targets)
        signed = tuf.sign(Metadata(short), [PUBLISHER]).to_bytes()
        with pytest.raises(CharterInvalid, match="7 days"):
            world.repository.publish(Publication(delegated={tuf.MODELS: signed}), world.now)
    expires = tuf.utc(world.now + tuf.LIFE_MIN_S + 1)
    week = Targets(version=current.version + 1, expires=expires, targets=current.targets)
    signed = tuf.sign(Metadata(week), [PUBLISHER]).to_bytes()
    world.repository.publish(Publication(delegated={tuf.MODELS: signed}), world.now)
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
    Attack: a publisher whose key was stolen sees the council's proposal, and publishes list after list meanwhile, so
    that the one in the proposal is never the next; the thief lists a model of its own.
    Expected: the proposal is in force all the same, and what it withdraws is gone; the thief publishes no more.
    Unharmed: the honest model, which the new publisher signed anew.
    """
    evil = world.publish_model(b"evil")
    heir = identity("heir")
    wanted = {
        "publishers": {tuf.MODELS: {heir.node: "heir"}},
        "withdraw": {tuf.MODELS: frozenset({f"models/{evil}.json"})},
    }
    proposed = world.propose(**wanted)
    shown = {(each.what, each.before, each.after) for each in review(proposed).changes}
    assert ("models: withdrawn", f"models/{evil}.json", "") in shown
    assert ("models: signed anew", f"models/{MODEL}.json", f"models/{MODEL}.json") in shown
    for index in range(5):
        world.publish_model(b"evil %d" % index)
    world.put_in_force(proposed, [ALICE, BOB, heir])
    world.is_unharmed()
    with pytest.raises(CharterInvalid, match="has not made"):
        world.publish_model(b"evil again")
    world.is_unharmed()


def test_one_publisher_of_two_vetoes_the_own_removal(world: World) -> None:
    """
    Attack: of two publishers one was captured, and signs the shared list again while the council removes it, so that
    the list in force has no signature of a publisher who stays.
    Expected: the proposal carried the list, signed by the one who stays, and is in force.
    Unharmed: the models.
    """
    other = identity("other")
    both = {PUBLISHER.node: "publisher", other.node: "other"}
    world.put_in_force(world.propose(publishers={tuf.MODELS: both}), [ALICE, BOB])
    files = {f"models/{MODEL}.json": MANIFEST}
    in_force = world.repository.in_force()
    world.repository.publish(listing(in_force, tuf.MODELS, files, other, world.now), world.now)  # signed by who stays
    proposed = world.propose(publishers={tuf.MODELS: {other.node: "other"}})
    world.publish_model(b"evil")
    world.put_in_force(proposed, [ALICE, BOB, other])
    world.is_unharmed()


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
        world.repository.publish(Publication(delegated={tuf.MODELS: forged}), world.now)
    world.is_unharmed()


def test_a_proposal_that_lists_a_model(world: World) -> None:
    """
    Attack: who drafts the council's proposal slips a model of their own into the list that a new publisher signs.
    Expected: `CharterInvalid`: a list in a proposal may lose entries, and gain none.
    Unharmed: nobody signs it.
    """
    heir = identity("heir")
    proposed = world.propose(publishers={tuf.MODELS: {heir.node: "heir"}})
    metadata = tuf.read(Targets, proposed.delegated[tuf.MODELS])
    metadata.signed.targets |= target(f"models/{tuf.sha256(b'evil')}.json", b"evil")
    forged = msgspec.structs.replace(proposed, delegated={tuf.MODELS: metadata.to_bytes().decode()})
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
    evil = {f"evil{index}": target(f"models/{tuf.sha256(b'evil')}.json", b"evil") for index in range(1000)}
    key = tuf.public_key(MALLORY.node)
    roles = {name: DelegatedRole(name, [key.keyid], 1, False, paths=["models/*.json"]) for name in evil}
    forged = lists_of(world, {}, Delegations({key.keyid: key}, roles))
    with pytest.raises(CharterInvalid, match="delegate nothing further"):
        world.repository.publish(Publication(delegated={tuf.MODELS: forged}), world.now)
    lists = {
        name: tuf.sign(Metadata(Targets(expires=tuf.utc(world.now + 1000), targets=listed)), [MALLORY]).to_bytes()
        for name, listed in list(evil.items())[:200]
    }
    thief = Forger(world, ONLINE)
    thief.lists({tuf.MODELS: forged, **lists})
    try:
        assert world.check().models == {MODEL}
    except CharterInvalid as error:  # the snapshot of so many roles is too large
        assert "length" in error.message or "bytes" in error.message
    kept = {path.name for path in (world.folder / "device" / "metadata").iterdir()}
    assert len([name for name in kept if name.startswith("evil")]) <= tuf.DELEGATIONS_MAX


def test_a_delegation_that_fallow_does_not_know(world: World) -> None:
    """
    Attack: the quorum was tricked into delegating everything (`*`) to a stranger.
    Expected: `CharterInvalid`: only models and releases are delegated, for their own paths.
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
    assert world.repository.file(f"targets/models/{MODEL}.{MODEL}.json") == MANIFEST
