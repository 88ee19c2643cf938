"""Attacks on what coordinators believe of models: a captured gateway that announces false figures, and publishers who
sign them.

The real registry, coordinator and store over figures that came from the real repository through the real client.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from tuf.api.metadata import Metadata, Targets

from fallow.coordinator.registry import Fleet, need_of, sources_of
from fallow.coordinator.stores import disbelieved
from fallow.domain.charter import Charter
from fallow.domain.errors import CharterInvalid
from fallow.domain.fleet import ModelEntry, StoreAnnounced
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import ModelName, NodeId
from fallow.domain.model import Quantisation
from fallow.models.store import Store
from fallow.simulator.virtual_time import run_virtual
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.figures import FIGURES_FIELD, target_of
from fallow.trust.council.publication import Publication
from tests.adversarial.council_world import ALICE, BOB, LIST, MALLORY, MODEL, ONLINE, PUBLISHER, Forger, World
from tests.simulation.control import toy_model
from tests.simulation.trusted import SUBJECTS, TrustedCell
from tests.unit.trust.grant_world import STRANGER

LIAR = NodeId("1a" * 32)
HONEST = NodeId("b0" * 32)


class Signed:
    """A world whose publisher signed a model of a real store, and the coordinator that hears of it."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder)
        self.store = Store(folder / "store")
        self.entry = toy_model(self.store)
        self.manifest = self.store.manifest_bytes(self.entry.model)

    def publish(self) -> "Signed":
        assert self.world.publish_model(self.manifest) == self.entry.model
        return self

    def charter(self) -> Charter:
        self.world.renew()
        return self.world.check()


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Signed(tmp_path_factory.mktemp("founded")).publish().world.folder


@pytest.fixture
def signed(founded: Path, tmp_path: Path) -> Signed:
    shutil.copytree(founded, tmp_path, dirs_exist_ok=True)
    return Signed(tmp_path)


def told(node: NodeId, *entries: ModelEntry) -> StoreAnnounced:
    return StoreAnnounced(address=PeerAddress(node, ()), models=entries)


def shaped(entry: ModelEntry, **sizes: int) -> ModelEntry:
    return msgspec.structs.replace(entry, config=msgspec.structs.replace(entry.config, **sizes))


def weighing(entry: ModelEntry, embedding: int, head: int, layers: Callable[[int], int]) -> ModelEntry:
    _, _, old = entry.weights_bytes
    return msgspec.structs.replace(entry, weights_bytes=(embedding, head, tuple(map(layers, old))))


LIES: dict[str, Callable[[ModelEntry], ModelEntry]] = {
    "layers too large for any device": lambda entry: weighing(entry, 1, 1, lambda _: 1 << 50),
    "layers that weigh nothing": lambda entry: weighing(entry, 1, 1, lambda _: 0),
    "one layer": lambda entry: shaped(
        msgspec.structs.replace(entry, weights_bytes=(1, 1, entry.weights_bytes[2][:1])), layer_count=1
    ),
    "another quantisation": lambda entry: msgspec.structs.replace(entry, quantisation=Quantisation.Q4),
    "a cache that fits nowhere": lambda entry: shaped(entry, kv_head_count=1 << 20, head_dim=1 << 20),
    "rows that take long to send": lambda entry: shaped(entry, hidden_size=1 << 24),
    "a manifest that cannot be fetched": lambda entry: msgspec.structs.replace(entry, manifest_bytes=1),
    "another model's name": lambda entry: msgspec.structs.replace(entry, name=ModelName("other")),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_captured_gateway_announces_false_figures(signed: Signed, lie: Callable[[ModelEntry], ModelEntry]) -> None:
    """
    Attack: a captured gateway is the first to announce an allowed model, with figures that would have it placed badly
    or not at all.
    Expected: its word on the model is ignored, and the lie is named; it is not asked for the model's files.
    Unharmed: the model, as the honest store tells of it, and the liar's true words on other models.
    """
    fleet, charter = Fleet(), signed.charter()
    assert fleet.heed(charter) is False
    other = msgspec.structs.replace(signed.entry, model=tuf.sha256(b"unsigned"), name=ModelName("unsigned"))
    lies = told(LIAR, lie(signed.entry), other)
    fleet.announce(lies, 0.0)
    assert fleet.entries() == {other.model: other}
    (error,) = disbelieved(lies, charter)
    assert error.code == "bad_message" and "as its publisher signed" in error.message
    fleet.announce(told(HONEST, signed.entry), 1.0)
    assert fleet.entries()[signed.entry.model] == signed.entry
    assert need_of(fleet.entries()[signed.entry.model]) == need_of(signed.entry)
    assert [each.node for each in sources_of(fleet, signed.entry.model, None, 1.0, 4)] == [HONEST]


def test_a_captured_gateway_gives_an_allowed_models_name_to_another(signed: Signed) -> None:
    """
    Attack: a captured gateway is the first to announce a model that nobody signed, under the name of one that is.
    Expected: the name is the signed model's as soon as a store tells of it.
    Unharmed: what applications ask for by that name.
    """
    fleet = Fleet()
    fleet.heed(signed.charter())
    fake = msgspec.structs.replace(signed.entry, model=tuf.sha256(b"fake"))
    fleet.announce(told(LIAR, fake), 0.0)
    fleet.announce(told(HONEST, signed.entry), 1.0)
    assert fleet.entries() == {signed.entry.model: signed.entry}


def test_a_publisher_gives_its_model_the_name_of_anothers(signed: Signed) -> None:
    """
    Attack: a publisher signs a model of its own under the name of another publisher's, and a gateway that it controls
    is the first to announce it.
    Expected: both are signed; the name stays with the publisher whom the council named first.
    Unharmed: what applications ask for by that name; when the first publisher withdraws, the name is free.
    """
    signed.world.add_publisher(MALLORY, "a-new-one")
    twin = toy_model(Store(signed.world.folder / "twin"), seed=2)
    assert twin.name == signed.entry.name and twin.model != signed.entry.model
    signed.world.publish_model(Store(signed.world.folder / "twin").manifest_bytes(twin.model), MALLORY)
    fleet, charter = Fleet(), signed.charter()
    assert charter.models == {MODEL, signed.entry.model, twin.model}
    fleet.heed(charter)
    fleet.announce(told(LIAR, twin), 0.0)
    fleet.announce(told(HONEST, signed.entry), 1.0)
    assert fleet.entries() == {signed.entry.model: signed.entry}
    alone = signed.world.propose(publishers={"models-a-new-one": MALLORY.node})
    signed.world.put_in_force(alone, [ALICE, BOB])
    assert fleet.heed(signed.charter())
    assert list(fleet.entries()) == [twin.model]


def test_a_captured_gateway_tells_of_an_older_model_of_the_same_name(signed: Signed) -> None:
    """
    Attack: a publisher signed a new model under the name of an older one of its own; a captured gateway is the first
    to tell of the older one, truly, and so keeps the name from the new one.
    Expected: the new model takes the older one's place on the list, and so in the charter; a list with two models of
    one name, which somebody else's tool signed, is refused, `CharterInvalid`.
    Unharmed: the new model, by its name; a model of another name stays.
    """
    old, other = signed.entry, toy_model(Store(signed.world.folder / "other"), name="other", seed=3)
    signed.world.publish_model(Store(signed.world.folder / "other").manifest_bytes(other.model))
    new = toy_model(Store(signed.world.folder / "new"), seed=2)
    manifest = Store(signed.world.folder / "new").manifest_bytes(new.model)
    assert (new.name, new.model != old.model) == (old.name, True)
    current = signed.world.repository.in_force().delegated[LIST][0].signed
    path = tuf.path_of(LIST, new.model)
    both = Targets(version=current.version + 1, expires=tuf.utc(signed.world.now + tuf.LIST_LIFE_S))
    both.targets = {**current.targets, path: target_of(path, manifest)}
    forged = tuf.sign(Metadata(both), [PUBLISHER]).to_bytes()
    with pytest.raises(CharterInvalid, match="the name of another model"):
        signed.world.repository.publish(Publication(delegated={LIST: forged}, files={path: manifest}), signed.world.now)
    signed.world.publish_model(manifest)
    fleet, charter = Fleet(), signed.charter()
    assert charter.models == {MODEL, new.model, other.model}
    fleet.heed(charter)
    fleet.announce(told(LIAR, old), 0.0)
    fleet.announce(told(HONEST, new, other), 1.0)
    assert fleet.entries() == {new.model: new, other.model: other}


def test_a_publisher_signs_false_figures(signed: Signed) -> None:
    """
    Attack: a captured publisher lists an allowed model of another publisher with figures that its manifest does not
    have (or with none), so that a gateway of its own is believed, or no store is.
    Expected: `CharterInvalid`: the repository works the figures out of the manifest, which must come along.
    Unharmed: with the stolen online key the forged list is served all the same, and the honest store is believed as
    before: one publisher's false figures take nothing from another's true ones.
    """
    role = signed.world.add_publisher(MALLORY, "other")
    signed.world.publish_model(signed.manifest, MALLORY)  # honestly, first: so the repository has the file
    path = tuf.path_of(role, signed.entry.model)
    for forge in (lambda figures: figures | {"head_bytes": 1 << 40}, lambda figures: figures | {"name": 7}, None):
        target = target_of(path, signed.manifest)
        true = target.unrecognized_fields.pop("custom")
        if forge is not None:
            target.unrecognized_fields["custom"] = {FIGURES_FIELD: forge(dict(true[FIGURES_FIELD]))}
        current = signed.world.repository.in_force().delegated[role][0].signed
        listed = Targets(version=current.version + 1, expires=tuf.utc(signed.world.now + tuf.LIST_LIFE_S))
        listed.targets = {path: target}
        forged = tuf.sign(Metadata(listed), [MALLORY]).to_bytes()
        publication = Publication(delegated={role: forged}, files={path: signed.manifest})
        with pytest.raises(CharterInvalid, match="other figures than its manifest"):
            signed.world.repository.publish(publication, signed.world.now)
        with pytest.raises(CharterInvalid, match="its file did not come"):
            signed.world.repository.publish(msgspec.structs.replace(publication, files={}), signed.world.now)
        signed.world.serve()
        Forger(signed.world, ONLINE).lists({role: forged})
        fleet = Fleet()
        fleet.heed(signed.world.check())
        fleet.announce(told(HONEST, signed.entry), 0.0)
        assert fleet.entries() == {signed.entry.model: signed.entry}
        shutil.rmtree(signed.world.folder / "device")
        signed.world.client = signed.world.new_client()


def test_an_allowed_model_is_served_although_a_captured_gateway_lies_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Attack: in a running cell, a captured gateway announces an allowed model before its store does, and again and again,
    with layers that fit on no device.
    Expected: the lie is counted in the coordinator's status and named in its log.
    Unharmed: the model: it is placed, and answers.
    """

    async def script() -> None:
        cell = TrustedCell(tmp_path)
        await cell.coordinator.start()
        bus = cell.hub.connect(STRANGER.node)
        lie = msgspec.json.encode(told(STRANGER.node, LIES["layers too large for any device"](cell.entry)))
        await bus.publish(SUBJECTS.store(STRANGER.node), lie)
        await cell.until(lambda: bool(cell.coordinator.fleet.stores), 10.0)
        assert cell.coordinator.status().models == ()
        await cell.peers.start()
        await cell.files.start()
        await cell.source.start()
        for index in range(3):
            await cell.join(index)
        await cell.servable()
        await bus.publish(SUBJECTS.store(STRANGER.node), lie)
        talk = await cell.source.open(cell.entry.model, list(range(10)), 20, 1, "alice")
        await talk.prefill()
        await talk.close(keep=False)
        status = cell.coordinator.status()
        assert [entry.weights_bytes for entry in status.models] == [cell.entry.weights_bytes]
        assert status.dropped_messages == {"figures": 2}
        await cell.close()

    with caplog.at_level(logging.WARNING):
        run_virtual(script())
    named = [each.message for each in caplog.records if "figures message" in each.message]
    assert named and "layer_bytes of" in named[0] and STRANGER.node[:8] in named[0]
