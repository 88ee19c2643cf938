"""`fallow council …` as its members use it: three machines, files carried between them, a registrar's folder on one.

The commands run in this process, on the real files. Members need no network, and use none; a publisher on another
machine speaks with the real registrar's interface, over HTTPS.
"""

import asyncio
import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fallow.cli.app import app
from fallow.cli.options import console
from fallow.domain.errors import CharterInvalid, ConfigError, FallowError, NotWorking, RegistrarUnavailable
from fallow.domain.fleet import Subjects
from fallow.domain.ids import ModelName
from fallow.fabric.broker import Broker
from fallow.fabric.nats_bus import NatsBus
from fallow.gateway.server import serve
from fallow.models.importer import import_model
from fallow.models.store import Store
from fallow.policy.council import HALT_EPOCHS_AHEAD
from fallow.system_clock import SystemClock
from fallow.trust.certificates import server_context
from fallow.trust.council.files import CouncilPaths, found_council_of_one
from fallow.trust.council.halts import halt_of_text, halt_text, seal_halt
from fallow.trust.council.publisher import publish_model, withdraw_model
from fallow.trust.keys import load
from fallow.trust.registrar.api import RegistrarApi
from fallow.trust.registrar.database import open_database
from fallow.trust.registrar.service import Registrar
from fallow.trust.registrar.state import RegistrarState, found, open_state, write_server_certificate
from fallow.trust.registrar.word import RegistrarWord

SMALL = Path(__file__).parents[2] / "fixtures" / "families" / "llama"
runner = CliRunner()


class Machine:
    """One member's machine."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.state = folder / name
        self.paths = CouncilPaths(self.state)

    def run(self, *arguments: str, answer: str | None = None) -> str:
        """What a command prints to stdout. Raises what it raises."""
        done = runner.invoke(app, ["council", *arguments, "--state-dir", str(self.state)], input=answer)
        if isinstance(done.exception, FallowError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return str(done.stdout)

    def last_word(self, *arguments: str) -> str:
        return self.run(*arguments).split()[-1]

    @property
    def facts(self) -> dict:  # type: ignore[type-arg]
        return json.loads(self.run("status", "--json"))  # type: ignore[no-any-return]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_width", 200)  # keys are looked for in one piece
    return tmp_path


def founded(folder: Path) -> tuple[Machine, Machine, Machine]:
    """A council of three, two of whom sign, with a registrar's folder on Alice's machine."""
    alice, bob, carol = (Machine(folder, name) for name in ("alice", "bob", "carol"))
    texts = [each.last_word("join", "--name", each.name) for each in (bob, carol)]
    alice.run("init", "--name", "alice", "-k", "2", "--member", texts[0], "--member", texts[1])
    shutil.copy("founding.json", "copy.json")
    alice.run("sign", "founding.json", "--yes")
    shown = bob.run("sign", "copy.json", "--yes")
    assert load(carol.paths.member_key).node in shown  # whole, or it could be another's
    with pytest.raises(CharterInvalid, match="1 of the 2"):
        alice.run("publish", "founding.json")
    alice.run("publish", "founding.json", "copy.json")
    state = found(
        alice.state,
        name="home",
        cell="home",
        tuf_root=alice.paths.open_repository().first_root(),
        now_unix_s=time.time(),
    )
    for other in (bob, carol):  # as `fallow join` would leave it there
        (other.state / "device").mkdir(parents=True)
        (other.state / "device" / "network.json").write_bytes(state.network_json)
    return alice, bob, carol


def test_a_council_of_three_from_founding_to_resuming(folder: Path) -> None:
    """
    Goal: every step of docs/security/council.md works with files alone.
    Method: found; change the policy; one halts from a machine that reaches nothing, another delivers it; the halting
    member alone cannot resume; two resume and vote a third out.
    """
    alice, bob, carol = founded(folder)
    assert alice.facts["threshold"] == 2
    assert [each["name"] for each in alice.facts["members"] if each["you"]] == ["alice"]

    shown = alice.run("propose", "--lease", "60", "--allow-model", "a" * 64)
    assert "lease_s" in shown
    for signer in (alice, bob):
        assert "60" in signer.run("sign", "proposal.json", answer="y\n")
    alice.run("publish", "proposal.json")
    assert (alice.facts["epoch"], alice.facts["lease_s"]) == (2, 60)

    with pytest.raises(RegistrarUnavailable, match="not delivered"):
        carol.run("halt", "--why", "the models lie", "--yes")
    done = runner.invoke(app, ["council", "halt", "--why", "it lies", "--yes", "--state-dir", str(carol.state)])
    text = next(line for line in done.stdout.splitlines() if line.startswith("fallow-halt-"))
    alice.run("halt", "--deliver", text)
    assert "HALTED by carol" in alice.run("status")
    assert "it lies" in alice.run("status")
    network = CouncilPaths(alice.state).open_repository(_digest(alice))
    with pytest.raises(NotWorking):
        network.renew_timestamp(time.time())

    alice.run("propose", "--resume", "--remove", "carol", "--out", "resume.json")
    carol.run("sign", "resume.json", "--yes")
    with pytest.raises(CharterInvalid):
        alice.run("publish", "resume.json")
    alice.run("sign", "resume.json", "--yes")
    bob.run("sign", "resume.json", "--yes")
    alice.run("publish", "resume.json")
    assert alice.facts["halts"] == []
    assert [each["name"] for each in alice.facts["members"]] == ["alice", "bob"]
    network.renew_timestamp(time.time())


def test_a_thief_who_names_the_last_epoch_is_voted_out(folder: Path) -> None:
    """A halt of the last epoch there is holds nowhere; one of the highest that holds ends with the thief's seat."""
    alice, bob, carol = founded(folder)
    network = CouncilPaths(alice.state).open_repository(_digest(alice))
    member = load(carol.paths.member_key)
    for epoch in (1 << 53, 1 + HALT_EPOCHS_AHEAD):
        ransom = seal_halt(member, network.network, epoch, f"ransom {epoch}", time.time())
        alice.run("halt", "--deliver", halt_text(ransom))
    assert [each["epoch"] for each in alice.facts["halts"]] == [1 + HALT_EPOCHS_AHEAD]
    alice.run("propose", "--resume", "--remove", "carol")
    for signer in (alice, bob):
        signer.run("sign", "proposal.json", "--yes")
    alice.run("publish", "proposal.json")
    assert (alice.facts["halts"], alice.facts["epoch"]) == ([], 2)
    network.renew_timestamp(time.time())


def _digest(machine: Machine) -> str:
    return open_state(machine.state).digest


@contextlib.contextmanager
def registrar_of(machine: Machine) -> Iterator[str]:
    """The registrar's interface on a port of this machine, in a thread; gives its address."""
    state = network_of(machine)
    started: list[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serving() -> None:
        clock, database = SystemClock(), open_database(state.paths.database)
        registrar, word = Registrar(state, database, clock), RegistrarWord(state, database, clock)
        api = RegistrarApi(registrar, word, machine.paths.open_repository(state.digest), clock)
        tls = server_context(*write_server_certificate(state, clock.unix_s()))
        server = await serve(api.app(), "127.0.0.1", 0, tls=tls)
        done = asyncio.Event()
        started.append((server.url, asyncio.get_running_loop(), done))
        ready.set()
        await done.wait()
        await server.close()
        database.close()

    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serving()))
    thread.start()
    assert ready.wait(60)
    [(url, loop, done)] = started
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()


def network_of(machine: Machine) -> RegistrarState:
    """Found a network around a council, as `fallow up` does."""
    root = machine.paths.open_repository().first_root()
    return found(machine.state, name="home", cell="home", tuf_root=root, now_unix_s=time.time())


def test_a_council_of_one_grows(folder: Path) -> None:
    """What `fallow up` founded becomes a council of three."""
    alice, bob, carol = (Machine(folder, name) for name in ("alice", "bob", "carol"))
    found_council_of_one(alice.state, "alice", time.time())
    found(
        alice.state,
        name="home",
        cell="home",
        tuf_root=alice.paths.open_repository().first_root(),
        now_unix_s=time.time(),
    )
    assert "one key decides everything" in alice.run("status")
    invitation = alice.last_word("invite")
    texts = [each.last_word("join", invitation, "--name", each.name) for each in (bob, carol)]
    alice.run("propose", "--add", texts[0], "--add", texts[1], "--threshold", "2")
    alice.run("sign", "proposal.json", "--yes")
    with pytest.raises(CharterInvalid, match="bob, carol"):
        alice.run("publish", "proposal.json")
    bob.run("sign", "proposal.json", "--yes")
    alice.run("publish", "proposal.json")
    assert alice.facts["threshold"] == 2
    with pytest.raises(CharterInvalid, match="another network"):
        other = Machine(folder, "other")
        found_council_of_one(other.state, "other", time.time())
        other.run("propose", "--lease", "60", "--out", "other.json")
        bob.run("sign", "other.json", "--yes")


def test_who_does_not_agree_signs_nothing(folder: Path) -> None:
    alice = Machine(folder, "alice")
    alice.run("init", "--name", "alice")
    alice.run("propose", "--lease", "60")
    before = Path("proposal.json").read_bytes()
    for question in (["sign", "proposal.json"], ["halt", "--why", "a drill", "--network", "n.json"]):
        if question[0] == "halt":
            state = found(
                folder / "x", name="n", cell="home", tuf_root=alice.paths.open_repository().first_root(), now_unix_s=0
            )
            Path("n.json").write_bytes(state.network_json)
        done = runner.invoke(app, ["council", *question, "--state-dir", str(alice.state)], input="n\n")
        assert done.exit_code == 1
        assert "Nothing was done." in done.output
    assert Path("proposal.json").read_bytes() == before
    assert alice.facts["halts"] == []


def test_the_registrars_key_and_a_publisher_are_replaced(folder: Path) -> None:
    alice, dora = Machine(folder, "alice"), Machine(folder, "dora")
    alice.run("init", "--name", "alice")
    new_online = alice.last_word("key", "--new-online")
    publisher = dora.last_word("key", "--publisher").replace("NAME", "dora")
    assert [each["name"] for each in alice.facts["publishers"]["models"]] == ["alice"]
    alice.run("propose", "--online-key", new_online, "--publisher", publisher, "--remove-publisher", "models=alice")
    alice.run("sign", "proposal.json", "--yes")
    with pytest.raises(CharterInvalid, match="dora"):
        alice.run("publish", "proposal.json")
    dora.run("sign", "proposal.json", "--yes")
    alice.run("publish", "proposal.json")
    (told,) = alice.facts["publishers"]["models"]
    assert (told["name"], told["key"], told["lists"]) == ("dora", publisher.rpartition(":")[2], 0)
    assert [each["name"] for each in alice.facts["publishers"]["releases"]] == ["alice"]


def test_a_publishers_key_is_replaced_and_the_list_stays(folder: Path) -> None:
    """Its name is the list's: another key signs the same list anew, with what the council takes off left out."""
    alice, dora = Machine(folder, "alice"), Machine(folder, "dora")
    alice.run("init", "--name", "Alice's Laptop")
    assert [each["name"] for each in alice.facts["publishers"]["models"]] == ["alice-s-laptop"]
    _, evil = (publish_model(alice.state, manifest, time.time()) for manifest in (b"good", b"evil"))
    key = dora.last_word("key", "--publisher").rpartition(":")[2]
    name = "models=alice-s-laptop"
    shown = alice.run("propose", "--publisher", f"{name}:{key}", "--withdraw", f"{name}:{evil}")
    assert key in shown and evil in shown and "withdrawn" in shown
    for signer in (alice, dora):
        signer.run("sign", "proposal.json", "--yes")
    alice.run("publish", "proposal.json")
    assert (alice.facts["signed_models"], alice.facts["publishers"]["models"][0]["key"]) == (1, key)
    with pytest.raises(CharterInvalid, match="has not made"):
        publish_model(alice.state, b"more", time.time())
    alice.run("propose", "--remove-publisher", "models=alice-s-laptop")
    alice.run("sign", "proposal.json", "--yes")
    alice.run("publish", "proposal.json")
    assert (alice.facts["signed_models"], "Nobody may publish models" in alice.run("status")) == (0, True)


def test_a_publisher_on_a_machine_of_their_own(folder: Path) -> None:
    """
    Goal: who publishes need not be who runs the network.
    Method: Dora's machine reads the repository over the registrar's real HTTPS interface, and posts to it.
    """
    alice, dora = Machine(folder, "alice"), Machine(folder, "dora")
    store = Store(dora.state / "models")
    model = import_model(SMALL, store, name=ModelName("hers")).digest
    alice.run("init", "--name", "alice")
    publisher = dora.last_word("key", "--publisher").replace("NAME", "dora")
    with registrar_of(alice) as url:
        (dora.state / "device").mkdir(parents=True)
        shutil.copy(alice.state / "registrar" / "network.json", dora.state / "device" / "network.json")
        with pytest.raises(CharterInvalid, match="has not made"):
            dora.run("sign-model", "hers", "--registrar", url)
        alice.run("propose", "--publisher", publisher)
        for signer in (alice, dora):
            signer.run("sign", "proposal.json", "--yes")
        alice.run("publish", "proposal.json")
        dora.run("sign-model", "hers", "--registrar", url)
        assert alice.facts["signed_models"] == 1
        publish_model(alice.state, store.manifest_bytes(model), time.time())
        assert alice.facts["signed_models"] == 1
        assert "models-alice lists it, too" in dora.run("withdraw-model", model, "--yes", "--registrar", url)
        assert "alice (1 listed), dora (0 listed)" in dora.run("status", "--registrar", url)
        assert alice.facts["signed_models"] == 1
        assert withdraw_model(alice.state, model, time.time())
        assert alice.facts["signed_models"] == 0
        with pytest.raises(CharterInvalid, match="not listed"):
            dora.run("withdraw-model", "hers", "--yes", "--registrar", url)


def test_a_halt_goes_over_the_bus_when_the_registrar_is_away(folder: Path) -> None:
    """
    Goal: a registrar that cannot be reached, or swallows a halt, is not the only way.
    Method: a real nats-server; Carol's machine reaches it, and no registrar; who listens hears her halt.
    """
    _, _, carol = founded(folder)
    heard: list[bytes] = []
    ready, done = threading.Event(), threading.Event()
    url: list[str] = []

    async def listening() -> None:
        broker = Broker(folder / "broker")
        await broker.start()
        bus = await NatsBus.connect(broker.urls[0], "a device")
        got = asyncio.Event()

        async def on_halt(_: str, envelope: bytes) -> None:
            heard.append(envelope)
            got.set()

        await bus.subscribe(Subjects("home").halt, on_halt)
        url.append(broker.urls[0])
        ready.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(got.wait(), 30)
        await asyncio.to_thread(done.wait, 30)
        await bus.close()
        await broker.close()

    thread = threading.Thread(target=lambda: asyncio.run(listening()))
    thread.start()
    try:
        assert ready.wait(30)
        settings = folder / "there.toml"
        settings.write_text(f'[bus]\nurl = "{url[0]}"\n[trust]\ninsecure_development = true\n')
        shown = carol.run("halt", "--why", "it lies", "--yes", "--config", str(settings))
    finally:
        done.set()
        thread.join()
    text = next(line for line in shown.splitlines() if line.startswith("fallow-halt-"))
    assert heard == [halt_of_text(text)]
    assert "the control bus has it" in shown


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--lease", "1"],
        ["--remove", "nobody"],
        ["--remove", "alice"],
        ["--tier-min", "royal"],
        ["--publisher", "models=x"],
        ["--publisher", "evil=x:" + "a" * 64],
        ["--publisher", "models=Dora's:" + "a" * 64],
        ["--remove-publisher", "models=nobody"],
        ["--remove-publisher", "alice"],
        ["--withdraw", "models=" + "a" * 64],
        ["--withdraw", "models=alice:" + "a" * 64],
        ["--withdraw", "models=dora:all"],
        ["--withdraw", "evil=all"],
        ["--add", "fallow-member-rubbish"],
        ["--threshold", "2"],
        ["--forbid-model", "a" * 64],
        ["--online-key", "short"],
    ],
    ids=lambda flags: " ".join(flags)[:30] or "nothing",
)
def test_what_cannot_be_proposed_is_said(folder: Path, flags: list[str]) -> None:
    alice = Machine(folder, "alice")
    alice.run("init", "--name", "alice")
    with pytest.raises(FallowError) as refusal:
        alice.run("propose", *flags)
    assert len(refusal.value.message) > 20
    assert not Path("proposal.json").exists()


def test_a_machine_that_knows_no_network_says_so(folder: Path) -> None:
    nobody = Machine(folder, "nobody")
    for command in (["status"], ["propose", "--lease", "60"], ["invite"], ["key"], ["halt", "--why", "x"]):
        with pytest.raises(ConfigError):
            nobody.run(*command)
