"""How often a publisher's list may change from afar: what a stolen key does to the registrar's disk and to devices."""

import asyncio
import shutil
from pathlib import Path

import msgspec
import pytest

from fallow.domain.errors import CharterInvalid, CharterUnavailable, PublishedTooOften
from fallow.policy.publishing import BURST, EVERY_S
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.lists import listing
from fallow.trust.council.publication import Publication
from fallow.trust.council.publishing_book import PublishingBook
from fallow.trust.council.repository import PUBLISHING_FILE, Repository
from fallow.trust.keys import Identity, load
from fallow.trust.registrar_client import RegistrarClient, met
from tests.adversarial.council_world import ALICE, BOB, LIST, MALLORY, MODEL, NETWORK, PUBLISHER, World, identity
from tests.unit.trust.registrar_world import World as Network
from tests.unit.trust.registrar_world import served


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return World(tmp_path_factory.mktemp("founded")).folder


@pytest.fixture
def world(tmp_path: Path, founded: Path) -> World:
    shutil.copytree(founded, tmp_path / "world")
    return World(tmp_path / "world")


def renewal(world: World, publisher: Identity = PUBLISHER, after_s: float = 0.0) -> Publication:
    """The publisher's list as it is, signed again: the least that a key can publish."""
    return listing(world.repository.in_force(), tuf.MODELS, {}, publisher, world.now + after_s)


def use_up(world: World, role: str, left: int) -> None:
    """As if all but so many of a burst were published just now."""
    book = {role: {"left": float(left), "updated_unix_s": world.now}}
    (world.repository.folder / PUBLISHING_FILE).write_bytes(msgspec.json.encode(book))


def test_a_stolen_key_publishes_a_burst_and_then_a_few_an_hour(world: World) -> None:
    """
    Attack: a thief signs the list anew, again and again; each time the journal grows and every device looks.
    Expected: `PublishedTooOften`, which says when again; nothing is written; a restart gives no new burst.
    Unharmed: whoever holds the folder, another publisher, and the publisher when the time has come.
    """
    other = world.add_publisher(MALLORY, "other")
    use_up(world, LIST, 2)
    for turn in range(2):
        world.repository.publish_from_afar(renewal(world, after_s=turn), world.now)
    before = {path: path.read_bytes() for path in world.repository.folder.rglob("*") if path.is_file()}
    for repository in (world.repository, Repository(world.repository.folder, world.folder / "online", NETWORK)):
        with pytest.raises(PublishedTooOften, match=rf"{LIST} .* again in 1[56] minutes"):
            repository.publish_from_afar(renewal(world, after_s=9), world.now)
    assert before == {path: path.read_bytes() for path in before}
    world.repository.publish_from_afar(renewal(world, MALLORY), world.now)
    world.repository.publish(renewal(world, after_s=10), world.now)
    world.now += EVERY_S + 1
    world.repository.publish_from_afar(renewal(world), world.now)
    with pytest.raises(PublishedTooOften):
        world.repository.publish_from_afar(renewal(world, after_s=9), world.now)
    assert set(world.repository.in_force().delegated) == {LIST, other}


def test_a_new_publisher_has_a_burst(tmp_path: Path) -> None:
    book = PublishingBook(tmp_path / "book")
    for _ in range(BURST):
        book.count([LIST], 1e9)
    with pytest.raises(PublishedTooOften):
        book.count(["models-new", LIST], 1e9)
    for _ in range(BURST):  # the refusal counted neither
        book.count(["models-new"], 1e9)


def test_the_councils_word_is_not_counted_and_gives_a_new_publisher_a_burst(world: World) -> None:
    """A thief who used all of it up keeps neither the council from taking the key away nor the heir from publishing."""
    use_up(world, LIST, 0)
    heir = identity("heir")
    proposed = world.propose(publishers={LIST: heir.node})
    world.put_in_force(proposed, [ALICE, BOB, heir])
    world.repository.publish_from_afar(renewal(world, heir), world.now)
    world.serve()
    assert world.check().models == {MODEL}


def test_what_does_not_hold_or_says_nothing_new_is_not_counted(world: World) -> None:
    """Nobody but who holds the key uses its burst up."""
    use_up(world, LIST, 1)
    forged = renewal(world)
    signed = tuf.read(tuf.Targets, forged.delegated[LIST])
    signed.signatures.clear()
    stranger = tuf.sign(signed, [MALLORY]).to_bytes()
    said = Publication(delegated={LIST: world.repository.in_force().delegated[LIST][1]})
    for _ in range(3):
        with pytest.raises(CharterInvalid, match="0 valid signatures"):
            world.repository.publish_from_afar(Publication(delegated={LIST: stranger}), world.now)
        world.repository.publish_from_afar(said, world.now)
    world.repository.publish_from_afar(forged, world.now)


def test_a_damaged_book_is_named(world: World) -> None:
    (world.repository.folder / PUBLISHING_FILE).write_bytes(b"{")
    with pytest.raises(CharterUnavailable, match="delete it"):
        world.repository.publish_from_afar(renewal(world), world.now)


def test_the_publisher_hears_when_again_over_https(tmp_path: Path) -> None:
    """By the name that the registrar gave it, on another machine."""
    network = Network(tmp_path)
    publisher = load(tmp_path / "publisher" / "publisher.key")
    role = tuf.role_held_by(network.repository.in_force().targets.signed, tuf.MODELS, publisher.node)
    now_s = network.clock.unix_s()
    book = {role: {"left": 0.0, "updated_unix_s": now_s}}
    (network.repository.folder / PUBLISHING_FILE).write_bytes(msgspec.json.encode(book))
    again = listing(network.repository.in_force(), tuf.MODELS, {}, publisher, now_s)

    async def scenario() -> None:
        async with served(network) as server, RegistrarClient(met(network.state.network_json), [server.url]) as client:
            with pytest.raises(PublishedTooOften, match="minutes"):
                await client.post_publication(msgspec.msgpack.encode(again))

    asyncio.run(scenario())
