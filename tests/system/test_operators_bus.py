"""An operator's own nats-server, started outside Fallow from what `fallow bus configure` wrote.

What is shown: registrar, coordinator and device work on it; a revocation cuts a connection there and holds over a
restart with the old configuration; a new certificate is served without a restart and breaks no connection.
"""

import asyncio
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from fallow import wiring
from fallow.config import Config
from fallow.coordinator.leadership import Leadership
from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.domain.credentials import Role
from fallow.domain.errors import ConfigError, FallowError
from fallow.domain.network import BUS_NAME
from fallow.engine.memory import MemoryEngine
from fallow.fabric.broker import find_server
from fallow.fabric.memory import MemoryFabric
from fallow.fabric.nats_bus import NatsBus
from fallow.models.store import Store
from fallow.node.agent import Agent, AgentConfig
from fallow.policy.leadership import LeaseRules
from fallow.processes.operators_bus import configure, renew
from fallow.processes.party import Newcomer, Party, take_part
from fallow.processes.registrar import settle
from fallow.trust.certificates import client_context
from fallow.trust.registrar.consent import Lent
from fallow.trust.registrar.state import open_state
from tests.system.test_enrolment import EFFECT_LIMIT_S, START_LIMIT_S, Network, run, until

CLOCK = wiring.clock()


class Server:
    """A nats-server that Fallow does not know of but by its url."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self._binary = binary
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = -1

    async def start(self) -> None:
        """Any free port the first time, then that one. It is ready when its file of ports is there."""
        command = [self._binary, "-c", self._folder / "nats.conf", "-p", str(self.port)]
        process = self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ports = self._folder / f"nats-server_{process.pid}.ports"

        def ready() -> bool:
            assert process.poll() is None, (self._folder / "nats.log").read_text()
            return ports.is_file() and ports.read_bytes().endswith(b"}")

        await until(ready, START_LIMIT_S)
        self.port = int(msgspec.json.decode(ports.read_bytes())["nats"][0].rsplit(":", 1)[1])

    def reload(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(START_LIMIT_S)

    @property
    def urls(self) -> tuple[str, ...]:
        return (f"tls://127.0.0.1:{self.port}",)


async def certificate(server: Server, authority_pem: str) -> bytes:
    """What the server shows to whoever connects now."""
    context = client_context(authority_pem)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname=BUS_NAME)
    shown: ssl.SSLObject = writer.get_extra_info("ssl_object")
    found = shown.getpeercert(binary_form=True)
    writer.close()
    assert found is not None
    return found


@asynccontextmanager
async def network(folder: Path) -> AsyncIterator[tuple[Network, Server]]:
    """A registrar in a process of its own, on a server that was there before."""
    config = Config(state_dir=folder / "operator")
    home = Network.__new__(Network)
    done = await home.command(
        "bus", "configure", str(folder / "bus"), "--listen", "127.0.0.1:4222", folder=config.state_dir
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "bus" / "nats.conf")
    server = Server((await find_server()).path, folder / "bus")
    await server.start()
    state = open_state(config.state_dir)
    home.__init__(config, state, server)  # type: ignore[arg-type, misc]
    try:
        settle(config, server.urls[0])
        await home.start_registrar()
        yield home, server
    finally:
        if home.process is not None and home.process.poll() is None:
            home.stop_registrar()
        server.stop()


async def party(home: Network, folder: Path, role: Role) -> Party:
    """A process of that role, as its own start makes it: by invitation, and to the bus that the registrar names."""
    invitation = await home.invited("--role", role, "--name", folder.name)
    trust = msgspec.structs.replace(home.config.trust, invitation=invitation)
    lends = Lent(device=folder.name, memory="1 GiB", folder=str(folder))
    newcomer = Newcomer(role=role, name=folder.name, lends=lends, agree=lambda _: True)
    return await take_part(Config(state_dir=folder, trust=trust), folder, newcomer, lambda _: None)


async def coordinating(by: Party) -> Coordinator:
    rules = LeaseRules()
    key = await wiring.open_lease(by.bus, by.cell, rules.ttl_s)  # JetStream is there
    leadership = Leadership(key, by.who.node, "leader", wiring.lease_clock(), rules)
    coordinator = Coordinator(
        CoordinatorConfig(cell=by.cell), by.bus, CLOCK, by.presence, leadership, by.who.node, trust=by.coordinator
    )
    await coordinator.start()
    return coordinator


async def lending(by: Party, folder: Path) -> Agent:
    agent = Agent(
        AgentConfig(cell=by.cell, name="desk", memory_bytes=1 << 30, kv_budget_bytes=1 << 28), by.who.node, by.bus,
        MemoryFabric().endpoint(by.who.node), MemoryEngine(kv_budget_bytes=1 << 28), Store(folder), CLOCK,
        trust=by.node,
    )  # fmt: skip
    await agent.start()
    return agent


def test_a_network_works_on_an_operators_own_server_and_a_revocation_cuts_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with network(tmp_path) as (home, server):
            leader, desk = [await party(home, tmp_path / role, role) for role in (Role.COORDINATOR, Role.NODE)]
            coordinator, agent = await coordinating(leader), await lending(desk, tmp_path / "store")

            def here() -> list[str]:
                return [beat.standing for beat in coordinator.status().nodes if beat.node == desk.who.node]

            await until(lambda: here() == ["working"] and coordinator.status().coordinators[0].epoch, START_LIMIT_S)
            before = await certificate(server, home.state.network.authority_pem)
            renewed = await home.command("bus", "renew", str(tmp_path / "bus"))
            assert renewed.returncode == 0, renewed.stderr
            server.reload()
            async with asyncio.timeout(EFFECT_LIMIT_S):
                while await certificate(server, home.state.network.authority_pem) == before:
                    await asyncio.sleep(0.01)
            assert desk.bus.client.stats["reconnects"] == 0, "connections go on"  # type: ignore[attr-defined]

            revoked = await home.command("revoke", desk.who.node, "--why", "sold", "--yes")
            assert revoked.returncode == 0, revoked.stderr
            cut_s = await until(lambda: not desk.bus.connected, EFFECT_LIMIT_S)  # type: ignore[attr-defined]
            await until(lambda: not here(), EFFECT_LIMIT_S)
            print(f"cut off from the operator's own server after {cut_s:.2f} s")
            assert leader.bus.connected  # type: ignore[attr-defined]

            server.stop()
            await server.start()
            member = desk._member
            assert member is not None
            with pytest.raises(FallowError):
                await NatsBus.connect(server.urls, desk.who.node, member)
            await until(lambda: leader.bus.connected, EFFECT_LIMIT_S)  # type: ignore[attr-defined]
            await agent.close()
            await coordinator.close()
            for each in (desk, leader):
                await each.close()

    run(scenario())


def test_the_files_of_a_server_hold_no_key_that_signs_and_nobody_else_reads_them(tmp_path: Path) -> None:
    config, folder, told = Config(state_dir=tmp_path / "operator"), tmp_path / "bus", list[str]()
    path = configure(config, folder, "0.0.0.0:4222", Path("/there"), told.append)
    assert told and "founded" in told[0]
    files = {each.name: each for each in folder.iterdir()}
    assert files.keys() == {"nats.conf", "bus.pem", "bus.key"}
    assert all(each.stat().st_mode & 0o777 == 0o600 for each in files.values())
    state = open_state(config.state_dir)
    written = b"".join(each.read_bytes() for each in files.values())
    for key in (state.operator, state.account, state.system, state.identity):
        assert key.seed not in written and key.seed.hex().encode() not in written
    assert state.authority.key_pem.strip().encode() not in written
    text = path.read_text()
    assert 'cert_file: "/there/bus.pem"' in text and str(folder) not in text
    assert "password" not in text and "no_auth_user" not in text and "handshake_first: true" in text
    key = files["bus.key"].read_bytes()
    renew(config, folder)
    assert files["bus.key"].read_bytes() != key and path.read_text() == text


def test_a_server_is_not_configured_by_halves(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path / "operator")
    with pytest.raises(ConfigError, match="expected an address"):
        configure(config, tmp_path / "bus", "4222", tmp_path / "bus", lambda _: None)
    with pytest.raises(ConfigError, match="port that others"):
        configure(config, tmp_path / "bus", "0.0.0.0:0", tmp_path / "bus", lambda _: None)
    with pytest.raises(ConfigError, match="whole path"):
        configure(config, tmp_path / "bus", "0.0.0.0:4222", Path("bus"), lambda _: None)
    with pytest.raises(ConfigError, match="configure"):
        renew(config, tmp_path / "bus")
    assert not (tmp_path / "bus").exists()


def test_a_server_reads_its_configuration_from_a_folder_with_a_name_of_any_script(tmp_path: Path) -> None:
    folder = tmp_path / "jos\N{LATIN SMALL LETTER E WITH ACUTE} \N{CYRILLIC SMALL LETTER EF}"
    path = configure(Config(state_dir=tmp_path / "operator"), folder, "127.0.0.1:4222", folder, lambda _: None)
    binary = asyncio.run(find_server()).path
    tried = subprocess.run([binary, "-t", "-c", path], capture_output=True, timeout=START_LIMIT_S, check=False)
    assert tried.returncode == 0, tried.stderr


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can give files to another user")
def test_files_of_another_user_stay_that_users(tmp_path: Path) -> None:
    config, folder = Config(state_dir=tmp_path / "operator"), tmp_path / "bus"
    configure(config, folder, "127.0.0.1:4222", folder, lambda _: None)
    for path in folder.iterdir():
        os.chown(path, 65534, 65534)
    renew(config, folder)
    configure(config, folder, "127.0.0.1:4223", folder, lambda _: None)
    found = [path.stat() for path in folder.iterdir()]
    assert len(found) == 3 and {(each.st_uid, each.st_mode & 0o777) for each in found} == {(65534, 0o600)}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_registrars_database_is_closed_again(tmp_path: Path) -> None:
    config, folder = Config(state_dir=tmp_path / "operator"), tmp_path / "bus"
    configure(config, folder, "127.0.0.1:4222", folder, lambda _: None)
    opened = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    assert not [each for each in opened if each.is_relative_to(tmp_path)]
