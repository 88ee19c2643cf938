"""A whole service in one folder on this machine, for the demo, benchmarks and system tests.

Rules
- It is the product: `fallow up` and `fallow join` as processes, asked over the bus and HTTP like anybody's.
- Everything lies in the folder given; ports are free ones; nothing else on the machine is touched.
- Processes are ended by their ids, and all of them are gone when `stop` returns. They end by themselves when their
  parent, who made this, is gone.

Plain and blocking: callers are scripts and tests.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx
import msgspec
import psutil

from fallow.config import Config
from fallow.domain.credentials import Role
from fallow.domain.errors import BusTimeout, BusUnavailable, FallowError
from fallow.domain.fleet import FleetStatus, StageStatus
from fallow.domain.ids import NodeId
from fallow.processes.party import of_what_runs, open_console
from fallow.processes.runfile import Running, running
from fallow.system_clock import SystemClock
from fallow.trust.membership import is_member
from fallow.trust.registrar.database import open_database
from fallow.trust.registrar.service import Registrar
from fallow.trust.registrar.state import open_state

START_LIMIT_S: Final = 60.0
STOP_LIMIT_S: Final = 25.0
POLL_S: Final = 0.1
STATUS_TIMEOUT_S: Final = 2.0
LOG_TAIL_LINES: Final = 40


class ServiceFailed(FallowError):
    """The service did not become what was waited for. The message holds the end of its logs."""

    code = "service_failed"


class LocalService:
    """One `fallow up`, and devices that join it. A context manager: leaving stops everything."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str] = (),
        *,
        store: Path | None = None,
        settings: str = "",
        environment: dict[str, str] | None = None,
    ) -> None:
        """`arguments` go to `fallow up`; `store` is copied in (hard links where possible); `settings` is TOML."""
        self.folder = folder
        self.state_dir = folder / "state"
        self._arguments = tuple(arguments)
        self._store = store
        self._settings = settings
        self._environment = {**os.environ, **(environment or {})}
        self._up: subprocess.Popen[bytes] | None = None
        self._joined: dict[str, subprocess.Popen[bytes]] = {}
        self._found: Running | None = None

    # --- life ---

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until the API answers. Raises `ServiceFailed`."""
        self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._store is not None and not (self.state_dir / "models").exists():
            shutil.copytree(self._store, self.state_dir / "models", copy_function=_link_or_copy)
        config = self.folder / "fallow.toml"
        config.write_text(self._settings)
        command = ["up", "--port", "0", "--state-dir", str(self.state_dir), "--config", str(config), *self._arguments]
        self._up = self._spawn("up", command)
        self._until(self._is_up, START_LIMIT_S, "the service to start")

    def stop(self) -> None:
        """End every process that was started here. Idempotent."""
        for process in (*self._joined.values(), self._up):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                # A process that was stopped (SIGSTOP) cannot obey.
                process.send_signal(signal.SIGCONT)
        for process in (*self._joined.values(), self._up):
            if process is not None:
                _end(process)
        self._joined.clear()
        self._up = None
        self._found = None

    def join(self, name: str, *arguments: str) -> int:
        """Start a device of that name; its process id. It is in nobody's care, unlike those of `--nodes`."""
        state_dir = self.folder / "joined" / name
        command = ["join", *self._leave(name, state_dir), "--name", name, "--state-dir", str(state_dir)]
        command += ["--yes", "--verbose", *arguments]
        self._joined[name] = self._spawn(name, command)
        return self._joined[name].pid

    # --- facts ---

    @property
    def pid(self) -> int:
        """Of `fallow up`."""
        assert self._up is not None
        return self._up.pid

    @property
    def api_url(self) -> str:
        return self._running().api_url

    @property
    def bus_url(self) -> str:
        return self._running().bus_url

    @property
    def config(self) -> Config:
        """The settings with which this service is asked."""
        return of_what_runs(Config(state_dir=self.state_dir))

    def invite(self, role: Role = Role.NODE, name: str | None = None) -> str:
        """An invitation, as `fallow invite` on this machine makes it."""
        state = open_state(self.state_dir)
        return Registrar(state, open_database(state.paths.database), SystemClock()).invite(role=role, name=name).text

    def status(self) -> FleetStatus:
        """What the coordinator knows now. Raises `BusUnavailable` or `BusTimeout`."""
        return asyncio.run(_ask(self.config))

    def wait_for(self, holds: Callable[[FleetStatus], bool], limit_s: float, what: str) -> FleetStatus:
        """Poll the status until something holds. Raises `ServiceFailed`."""
        seen: list[FleetStatus] = []

        def check() -> bool:
            try:
                seen[:] = [self.status()]
            except (BusUnavailable, BusTimeout):
                return False
            return holds(seen[0])

        self._until(check, limit_s, what)
        return seen[0]

    def wait_until_servable(self, copies: int = 1, limit_s: float = START_LIMIT_S) -> FleetStatus:
        """Wait until every layer of every model is ready on so many devices."""
        return self.wait_for(lambda fleet: holders(fleet) >= copies, limit_s, f"{copies} ready copies of every layer")

    def child_pid(self, name: str) -> int:
        """The process of a child of `fallow up`: `coordinator` (the one that leads, if one answers), `coordinator-N`,
        `gateway`, `registrar` or `node-N`. Raises `ServiceFailed`."""
        if name == "coordinator":
            with contextlib.suppress(BusUnavailable, BusTimeout):
                name = self.status().coordinators[0].name
        marks = {name: ["serve", name] for name in ("coordinator", "gateway", "registrar")}
        if name.startswith("coordinator-"):
            marks[name] = ["serve", "coordinator", str(self.state_dir / "logs" / f"{name}.log")]
        for child in psutil.Process(self.pid).children():
            try:
                words = child.cmdline()
            except psutil.Error:
                continue
            if all(mark in words for mark in marks.get(name, [str(self.state_dir / "nodes" / name)])):
                return int(child.pid)
        raise ServiceFailed(f"No process of {name} runs.{self.log_tail()}")

    def device_pids(self, name: str) -> tuple[int, ...]:
        """A device's processes by name: its agent first, then its workers."""
        joined = self._joined.get(name)
        agent = joined.pid if joined is not None else self.child_pid(name)
        return (agent, *(child.pid for child in psutil.Process(agent).children(recursive=True)))

    def node_name(self, node: NodeId) -> str:
        """What a node is called."""
        return next(beat.name for beat in self.status().nodes if beat.node == node)

    def log_tail(self) -> str:
        """The end of every log, for messages about failures."""
        files = sorted([*self.state_dir.glob("logs/*"), *self.folder.glob("*.output")])
        tails = []
        for file in files:
            lines = file.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            if lines:
                tails.append(f"\n--- {file.name} ---\n" + "\n".join(lines))
        return "".join(tails)

    # --- inside ---

    def _leave(self, name: str, state_dir: Path) -> list[str]:
        """What a device shows when it joins: an invitation, the first time."""
        if self._running().insecure:
            return ["--insecure-development", self.bus_url]
        return [] if is_member(state_dir / "device") else [self.invite(name=name)]

    def _spawn(self, name: str, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.output").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "fallow", *arguments, "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def _is_up(self) -> bool:
        assert self._up is not None
        if self._up.poll() is not None:
            raise ServiceFailed(f"`fallow up` stopped with status {self._up.returncode}.{self.log_tail()}")
        self._found = running(self.state_dir)
        if self._found is None:
            return False
        try:
            return httpx.get(f"{self._found.api_url}/health", timeout=STATUS_TIMEOUT_S, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def _running(self) -> Running:
        assert self._found is not None
        return self._found

    def _until(self, holds: Callable[[], bool], limit_s: float, what: str) -> None:
        deadline_s = time.monotonic() + limit_s
        while not holds():
            if time.monotonic() > deadline_s:
                raise ServiceFailed(f"Waited {limit_s:.0f} s for {what}, in vain.{self.log_tail()}")
            time.sleep(POLL_S)


def holders(fleet: FleetStatus) -> int:
    """On how many devices the rarest layer of any model is ready; 0 without models."""
    counts = []
    for entry in fleet.models:
        ready = [
            piece
            for beat in fleet.nodes
            for hosted in beat.hosted
            if hosted.stage.model == entry.model and hosted.status is StageStatus.READY
            for piece in hosted.stage.pieces
        ]
        counts += [
            sum(piece.first <= layer < piece.last for piece in ready) for layer in range(entry.config.layer_count)
        ]
    return min(counts, default=0)


async def _ask(config: Config) -> FleetStatus:
    bus, subjects = await open_console(config)
    try:
        reply = await bus.request(subjects.status, b"", STATUS_TIMEOUT_S)
    finally:
        await bus.close()
    return msgspec.json.decode(reply, type=FleetStatus)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in children:
            if child.is_running():
                child.kill()
