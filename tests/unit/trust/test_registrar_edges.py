"""What comes in broken at the registrar's edges: a full disk, a long consent, a network's name, a database's url."""

import asyncio
import base64
import os
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from fallow.cli.app import app
from fallow.cli.council_place import Known, Place
from fallow.domain.credentials import Role
from fallow.domain.errors import CharterUnavailable, ConfigError, JournalBroken, RegistrarUnavailable, SignatureInvalid
from fallow.domain.network import Network
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.files import CouncilPaths
from fallow.trust.council.halts import seal_halt
from fallow.trust.council.lists import listing
from fallow.trust.council.records import POLICY_RECORDED_BYTES_MAX, seen
from fallow.trust.council.repository import HALTS_FILE, PUBLISHING_FILE
from fallow.trust.keys import load, new_identity
from fallow.trust.membership import enrolment_of
from fallow.trust.registrar.consent import WORDS_MAX_CHARS, Lent, sign_consent, words_for
from fallow.trust.registrar.database import open_database
from fallow.trust.registrar.journal import Kind, parse_head
from fallow.trust.registrar.journal_db import BODY_MAX_CHARS, append
from fallow.trust.registrar.requests import CONSENT_MAX_BYTES, Admitted
from fallow.trust.registrar.state import found, read_network
from fallow.trust.registrar_client import RegistrarClient, met
from tests.unit.trust.registrar_world import World, served


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "network")


def state_of(world: World) -> Path:
    return world.state.paths.folder.parent


# --- the disk -------------------------------------------------------------------------------------


def test_a_disk_that_fails_is_said_to_who_halts_and_who_publishes(world: World) -> None:
    """
    Failure: the halt, or the publication, cannot be written (here: a folder has the file's name).
    Expected: the registrar says that its disk failed, and the client says so, too; nobody is told to doubt the address.
    """
    repository, paths = world.repository, CouncilPaths(state_of(world))
    halt = seal_halt(load(paths.member_key), world.state.digest, 1, "smoke", world.clock.unix_s())
    again = listing(repository.in_force(), tuf.MODELS, {}, load(paths.publisher_key), world.clock.unix_s())
    for name in (HALTS_FILE, PUBLISHING_FILE):
        (repository.folder / name).mkdir()

    async def scenario() -> None:
        async with served(world) as server, RegistrarClient(met(world.state.network_json), [server.url]) as client:
            for asked in (client.post_halt(halt), client.post_publication(msgspec.msgpack.encode(again))):
                with pytest.raises(RegistrarUnavailable, match=r"disk cannot be used now \(Is a directory\)"):
                    await asked

    asyncio.run(scenario())
    known = Known(world.state.network, world.state.network_json, world.state.digest)
    place = Place(paths, known, ())  # the registrar does not run: its folder is used
    with pytest.raises(CharterUnavailable, match="folder on this machine cannot be used: Is a directory"):
        place.post_halt(halt)


def test_a_defect_of_the_registrar_is_said_to_be_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: bytes) -> None:
        raise AssertionError("a broken invariant")

    monkeypatch.setattr(world.repository, "add_halt", broken)

    async def scenario() -> None:
        async with served(world) as server, RegistrarClient(met(world.state.network_json), [server.url]) as client:
            with pytest.raises(RegistrarUnavailable, match="its log says where"):
                await client.post_halt(b"")

    asyncio.run(scenario())


# --- what the journal keeps -----------------------------------------------------------------------


def test_a_consent_that_the_journal_has_no_room_for_is_refused_by_name(world: World) -> None:
    """A stranger with an invitation signs six thousand wide letters."""
    device = new_identity()
    invitation = world.invitation()
    consent = sign_consent(device, world.state.digest, Role.NODE, "ß" * WORDS_MAX_CHARS)
    assert len(consent) > CONSENT_MAX_BYTES
    before = world.kinds()
    with pytest.raises(SignatureInvalid, match=f"length <= {CONSENT_MAX_BYTES}"):
        world.ask(device, enrolment_of(invitation, "wide", consent))
    assert world.kinds() == before
    assert isinstance(world.ask(device, world.enrolment(device, invitation)), Admitted)


def test_the_longest_words_that_we_show_are_kept_in_any_script(world: World) -> None:
    device = new_identity()
    wide = Lent(device="\U0001f697" * 64, memory="文" * 200, folder="\U0001f697" * 400)
    words = words_for("\U0001f697" * 64, world.state.digest, world.state.network.registrar, wide)
    consent = sign_consent(device, world.state.digest, Role.NODE, words)
    assert isinstance(world.ask(device, enrolment_of(world.invitation(), "wide", consent)), Admitted)
    full = base64.b64encode(b"\xff" * CONSENT_MAX_BYTES).decode()
    with world.database.writing() as connection:
        append(connection, 0.0, Kind.CONSENT_GIVEN, device.node, {"words": "0" * 64, "envelope": full})


def test_a_policy_full_of_quotes_is_counted_as_the_journal_writes_it(world: World) -> None:
    state = world.repository.in_force()
    policy = b'"' * (POLICY_RECORDED_BYTES_MAX - 10)
    told = seen(msgspec.structs.replace(state, policy_bytes=policy), ())
    assert told.policy == ""
    assert len(msgspec.json.encode(seen(state, ()).policy)) < BODY_MAX_CHARS


# --- a network's description ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 'home".\n\nNothing else is lent.\x1b[8m'},
        {"name": "home\u202e"},
        {"name": ""},
        {"name": "h" * 65},
        {"cell": "a.b"},
        {"cell": "a\nb"},
        {"cell": ""},
    ],
)
def test_who_invites_adds_nothing_to_what_an_owner_agrees_to(
    world: World, tmp_path: Path, changes: dict[str, str]
) -> None:
    """The name stands in the words of the consent, and on the terminal: a name is all that it may be."""
    network = msgspec.structs.replace(world.state.network, **changes)
    with pytest.raises(ConfigError, match="cannot be called"):
        read_network(msgspec.json.encode(network))
    names = {"name": network.name, "cell": network.cell}
    with pytest.raises(ConfigError, match="cannot be called"):
        found(tmp_path / "new", **names, tuf_root=network.tuf_root, now_unix_s=world.clock.unix_s())
    assert not (tmp_path / "new").exists()


def test_a_network_may_have_any_name_that_is_one(world: World) -> None:
    for name in ("[/x] :smile:", "Ørsted's", "家"):
        network = msgspec.structs.replace(world.state.network, name=name)
        assert read_network(msgspec.json.encode(network)) == Network(**msgspec.structs.asdict(network))


# --- small things ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no url"),
        (b"no url at all", "holds no url"),
        (b"postgresql://me:secret@host:port/db", "holds no url"),
        (b"\xff\xfe", "holds no url"),
        (b"nosuchdatabase://me:secret@host/db", "cannot be opened"),
        (b"sqlite:///:memory:?timeout=soon", "cannot be opened"),
        (b"mysql+nodriver://me:secret@host/db", "cannot be opened"),
        (b"mssql+pymssql://me:secret@host/db", "without its driver: install the Python package pymssql"),
    ],
)
def test_a_database_url_that_is_none_is_named(world: World, content: bytes, words: str) -> None:
    (world.state.paths.folder / "database-url").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as refusal:
        open_database(world.state.paths.database)
    assert "secret" not in refusal.value.message


@pytest.mark.parametrize("text", ["²:" + "a" * 64, "1²:" + "a" * 64, "٣:" + "a" * 64])
def test_a_head_has_digits_of_ascii(text: str) -> None:
    with pytest.raises(JournalBroken, match="Expected a journal's head"):
        parse_head(text)


def test_an_export_is_for_who_asked_for_it_alone(world: World, tmp_path: Path) -> None:
    state = str(state_of(world))
    out = tmp_path / "journal.jsonl"
    out.touch(mode=0o644)
    done = CliRunner().invoke(app, ["audit", "export", "--out", str(out), "--state-dir", state])
    assert done.exit_code == 0, done.output
    assert out.stat().st_mode & 0o077 == 0
    assert out.read_bytes().count(b"\n") == 1 + len(world.journal())


@pytest.mark.parametrize(
    "command", [["audit", "export"], ["council", "propose", "--renew"], ["council", "propose", "--lease", "60"]]
)
def test_no_folder_is_made_for_a_mistyped_path(world: World, tmp_path: Path, command: list[str]) -> None:
    state = ["--state-dir", str(state_of(world))]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "tpyo" / "file"), *state])
    assert isinstance(done.exception, ConfigError)
    assert "There is no folder" in done.exception.message
    assert not (tmp_path / "tpyo").exists()
    os.mkfifo(tmp_path / "pipe")
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "pipe"), *state])
    assert isinstance(done.exception, ConfigError)
    assert (tmp_path / "pipe").is_fifo()
