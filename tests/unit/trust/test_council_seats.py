"""How members and keys come to a council's machine, where the machine has something already: nothing of it is lost."""

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from fallow.cli.app import app
from fallow.cli.council_seats import _new_online_key
from fallow.domain.errors import CharterInvalid, ConfigError, SignatureInvalid
from fallow.trust.council import tuf_format as tuf
from fallow.trust.council.files import CouncilInvitation, CouncilPaths, invitation_of, invitation_text
from fallow.trust.council.lists import delisting
from fallow.trust.council.pins import Pin, check_pin, pin_of, write_pin
from fallow.trust.council.proposals import first_root_payload
from fallow.trust.council.repository import ONLINE_KEYS_MAX
from fallow.trust.keys import load, load_or_create
from tests.adversarial.council_world import ALICE, BOB, LIST, NETWORK, PUBLISHER, World, identity, write_key

runner = CliRunner()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


def pin_at(world: World, network: str = NETWORK) -> Pin:
    """Of a member who has seen what is in force."""
    base = world.base()
    pin = Pin(name="alice", network=network, first_root=tuf.sha256(first_root_payload(base.roots[0])))
    return check_pin(pin, base)


def invited(world: World, name: str = "home") -> str:
    first_root = tuf.sha256(first_root_payload(world.base().roots[0]))
    invitation = CouncilInvitation(name=name, network=NETWORK, first_root=first_root, threshold=2, members=3)
    return invitation_text(invitation)


def join(state: Path, text: str) -> str:
    done = runner.invoke(app, ["council", "join", text, "--name", "Alice", "--state-dir", str(state)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


# --- pins -----------------------------------------------------------------------------------------


def test_a_founder_who_joins_is_shown_no_older_list(world: World, tmp_path: Path) -> None:
    """
    Attack: a founder, whose pin names no network yet, takes up an invitation; then a base is shown from before a model
    was withdrawn.
    Expected: the pin gets the network's name and keeps all that it has seen, so that the base is refused.
    """
    world.publish_model(b'{"name":"bad"}')
    stale = world.base()
    state = world.repository.in_force()
    bad = tuf.sha256(b'{"name":"bad"}')
    world.repository.publish(delisting(state, tuf.MODELS, bad, PUBLISHER, world.now), world.now)
    seen = pin_at(world, network="")
    paths = CouncilPaths(tmp_path)
    write_pin(paths, seen)
    join(tmp_path, invited(world))
    kept = pin_of(paths)
    assert kept == msgspec.structs.replace(seen, name="Alice", network=NETWORK)
    with pytest.raises(CharterInvalid, match="would come back"):
        check_pin(kept, stale)


def test_a_list_of_before_is_refused_under_another_online_key_too(world: World) -> None:
    """
    Attack: since the registrar's key was replaced, the list from before a withdrawal is shown.
    Expected: refused, as it is under the old one.
    """
    bad = world.publish_model(b'{"name":"bad"}')
    old = world.repository.in_force()
    world.repository.publish(delisting(old, tuf.MODELS, bad, PUBLISHER, world.now), world.now)
    pin = pin_at(world)
    new = identity("another online key")
    write_key(world.folder / "online", new)
    world.put_in_force(world.propose(online=new.node), [ALICE, BOB])
    newer = world.base()
    check_pin(pin, newer)
    stale = msgspec.structs.replace(newer, delegated={LIST: old.delegated[LIST][1].decode()})
    with pytest.raises(CharterInvalid, match="would come back"):
        check_pin(pin, stale)


def test_a_publisher_who_comes_back_with_another_key_is_believed(world: World) -> None:
    """Removed, forgotten with the registrar's old key, and made one again: the list begins anew at version 1."""
    role = world.add_publisher(identity("dora"), "dora")
    for index in range(2):
        world.publish_model(b"%d" % index, identity("dora"))
    pin = pin_at(world)
    held = tuf.publishers(world.repository.in_force().targets.signed)
    without = {each: key for each, key in held.items() if each != role}
    world.put_in_force(world.propose(publishers=without), [ALICE, BOB])
    new = identity("another online key")
    write_key(world.folder / "online", new)
    world.put_in_force(world.propose(online=new.node), [ALICE, BOB])
    seen_between = check_pin(pin, world.base())
    back = world.add_publisher(identity("dora's new key"), "dora")
    assert back == role
    assert world.repository.in_force().delegated[role][0].signed.version < pin.lists[role]
    check_pin(pin, world.base())
    world.put_in_force(world.propose(publishers=without), [ALICE, BOB])
    newest = identity("a third online key")
    write_key(world.folder / "online", newest)
    world.put_in_force(world.propose(online=newest.node), [ALICE, BOB])
    world.add_publisher(identity("dora"), "dora")  # with the key that the pin knows: only who saw them gone believes it
    check_pin(seen_between, world.base())
    with pytest.raises(CharterInvalid, match="a new key"):
        check_pin(pin, world.base())


# --- invitations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["home\n\nYou may sign.", "\x1b[8mhidden", "home\u202e", "h" * 65])
def test_an_invitation_names_its_network_as_a_network_can_be_called(world: World, tmp_path: Path, name: str) -> None:
    with pytest.raises(SignatureInvalid, match="cannot be called"):
        join(tmp_path, invited(world, name))
    assert not CouncilPaths(tmp_path).member_key.exists()
    assert "The network [/x] :x:: 2 of 3" in join(tmp_path, invited(world, "[/x] :x:"))
    assert invitation_of(invited(world, "")).name == ""


# --- the registrar's new key ----------------------------------------------------------------------


def test_a_new_online_key_is_new(tmp_path: Path) -> None:
    """`fallow council key --new-online`, after the older of two key files was deleted: not the one that is in use."""
    keys = CouncilPaths(tmp_path).online_keys
    first, second = (load_or_create(keys / f"{number}.key") for number in (1, 2))
    (keys / "1.key").unlink()
    done = runner.invoke(app, ["council", "key", "--new-online", "--state-dir", str(tmp_path)])
    shown = done.stdout.split()[0]
    assert shown not in {first.node, second.node}
    assert load(keys / "3.key").node == shown
    assert (keys / "3.key").stat().st_mode & 0o077 == 0
    load_or_create(keys / "ours².key")
    load_or_create(keys / "backup.key")
    assert _new_online_key(keys).node == load(keys / "4.key").node


def test_more_online_keys_than_the_registrar_looks_at_are_refused(tmp_path: Path) -> None:
    for _ in range(ONLINE_KEYS_MAX):
        _new_online_key(tmp_path)
    with pytest.raises(ConfigError, match="delete those"):
        _new_online_key(tmp_path)
