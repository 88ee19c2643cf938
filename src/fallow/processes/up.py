"""`fallow up`: the control bus, the coordinators, the gateway and local devices, all looked after.

Rules
- The order of a start: a model in the store, the bus, then everything else at once. The order of a stop: the gateway
  (running answers get a moment), the devices, the coordinators, the bus; all within `STOP_LIMIT_S`.
- One coordinator leads and the others stand by, unless the bus offers no lease to lead by: then there is only one.
- Secrets travel to children in their environment, never on a command line that others can read.
- What other commands need to find this service (`fallow status`, `fallow chat`) is in `up.json` in the state folder,
  which only its owner may read, and goes when the service does.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import httpx
import msgspec

from fallow import wiring
from fallow.child_process import ending_with_us
from fallow.config import Config, Loaded, as_environment
from fallow.domain.clock import Clock
from fallow.domain.credentials import Role
from fallow.domain.errors import BusUnavailable, ConfigError, LeaseUnsupported, ModelError
from fallow.fabric.broker import Broker
from fallow.models.store import Store
from fallow.node.limits import split_memory
from fallow.policy.leadership import LeaseRules
from fallow.processes import runfile
from fallow.processes.addresses import api_url, check_exposure
from fallow.processes.coordinator import folder_of
from fallow.processes.founding import renew_council
from fallow.processes.lifetime import Stop
from fallow.processes.own_network import OwnNetwork
from fallow.processes.renewal import keep_renewed
from fallow.processes.supervisor import Child, Tell

STOP_LIMIT_S: Final = 15.0
CHILD_STOP_LIMIT_S: Final = 6.0
READY_LIMIT_S: Final = 30.0
READY_POLL_S: Final = 0.1
FAILURE_POLL_S: Final = 1.0
DEVICE_REST_S: Final = 1.0
"""How long a device that died stays away: starting it takes a second of the processor, which those devices of this
machine need that go on with its answers."""
INSECURE: Final = (
    "INSECURE DEVELOPMENT MODE: whoever reaches this machine's loopback interface is believed everything. "
    "Nothing is checked, nothing can be halted. Never lend a device like this."
)


async def run(loaded: Loaded, tell: Tell, parent_pid: int | None = None) -> None:
    """Run until a signal. Raises any `FallowError`."""
    config = loaded.config
    check_exposure(config)
    other = runfile.running(config.state_dir)
    if other is not None and other.pid != os.getpid():
        raise ConfigError(
            f"Fallow is up already in {config.state_dir} (process {other.pid}, {other.api_url}); "
            "stop it first, or choose another --state-dir."
        )
    config = _with_port(config)
    stop = Stop()
    stop.listen(parent_pid)
    network = _network(config, tell)
    await _ensure_model(config, stop, tell)
    if stop.polite.is_set():
        return
    service = Service(config, loaded.file, tell, network)
    try:
        await service.start()
        await service.wait_until_ready(stop)
        await service.wait_until_failed(stop)
        tell("Stopping.")
    finally:
        await stop.unless_at_once(service.close(), STOP_LIMIT_S)


def _network(config: Config, tell: Tell) -> OwnNetwork | None:
    """Ours; `None` in the development mode. Raises `ConfigError` for a development mode that others could reach."""
    if not config.trust.insecure_development:
        return OwnNetwork(config, tell)
    exposed = [host for host in (config.bus.host, config.gateway.host) if not wiring.is_loopback(host)]
    if exposed:
        raise ConfigError(f"The insecure development mode listens on loopback only, not on {exposed[0]}.")
    tell(INSECURE)
    return None


def _with_port(config: Config) -> Config:
    """Port 0 made a real one, so that the gateway comes back at the same one when it is restarted.

    Raises `ConfigError` for an address that is taken: whoever answers there must not be mistaken for our gateway.
    """
    host, port = config.gateway.host, config.gateway.port
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            port = probe.getsockname()[1]
    except OSError as error:
        raise ConfigError(
            f"The API cannot listen on {host} port {port} ({error.strerror}); choose another with --port, or 0 for any."
        ) from error
    return msgspec.structs.replace(config, gateway=msgspec.structs.replace(config.gateway, port=port))


async def _ensure_model(config: Config, stop: Stop, tell: Tell) -> None:
    """Import the default model when there is none: in a process of its own, which shows its progress itself."""
    models = Store(config.store_dir).models()
    if models:
        tell(f"Models in the store: {', '.join(manifest.name for _, manifest in models)}.")
        return
    if not config.models.import_default:
        tell("The store has no model. Add one with `fallow model add`; it is served at once.")
        return
    tell("The store has no model yet: fetching and importing the default one, SmolLM2-135M-Instruct.")
    command = [sys.executable, "-m", "fallow", "model", "add", "default", "--state-dir", str(config.state_dir)]
    importer = await asyncio.create_subprocess_exec(*command, start_new_session=True, **ending_with_us(signal.SIGTERM))
    stopped = asyncio.ensure_future(stop.polite.wait())
    ended = asyncio.ensure_future(importer.wait())
    await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not ended.done():
        importer.terminate()
        await ended
    elif importer.returncode != 0:
        raise ModelError("The default model could not be imported; `fallow up --no-default-model` starts without one.")


class Service:
    """The processes behind one `fallow up`."""

    def __init__(self, config: Config, file: Path | None, tell: Tell, network: OwnNetwork | None) -> None:
        self._config = config
        self._network = network
        self._file = file
        self._tell = tell
        self._broker: Broker | None = None
        self._registrar: Child | None = None
        self._renewing: list[asyncio.Task[None]] = []
        self._gateway: Child | None = None
        self._coordinators: list[Child] = []
        self._nodes: list[Child] = []

    async def start(self) -> None:
        """Start everything. Raises `ConfigError`, `BusUnavailable`, `RegistrarUnavailable`."""
        config = self._config
        bus_url, system_url = config.bus.url, config.bus.system_url
        if bus_url is None:
            bus_url, system_url = await self._start_bus()
        if self._network is not None:
            self._renewing = self._keep_renewed(self._network, wiring.clock())
        environment = as_environment(config) | {"FALLOW_BUS_URL": bus_url}
        system = {"FALLOW_BUS_SYSTEM_URL": system_url} if system_url is not None else {}
        if self._network is not None:
            await self._start_registrar(self._network, bus_url, environment)
        count = 1 + await self._standbys(bus_url)
        self._coordinators = [self._coordinator(index, environment | system) for index in range(1, count + 1)]
        leave = self._leave(Role.GATEWAY, config.state_dir / "gateway", "gateway")
        self._gateway = self._child("gateway", ["serve", "gateway"], environment | leave)
        self._nodes = [self._node(index, environment) for index in range(1, config.local_nodes + 1)]
        await asyncio.gather(*(child.start() for child in (*self._coordinators, self._gateway, *self._nodes)))
        cell = config.cell if self._network is None else self._network.state.network.cell
        insecure = self._network is None
        found = runfile.Running(pid=os.getpid(), bus_url=bus_url, api_url=api_url(config), cell=cell, insecure=insecure)
        runfile.write(config.state_dir, found)

    async def _start_bus(self) -> tuple[str, str | None]:
        """Its url, and that of its system account in the development mode."""
        config = self._config
        trust = None if self._network is None else self._network.bus_trust()
        self._broker = Broker(config.state_dir / "bus", host=config.bus.host, port=config.bus.port, trust=trust)
        await self._broker.start()
        assert self._broker.server is not None
        server = self._broker.server
        self._tell(f"The control bus is nats-server {server.version} ({server.source}).")
        return self._broker.urls[0], self._broker.system_url

    def _keep_renewed(self, network: OwnNetwork, clock: Clock) -> list[asyncio.Task[None]]:
        """The council's documents, whoever runs the bus; the bus's certificate where that is us."""

        async def council() -> None:
            await asyncio.to_thread(renew_council, self._config)

        tasks = [asyncio.create_task(keep_renewed("The council's word", council, clock, self._tell))]
        broker = self._broker
        if broker is not None:

            async def certificate() -> None:
                broker.renew(await asyncio.to_thread(network.bus_trust))

            what = "The control bus's certificate"
            tasks.append(asyncio.create_task(keep_renewed(what, certificate, clock, self._tell)))
        return tasks

    async def _start_registrar(self, network: OwnNetwork, bus_url: str, environment: dict[str, str]) -> None:
        network.announce(bus_url)
        self._registrar = self._child("registrar", ["serve", "registrar"], environment)
        await self._registrar.start()
        await network.wait_until_up()
        await network.admit_console()

    def _leave(self, role: Role, folder: Path, name: str) -> dict[str, str]:
        return {} if self._network is None else self._network.leave_for(role, folder, name)

    async def wait_until_ready(self, stop: Stop) -> None:
        """Wait until the API answers, then say what runs where."""
        url = api_url(self._config)
        deadline_s = asyncio.get_running_loop().time() + READY_LIMIT_S
        async with httpx.AsyncClient(trust_env=False) as client:
            while not stop.polite.is_set():
                try:
                    await client.get(f"{url}/health", timeout=1.0)
                    break
                except httpx.HTTPError:
                    if asyncio.get_running_loop().time() > deadline_s:
                        self._tell(f"The API does not answer yet; see {self._log_file('gateway')}.")
                        return
                    await asyncio.sleep(READY_POLL_S)
        self._say_what_runs(url)

    async def wait_until_failed(self, stop: Stop) -> None:
        """Return when asked to stop. Raises `BusUnavailable` when a part that all depend on was given up."""
        while not stop.polite.is_set():
            if self._broker is not None and self._broker.failure is not None:
                raise BusUnavailable(f"The control bus cannot be kept running: {self._broker.failure}")
            gateways = [self._gateway] if self._gateway is not None else []
            registrars = [self._registrar] if self._registrar is not None else []
            for children in (gateways, registrars, self._coordinators):
                if children and all(child.given_up for child in children):
                    child = children[0]
                    raise BusUnavailable(f"The {child.name} cannot be kept running. {child.last_words()}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAILURE_POLL_S):
                    await stop.polite.wait()

    async def close(self) -> None:
        """Stop everything, in order."""
        await _stop(self._gateway)
        await asyncio.gather(*(_stop(node) for node in self._nodes))
        await asyncio.gather(*(_stop(coordinator) for coordinator in self._coordinators))
        await _stop(self._registrar)
        for task in self._renewing:
            task.cancel()
        await asyncio.gather(*self._renewing, return_exceptions=True)
        if self._broker is not None:
            await self._broker.close()
        runfile.remove(self._config.state_dir)

    # --- children ---

    def _child(
        self, name: str, arguments: Sequence[str], environment: dict[str, str], state_dir: Path | None = None,
        rest_s: float = 0.0,
    ) -> Child:  # fmt: skip
        command = [sys.executable, "-m", "fallow", *arguments]
        command += ["--state-dir", str(state_dir or self._config.state_dir), "--parent", str(os.getpid())]
        command += ["--log-file", str(self._log_file(name))]
        if self._file is not None:
            command += ["--config", str(self._file)]
        return Child(name, command, environment, self._log_file(name).with_suffix(".output"), self._tell, rest_s)

    async def _standbys(self, bus_url: str) -> int:
        """How many can take over from one that leads."""
        standbys = self._config.coordinator.standbys
        if not standbys or self._broker is not None or self._network is not None:
            return standbys
        config = msgspec.structs.replace(self._config, bus=msgspec.structs.replace(self._config.bus, url=bus_url))
        bus = await wiring.open_bus(config, "up")
        try:
            await wiring.open_lease(bus, config.cell, LeaseRules().ttl_s)
        except LeaseUnsupported:
            self._tell("Your NATS server has no JetStream, so one coordinator runs, and none stands by.")
            return 0
        finally:
            await bus.close()
        return standbys

    def _coordinator(self, index: int, environment: dict[str, str]) -> Child:
        name = f"coordinator-{index}"
        named = {"FALLOW_COORDINATOR_NAME": name}
        leave = self._leave(Role.COORDINATOR, folder_of(self._config, name), name)
        return self._child(name, ["serve", "coordinator"], environment | named | leave)

    def _node(self, index: int, environment: dict[str, str]) -> Child:
        config = self._config
        name = f"node-{index}"
        memory = split_memory(None, None).memory_bytes // config.local_nodes
        settings = {
            "FALLOW_NODE_NAME": name,
            "FALLOW_NODE_THREADS": str(config.node.threads or max(1, (os.cpu_count() or 1) // config.local_nodes)),
            "FALLOW_NODE_MEMORY_BYTES": str(config.node.memory_bytes or memory),
        }
        state_dir = config.state_dir / "nodes" / name
        leave = self._leave(Role.NODE, state_dir / "device", name)
        # Who starts devices on a machine of their own has agreed to lend it.
        return self._child(name, ["join", "--yes"], environment | settings | leave, state_dir, DEVICE_REST_S)

    def _log_file(self, name: str) -> Path:
        return self._config.state_dir / "logs" / f"{name}.log"

    # --- words ---

    def _say_what_runs(self, url: str) -> None:
        tell, nodes = self._tell, self._config.local_nodes
        tell(f"The API is at {url}/v1, for the openai SDK, curl, or `fallow chat`.")
        if nodes:
            tell(f"{nodes} device{'s' if nodes > 1 else ''} on this machine {'work' if nodes > 1 else 'works'} for it.")
        if self._network is None:
            url = self._broker.urls[0] if self._broker is not None else self._config.bus.url or ""
            tell(f"To add a device:  fallow join --insecure-development '{url}'")
            tell(INSECURE)
        else:
            tell("To lend a device, make an invitation with `fallow invite`, and run there what it prints.")
            if wiring.is_loopback(self._config.bus.host):
                tell("That works on this machine only; start with --host 0.0.0.0 to accept devices of your network.")
        tell("`fallow status` shows what every device does. Ctrl-C stops everything.")


async def _stop(child: Child | None) -> None:
    if child is not None:
        await child.stop(CHILD_STOP_LIMIT_S)
