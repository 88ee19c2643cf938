"""Words that strangers choose are only words in what commands print: no markup, no escape codes, no lines of their own.

Goal: no name, reason or answer ends a command with a traceback, moves a terminal's cursor, or begins a line that looks
like ours. Method: each command prints what holds hostile words, on the real console; what comes out is looked at.
"""

import io
import json
import logging
import sys
import unicodedata
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import fallow.cli
from fallow.cli import conversation
from fallow.cli.app import app
from fallow.cli.council_words import Publisher, Situation, show_review
from fallow.cli.options import _PlainFormatter, console, notes, say
from fallow.cli.plain import PlainConsole, one_line, visible
from fallow.cli.progress import import_progress
from fallow.cli.status import tables
from fallow.domain.cells import CellDigest, NeighbourCell
from fallow.domain.charter import FleetPolicy, Halt
from fallow.domain.fleet import (
    CoordinatorReport,
    FleetStatus,
    GatewayReport,
    Heartbeat,
    HostedStage,
    ModelEntry,
    QuarantinedDevice,
    StageStatus,
)
from fallow.domain.frames import PeerAddress
from fallow.domain.ids import Digest, ModelName, NodeId
from fallow.domain.model import ModelConfig, Quantisation, Span, StageSpec
from fallow.models.importer import import_model
from fallow.models.store import Store
from fallow.policy.council import Change
from fallow.trust.council.proposals import Need, Review
from fallow.trust.registrar import database as db
from fallow.trust.registrar.journal import Kind
from fallow.trust.registrar.journal_db import append
from tests.unit.trust.registrar_world import World

SMALL = Path(__file__).parents[2] / "fixtures" / "families" / "llama"
BREAK = "\nFORGED"
"""A word with this would begin a line of its own."""
PIECES = (
    "[/x]", "[bold]", "[/]", "\\[", ":smile:", "\x1b[2J", "\x1b]0;x\x07", "\x9b8m", "\r", BREAK, "\t", "\x00",
    "\u202e", "\u2066", "\u200f", "\u200b", "\u2028FORGED", "\x85FORGED", "\ufeff", "\U000e0041",
    "ß", "文", " ", "a",
)  # fmt: skip
words = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=12)
EVERYTHING = "".join(PIECES)
KEY = NodeId("1" * 64)
MODEL = Digest("a" * 64)
few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
runner = CliRunner()


def is_plain(shown: str) -> bool:
    """Whether every character of it is seen, and no line began inside a word."""
    acting = [each for each in shown if unicodedata.category(each) in {"Cc", "Zl", "Zp", "Cs"} and each != "\n"]
    turning = [each for each in shown if unicodedata.bidirectional(each)[-1:] in {"E", "O", "I", "F"}]
    turning = [each for each in turning if unicodedata.category(each) == "Cf"]
    return not acting and not turning and not any(line.lstrip().startswith("FORGED") for line in shown.splitlines())


def printed(what: Any) -> str:
    file = io.StringIO()
    PlainConsole(file=file, width=2000).print(what)
    return file.getvalue()


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (console, notes):
        monkeypatch.setattr(each, "_width", 2000)  # a word that is folded begins a line


# --- the root -------------------------------------------------------------------------------------


def test_every_character_that_acts_is_shown() -> None:
    """Control characters, separators of lines, half pairs, and whatever turns the writing around; and nothing else."""
    for code in (*range(0x20000), *range(0xE0000, 0xE1000)):
        each = chr(code)
        acts = unicodedata.category(each) in {"Cc", "Zl", "Zp", "Cs"} or unicodedata.bidirectional(each) in {
            "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI",
        }  # fmt: skip
        if acts:
            assert one_line(each).isascii(), hex(code)
        elif unicodedata.category(each) not in {"Cf", "Cn"}:
            assert one_line(each) == each, hex(code)
    assert visible("a\tb\n") == "a\tb\n"
    assert visible("\u062e\u0648\u0627\u0647\u200c\u0645") == "\u062e\u0648\u0627\u0647\u200c\u0645"


@settings(max_examples=20, deadline=None)
@given(words)
@example(EVERYTHING)
def test_json_that_is_printed_says_what_it_said(word: str) -> None:
    for text in (json.dumps({"a": word}, ensure_ascii=False), json.dumps({word: 1}, ensure_ascii=False, indent=1)):
        assert json.loads(visible(text)) == json.loads(text)


@settings(max_examples=20, deadline=None)
@given(words)
@example(EVERYTHING)
def test_the_console_prints_words_as_they_are(word: str) -> None:
    shown = printed(f"<{one_line(word)}>")
    assert shown.endswith(">\n")
    assert is_plain(shown)
    if "\n" not in word and one_line(word) == word:
        assert shown == f"<{word}>\n"


# --- each command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with a small model in its store."""
    state = tmp_path_factory.mktemp("state")
    import_model(SMALL, Store(state / "models"), name=ModelName("small"))
    return state


def fleet_of(word: str, config: ModelConfig) -> FleetStatus:
    """A fleet whose every text is hostile."""
    stage = StageSpec(model=MODEL, pieces=(Span(0, 2),))
    beat = Heartbeat(
        node=KEY,
        name=word,
        sequence=1,
        address=PeerAddress(node=KEY, endpoints=()),
        memory_bytes=1,
        kv_budget_bytes=0,
        kv_free_bytes=0,
        hosted=(HostedStage(stage=stage, status=StageStatus.FAILED, error=word),),
    )
    entry = ModelEntry(
        name=ModelName(word),
        model=MODEL,
        manifest_bytes=1,
        config=config,
        quantisation=Quantisation.Q8,
        weights_bytes=(1, 1, (1,)),
        created_unix_s=0,
    )
    leader, other = (CoordinatorReport(id=each, name=word, epoch=1) for each in "ab")
    digest = CellDigest(cell=word, boot="b", sequence=1, devices=1, devices_max=2, models=())
    return FleetStatus(
        nodes=(beat, msgspec.structs.replace(beat, node=NodeId(word), hosted=())),
        silent_s={},
        models=(entry,),
        gateways=(GatewayReport(gateway=KEY, url=word, sessions=0, tokens_per_s=0.0, chains=((KEY, NodeId(word)),)),),
        unplaceable={MODEL: word},
        dropped_messages={word: 1},
        coordinators=(leader, other),
        quarantined=(QuarantinedDevice(node=NodeId("2" * 64), left_s=1.0, why=word),),
        neighbours=(NeighbourCell(digest=digest, silent_s=0.0),),
    )


@few
@given(words)
@example(EVERYTHING)
def test_status(store: Path, word: str) -> None:
    (_, manifest), *_ = Store(store / "models").models()
    shown = tables(fleet_of(word, manifest.config))
    assert is_plain(printed(shown))
    assert printed(shown).count(one_line(word)) >= 12
    Console(file=io.StringIO()).print(shown)  # on any console: in its cells and lines the words are no markup


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("network"))
    world.member(name="desk [/x]")  # as a newcomer may call itself
    return world


@settings(few, max_examples=2)
@given(words)
@example(EVERYTHING)
def test_audit(network: World, word: str) -> None:
    state = network.state.paths.folder.parent
    with network.database.writing() as connection:
        who = db.all_enrolments(connection)[0]
        changes = {"name": word[:100], "revoked_why": word, "revoked_unix_s": 1.0}
        db.save_enrolment(connection, msgspec.structs.replace(who, **changes))
        append(connection, 1.0, Kind.REVOKED, word, {"why": word})
    for command in (["members"], ["members", "--json"], ["export"], ["verify"]):
        done = runner.invoke(app, ["audit", *command, "--state-dir", str(state)])
        assert done.exit_code == 0, done.output
        assert is_plain(done.output)
        if command == ["members", "--json"]:
            assert json.loads(done.stdout)[0]["name"] == word[:100]
        if command == ["export"]:
            assert json.loads(json.loads(done.stdout.splitlines()[-1])["body"])["why"] == word


@settings(few, max_examples=2)
@given(words)
@example(EVERYTHING)
def test_models(store: Path, word: str) -> None:
    models = Store(store / "models")
    _, manifest = models.by_name("small")
    models.put_manifest(msgspec.structs.replace(manifest, licence=word, source=word))
    for command in (["list"], ["list", "--json"], ["inspect", "small"], ["inspect", "small", "--json"]):
        done = runner.invoke(app, ["model", *command, "--state-dir", str(store)])
        assert done.exit_code == 0, done.output
        assert is_plain(done.output)
        if "--json" in command:
            assert f'"source": {json.dumps(word)}' in json.dumps(json.loads(done.stdout))


@few
@given(words)
@example(EVERYTHING)
def test_the_council(word: str) -> None:
    halt = Halt(network="n", epoch=1, why=word or "-", issued_unix_s=1e300)
    now = datetime.now(UTC)
    situation = Situation(
        network=word,
        policy=msgspec.structs.replace(FleetPolicy(epoch=1), version_min=word),
        members={KEY: word},
        threshold=1,
        publishers=[Publisher("models", word, KEY, frozenset({word}), now)],
        root_expires=now,
        timestamp_expires=now,
        halts=[(word, halt)],
        own=KEY,
        now=now,
    )
    need = Need(word, 1, (word,), (word,))
    changes = (Change(word, word, word), Change(word, "", word))
    review = Review(changes=changes, needs=(need, need), policy=FleetPolicy(epoch=1), founds="")
    with CliRunner().isolation() as (out, *_):
        for sentence in situation.sentences():
            say(sentence)
        show_review(review)
        console.print_json(data=situation.facts())
        shown = out.getvalue().decode()
    assert is_plain(shown)


@few
@given(words)
@example(EVERYTHING)
def test_errors_and_logs(word: str) -> None:
    with CliRunner().isolation() as (_, err, *_):
        with pytest.raises(SystemExit):
            fallow.cli._fail(f"The registrar says: {word}")
        sys.stderr.flush()
        failed = err.getvalue().decode()
    assert is_plain(failed)
    assert len(failed.splitlines()) == 1
    formatter = _PlainFormatter("%(name)s: %(message)s")
    logged = logging.LogRecord("fallow", logging.WARNING, "", 0, "what came is none: %s", (word,), None)
    assert is_plain(formatter.format(logged))
    assert len(formatter.format(logged).splitlines()) == 1


def test_an_import_that_names_a_hostile_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    report = import_progress()
    for done in range(3):
        report(done, 2, "".join(PIECES))
    assert is_plain(capsys.readouterr().err)


@few
@given(words)
@example(EVERYTHING)
def test_chat(word: str) -> None:
    event = json.dumps({"choices": [{"delta": {"content": word}}]})
    failure = json.dumps({"error": {"message": word}})
    answers = {
        "/v1/models": json.dumps({"data": [{"id": word}]}),
        "/v1/chat/completions": f"data: {event}\n\ndata: {failure}\n",
    }
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=answers[request.url.path]))
    with (
        CliRunner().isolation(input="hello\n\n") as (out, err, *_),
        httpx.Client(transport=transport, base_url="http://x") as client,
    ):
        conversation._converse(client, {"model": conversation._first_model(client)}, [])
        spoken, told = out.getvalue().decode(), err.getvalue().decode()
    assert is_plain(told)
    assert is_plain(spoken.replace("FORGED", "").replace("\t", ""))  # an answer has its own lines
