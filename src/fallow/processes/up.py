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
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import httpx
import msgspec

from fallow import wiring
from fallow.config import Config, Loaded, as_environment
from fallow.domain.errors import BusUnavailable, ConfigError, LeaseUnsupported, ModelError
from fallow.fabric.broker import Broker
from fallow.models.store import Store
from fallow.node.limits import split_memory
from fallow.policy.leadership import LeaseRules
from fallow.processes import runfile
from fallow.processes.addresses import api_url, check_exposure, lan_address
from fallow.processes.lifetime import Stop
from fallow.processes.supervisor import Child, Tell

STOP_LIMIT_S: Final = 15.0
CHILD_STOP_LIMIT_S: Final = 6.0
READY_LIMIT_S: Final = 30.0
READY_POLL_S: Final = 0.1
FAILURE_POLL_S: Final = 1.0


async def run(loaded: Loaded, tell: Tell) -> None:
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
    stop.listen()
    await _ensure_model(config, stop, tell)
    if stop.polite.is_set():
        return
    service = Service(config, loaded.file, tell)
    try:
        await service.start()
        await service.wait_until_ready(stop)
        await service.wait_until_failed(stop)
        tell("Stopping.")
    finally:
        await stop.unless_at_once(service.close(), STOP_LIMIT_S)


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
    importer = await asyncio.create_subprocess_exec(*command, start_new_session=True)
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

    def __init__(self, config: Config, file: Path | None, tell: Tell) -> None:
        self._config = config
        self._file = file
        self._tell = tell
        self._broker: Broker | None = None
        self._gateway: Child | None = None
        self._coordinators: list[Child] = []
        self._nodes: list[Child] = []

    async def start(self) -> None:
        """Start everything. Raises `ConfigError` or `BusUnavailable`."""
        config = self._config
        bus_url, system_url = config.bus.url, config.bus.system_url
        if bus_url is None:
            self._broker = Broker(config.state_dir / "bus", host=config.bus.host, port=config.bus.port)
            await self._broker.start()
            bus_url, system_url = self._broker.urls[0], self._broker.system_url
            assert self._broker.server is not None
            server = self._broker.server
            self._tell(f"The control bus is nats-server {server.version} ({server.source}).")
        environment = as_environment(config) | {"FALLOW_BUS_URL": bus_url}
        system = {"FALLOW_BUS_SYSTEM_URL": system_url} if system_url is not None else {}
        count = 1 + await self._standbys(bus_url)
        self._coordinators = [self._coordinator(index, environment | system) for index in range(1, count + 1)]
        self._gateway = self._child("gateway", ["serve", "gateway"], environment)
        self._nodes = [self._node(index, environment) for index in range(1, config.local_nodes + 1)]
        await asyncio.gather(*(child.start() for child in (*self._coordinators, self._gateway, *self._nodes)))
        found = runfile.Running(pid=os.getpid(), bus_url=bus_url, api_url=api_url(config), cell=config.cell)
        runfile.write(config.state_dir, found)

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
            for children in (gateways, self._coordinators):
                if children and all(child.given_up for child in children):
                    child = children[0]
                    raise BusUnavailable(f"The {child.name} cannot be kept running. {child.last_words()}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.polite.wait(), FAILURE_POLL_S)

    async def close(self) -> None:
        """Stop everything, in order."""
        await _stop(self._gateway)
        await asyncio.gather(*(_stop(node) for node in self._nodes))
        await asyncio.gather(*(_stop(coordinator) for coordinator in self._coordinators))
        if self._broker is not None:
            await self._broker.close()
        runfile.remove(self._config.state_dir)

    # --- children ---

    def _child(
        self, name: str, arguments: Sequence[str], environment: dict[str, str], state_dir: Path | None = None
    ) -> Child:
        command = [sys.executable, "-m", "fallow", *arguments]
        command += ["--state-dir", str(state_dir or self._config.state_dir), "--parent", str(os.getpid())]
        command += ["--log-file", str(self._log_file(name))]
        if self._file is not None:
            command += ["--config", str(self._file)]
        return Child(name, command, environment, self._log_file(name).with_suffix(".output"), self._tell)

    async def _standbys(self, bus_url: str) -> int:
        """How many can take over from one that leads."""
        standbys = self._config.coordinator.standbys
        if not standbys or self._broker is not None:
            return standbys
        config = msgspec.structs.replace(self._config, bus=msgspec.structs.replace(self._config.bus, url=bus_url))
        bus = await wiring.open_bus(config, "up")
        try:
            await wiring.open_lease(config, bus, LeaseRules().ttl_s)
        except LeaseUnsupported:
            self._tell("Your NATS server has no JetStream, so one coordinator runs, and none stands by.")
            return 0
        finally:
            await bus.close()
        return standbys

    def _coordinator(self, index: int, environment: dict[str, str]) -> Child:
        name = f"coordinator-{index}"
        named = {"FALLOW_COORDINATOR_NAME": name}
        return self._child(name, ["serve", "coordinator"], environment | named)

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
        return self._child(name, ["join"], environment | settings, state_dir)

    def _log_file(self, name: str) -> Path:
        return self._config.state_dir / "logs" / f"{name}.log"

    # --- words ---

    def _say_what_runs(self, url: str) -> None:
        tell, nodes = self._tell, self._config.local_nodes
        tell(f"The API is at {url}/v1, for the openai SDK, curl, or `fallow chat`.")
        if nodes:
            tell(f"{nodes} device{'s' if nodes > 1 else ''} on this machine {'work' if nodes > 1 else 'works'} for it.")
        tell(f"To lend a device, run there:  fallow join '{self._join_url()}'")
        if wiring.is_loopback(self._config.bus.host) and self._config.bus.url is None:
            tell("That works on this machine only; start with --host 0.0.0.0 to accept devices of your network.")
        tell("`fallow status` shows what every device does. Ctrl-C stops everything.")

    def _join_url(self) -> str:
        if self._broker is None:
            return self._config.bus.url or ""
        url = self._broker.urls[0]
        if wiring.is_loopback(self._config.bus.host):
            return url
        return url.replace("@127.0.0.1:", f"@{lan_address()}:")


async def _stop(child: Child | None) -> None:
    if child is not None:
        await child.stop(CHILD_STOP_LIMIT_S)
