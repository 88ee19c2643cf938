"""The commands as a person runs them: real processes, real exit codes, real words.

Two services: one whose model is cut over three devices, and a small one whose model is added while it runs. Each is
ended by the last test that uses it, the one politely and the other by `kill -9`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import httpx
import psutil
import pytest

from fallow.processes.local_service import LocalService
from tests.system.harness import MODEL, ask, service

QUESTION = "Why does ice float?"
FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
HELP = ["", "up", "join", "status", "chat", "model", "model add", "model check", "key create", "config show", "serve"]
HELP_WITH_EXAMPLES = ["up", "join", "status", "chat", "model add", "key create", "config show"]

Done = subprocess.CompletedProcess[str]
T = TypeVar("T")


def fallow(*arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Done:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FALLOW_")}
    return subprocess.run(
        [sys.executable, "-m", "fallow", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, "COLUMNS": "160", "NO_COLOR": "1", **(env or {})},
        cwd=cwd,
        check=False,
    )


def side_by_side(run: Callable[[T], Done], each: Sequence[T]) -> list[Done]:
    """As many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, each))


# --- help and mistakes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def helped() -> dict[str, Done]:
    """What each command answers to `--help`."""
    return dict(zip(HELP, side_by_side(lambda command: fallow(*command.split(), "--help"), HELP), strict=True))


@pytest.mark.parametrize("command", HELP)
def test_help_is_there_and_says_more_than_options(helped: dict[str, Done], command: str) -> None:
    done = helped[command]
    assert done.returncode == 0
    assert "Usage:" in done.stdout
    assert len(done.stdout.split()) > 30


@pytest.mark.parametrize("command", HELP_WITH_EXAMPLES)
def test_help_has_examples(helped: dict[str, Done], command: str) -> None:
    text = helped[command].stdout
    assert "Examples:" in text
    assert len(re.findall(rf"^\s+(?:FALLOW_\S+ )?fallow {command}", text, re.MULTILINE)) >= 2


FAILURES: list[tuple[list[str], list[str]]] = [
    (["model", "inspect", "nosuch"], ["nosuch"]),
    (["model", "remove", "nosuch"], ["nosuch"]),
    (["model", "add", "no/such/file.gguf"], ["no/such/file.gguf"]),
    (["model", "check", "nosuch"], ["nosuch"]),
    (["status"], ["fallow up"]),
    (["join", "--insecure-development", "nats://fallow:wrong@127.0.0.1:1"], ["fallow up", "credentials"]),
    (["join", "nats://fallow:right@127.0.0.1:1"], ["invitation", "fallow invite"]),
    (["join"], ["invitation", "fallow invite"]),
    (["join", "fallow1-AAAA"], ["invitation"]),
    (["join", "fallow1-AAAA", "--memory", "plenty"], ["node.memory_bytes", "plenty", "a flag"]),
    (["invite"], ["fallow up"]),
    (["revoke", "desk", "--why", "sold", "--yes"], ["fallow up"]),
    (["audit", "verify"], ["fallow up"]),
    (["up", "--insecure-development", "--host", "0.0.0.0"], ["loopback", "0.0.0.0"]),
    (["up", "--api-host", "0.0.0.0"], ["gateway.host", "fallow key create"]),
    (["chat", "--url", "http://127.0.0.1:1", "hello"], ["127.0.0.1:1", "fallow up"]),
    (["key", "create", 'a"b'], ["id"]),
]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> list[Done]:
    """Each of `FAILURES`, in a folder of its own."""

    def fail(case: tuple[list[str], Path]) -> Done:
        arguments, folder = case
        return fallow(*arguments, env={"FALLOW_STATE_DIR": str(folder)}, cwd=folder)

    return side_by_side(fail, [(arguments, tmp_path_factory.mktemp("failure")) for arguments, _ in FAILURES])


@pytest.mark.parametrize("index", range(len(FAILURES)), ids=["-".join(arguments[:2]) for arguments, _ in FAILURES])
def test_a_failure_is_one_sentence_and_status_1(failed: list[Done], index: int) -> None:
    done, words = failed[index], FAILURES[index][1]
    assert done.returncode == 1
    assert done.stderr.startswith("fallow: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("arguments", [["nosuch"], ["up", "--nosuch"], ["model", "add"], ["up", "--nodes", "many"]])
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    done = fallow(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


# --- settings ------------------------------------------------------------------------------------


def shown(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> dict[str, dict[str, object]]:
    done = fallow("config", "show", "--json", *arguments, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    values: dict[str, dict[str, object]] = json.loads(done.stdout)
    return values


def test_environment_beats_file_beats_default(tmp_path: Path) -> None:
    (tmp_path / "fallow.toml").write_text("[gateway]\nport = 9001\n[node]\nmemory_bytes = '1GiB'\n")
    values = shown(cwd=tmp_path, env={"FALLOW_GATEWAY_PORT": "9002"})
    assert values["gateway.port"] == {"value": 9002, "source": "the environment variable FALLOW_GATEWAY_PORT"}
    assert values["node.memory_bytes"] == {"value": 1 << 30, "source": "the file fallow.toml"}
    assert values["bus.port"]["source"] == "default"


def test_passwords_and_keys_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "fallow.toml").write_text(f'[[gateway.keys]]\nid = "a"\nsha256 = "{"ab" * 32}"\n')
    done = fallow("config", "show", cwd=tmp_path, env={"FALLOW_BUS_URL": "nats://fallow:hidden@127.0.0.1:4222"})
    assert done.returncode == 0
    assert "hidden" not in done.stdout
    assert "abab" not in done.stdout


def test_a_made_key_fits_the_file(tmp_path: Path) -> None:
    done = fallow("key", "create", "alice", "--tokens-per-minute", "1000")
    assert done.returncode == 0
    assert re.fullmatch(r"fallow-[\w-]{40,}", done.stdout.strip())
    lines = done.stderr[done.stderr.index("[[gateway.keys]]") :]
    assert done.stdout.strip() not in lines
    (tmp_path / "fallow.toml").write_text(lines)
    assert shown(cwd=tmp_path)["gateway.keys"]["value"] == "1 keys"


# --- a running service -----------------------------------------------------------------------------


def test_chat_and_status_find_the_service(split_service: LocalService) -> None:
    state = {"FALLOW_STATE_DIR": str(split_service.state_dir)}
    answer = fallow("chat", "--temperature", "0", "--max-tokens", "12", QUESTION, env=state)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == ask(split_service.api_url, QUESTION, max_tokens=12).text.strip()

    table = fallow("status", env=state)
    assert table.returncode == 0, table.stderr
    for word in ("node-1", "node-2", "node-3", MODEL, "ready", "yes", split_service.api_url):
        assert word in table.stdout
    facts = json.loads(fallow("status", "--json", env=state).stdout)
    assert {node["name"] for node in facts["nodes"]} == {"node-1", "node-2", "node-3"}
    assert "fallow:" not in json.dumps(facts)  # no credentials


def test_chat_names_what_the_api_refused(split_service: LocalService) -> None:
    done = fallow("chat", "--url", split_service.api_url, "--model", "nosuch", "hello")
    assert done.returncode == 1
    assert "nosuch" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_conversation_on_standard_input(split_service: LocalService) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fallow", "chat", "--url", split_service.api_url, "--max-tokens", "5"],
        input="Hello.\nAnd now?\n\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.strip(" >")]) >= 2


def test_a_second_up_in_the_same_folder_is_refused(split_service: LocalService) -> None:
    done = fallow("up", "--port", "0", "--state-dir", str(split_service.state_dir))
    assert done.returncode == 1
    assert str(split_service.pid) in done.stderr


def test_a_taken_port_is_named(tmp_path: Path, split_service: LocalService) -> None:
    port = split_service.api_url.rsplit(":", 1)[1]
    done = fallow("up", "--port", port, "--no-default-model", "--state-dir", str(tmp_path))
    assert done.returncode == 1
    assert port in done.stderr
    assert "--port" in done.stderr


def test_secrets_are_on_no_command_line_and_in_no_open_file(split_service: LocalService) -> None:
    """The keys of the network and of everybody in it, as bytes and as hex; and no invitation on a command line."""
    state = split_service.state_dir
    files = [file for file in state.rglob("*") if file.is_file() and file.stat().st_size < 1 << 20]
    seeds = [file.read_bytes() for file in files if file.stat().st_size == 32]
    # Of the registrar, operator, account, system, council, publisher, repository, gateway, console and devices.
    assert len(seeds) >= 11
    up = psutil.Process(split_service.pid)
    for process in (up, *up.children(recursive=True)):
        words = " ".join(process.cmdline())
        assert "fallow1-" not in words
        assert not any(seed.hex() in words for seed in seeds)
    for file in files:
        if file.stat().st_mode & 0o077:
            content = file.read_bytes()
            assert not any(seed in content or seed.hex().encode() in content for seed in seeds), file


def test_the_coordinator_may_die_during_an_answer(split_service: LocalService) -> None:
    undisturbed = ask(split_service.api_url, QUESTION, max_tokens=40)
    pid = split_service.child_pid("coordinator")
    killed: list[int] = []

    def kill(answer: object) -> None:
        if not killed:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    answer = ask(split_service.api_url, QUESTION, max_tokens=40, on_piece=kill)
    assert killed
    assert answer.error is None
    assert answer.text == undisturbed.text
    split_service.wait_until_servable(copies=2)
    assert split_service.child_pid("coordinator") != pid


def test_stopping_leaves_nothing_behind(split_service: LocalService) -> None:
    """It ends the service: the last test that uses it."""
    up = psutil.Process(split_service.pid)
    family = [up, *up.children(recursive=True)]
    assert len(family) >= 11  # `up`, bus, two coordinators, gateway, and an agent and a worker of each of three devices
    began_s = time.monotonic()
    split_service.stop()
    assert time.monotonic() - began_s < 15
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not (split_service.state_dir / "up.json").exists()


# --- a service that asks for keys, with a model that was added while it ran ------------------------------


class Small(NamedTuple):
    """One device, no model at first."""

    service: LocalService
    key: str

    @property
    def environment(self) -> dict[str, str]:
        return {"FALLOW_STATE_DIR": str(self.service.state_dir)}

    def get_models(self, key: str | None) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.get(f"{self.service.api_url}/v1/models", headers=headers, trust_env=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    made = fallow("key", "create", "alice")
    settings = made.stderr[made.stderr.index("[[gateway.keys]]") :]
    folder = tmp_path_factory.mktemp("small")
    with service(folder, None, "--no-default-model", "--nodes", "1", "--memory", "1GiB", settings=settings) as running:
        yield Small(running, made.stdout.strip())


@pytest.fixture(scope="module")
def tiny(small: Small) -> str:
    """A model that is added to a service that runs."""
    assert small.get_models(small.key).json()["data"] == []
    added = fallow("model", "add", str(FAMILIES / "llama"), "--name", "tiny", "-q", "f32", env=small.environment)
    assert added.returncode == 0, added.stderr
    small.service.wait_for(
        lambda fleet: [entry.name for entry in fleet.models] == ["tiny"], 10, "the model's announcement"
    )
    return "tiny"


def test_api_keys_of_the_file_are_asked_for(small: Small) -> None:
    assert small.get_models(None).status_code == 401
    assert small.get_models(small.key).status_code == 200
    assert small.get_models("fallow-wrong").status_code == 401


def test_a_device_joins_works_and_leaves_politely(small: Small, tiny: str) -> None:
    running = small.service
    pid = running.join("guest", "--memory", "1GiB")
    running.wait_until_servable(copies=2)
    again = fallow("join", "--state-dir", str(running.folder / "joined" / "guest"))
    assert again.returncode == 1
    assert "--state-dir" in again.stderr
    os.kill(pid, signal.SIGTERM)
    running.wait_for(lambda fleet: not [beat for beat in fleet.nodes if beat.name == "guest"], 10, "its goodbye")
    words = (running.folder / "guest.output").read_text()
    assert "has joined" in words
    assert "Leaving" in words


def test_models_added_later_are_served_and_removed_ones_are_not(small: Small, tiny: str) -> None:
    small.service.wait_until_servable()
    assert tiny in fallow("model", "list", env=small.environment).stdout
    assert fallow("model", "remove", tiny, env=small.environment).returncode == 0
    small.service.wait_for(lambda fleet: not fleet.models, 10, "the model's removal")


def test_nothing_outlives_a_killed_supervisor(small: Small) -> None:
    """It ends the service: the last test that uses it."""
    family = psutil.Process(small.service.pid).children(recursive=True)
    assert len(family) >= 5  # bus, coordinator, gateway, agent, worker
    os.kill(small.service.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


# --- models --------------------------------------------------------------------------------------


def test_model_commands_from_add_to_remove(tmp_path: Path) -> None:
    checkpoint = FAMILIES / "qwen3"
    state = {"FALLOW_STATE_DIR": str(tmp_path)}
    added = fallow("model", "add", str(checkpoint), "--name", "tiny", env=state)
    assert added.returncode == 0, added.stderr
    assert "tiny" in added.stdout

    facts = json.loads(fallow("model", "inspect", "tiny", "--json", env=state).stdout)
    assert (facts["family"], facts["quantisation"]) == ("qwen3", "q8")
    checked = fallow("model", "check", "tiny", "--against", str(checkpoint), env=state)
    assert checked.returncode == 0, checked.stderr
    assert "unchanged" in checked.stdout
    assert "perplexity" in checked.stdout

    blob = max((tmp_path / "models" / "blobs").glob("*/*/*"), key=lambda path: path.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x00")
    damaged = fallow("model", "check", "tiny", env=state)
    assert damaged.returncode == 1
    assert "changed on disk" in damaged.stderr

    assert fallow("model", "remove", "tiny", env=state).returncode == 0
    assert json.loads(fallow("model", "list", "--json", env=state).stdout) == []
