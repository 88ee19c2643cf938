"""Keeps child processes running: starts them, restarts those that die, and ends them gently.

Rules
- A child that dies is started again after a wait that doubles up to `RESTART_WAIT_MAX_S`; after `RESTARTS_MAX` deaths
  in a row it is given up. One that ran for `STABLE_S` starts with a clean slate. Every restart is told.
- Children end with the supervisor, however it ends: the kernel kills them, where it can (`child_process.py`).
- Children have their own session, so that Ctrl-C in a terminal reaches the supervisor alone and it decides the order.
- A child's output goes to its log file. Logs are rotated by the child; what is here is its last words.

It knows nothing of what the children do.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from fallow.child_process import ending_with_us

RESTARTS_MAX: Final = 10
RESTART_WAIT_S: Final = 0.2
RESTART_WAIT_MAX_S: Final = 10.0
STABLE_S: Final = 30.0
LAST_WORDS_BYTES: Final = 4096

Tell = Callable[[str], None]
"""Says a sentence to the person who watches."""


class Child:
    """One child process and the task that keeps it alive."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log_file: Path, tell: Tell,
        rest_s: float = 0.0,
    ) -> None:  # fmt: skip
        """`rest_s`: how long it stays away after a death, at least."""
        self.name = name
        self.given_up = False
        self._command = command
        self._environment = environment
        self._log_file = log_file
        self._tell = tell
        self._rest_s = rest_s
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Its process id; `None` while it does not run."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start it and keep it running until `stop`."""
        await self._launch()
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def stop(self, limit_s: float) -> None:
        """SIGTERM, a second one at half of the limit, SIGKILL after it. Idempotent."""
        self._stopping = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        process = self._process
        if process is None:
            return
        for _ in range(2):
            if process.returncode is None:
                process.terminate()
                await _wait(process, limit_s / 2)
        if process.returncode is None:
            process.kill()
            await process.wait()

    def last_words(self) -> str:
        """The end of its log, for a message about its death."""
        try:
            with self._log_file.open("rb") as file:
                file.seek(max(0, self._log_file.stat().st_size - LAST_WORDS_BYTES))
                lines = file.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    async def _launch(self) -> None:
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self._environment},
                start_new_session=True,
                **ending_with_us(signal.SIGKILL),
            )

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        deaths, trouble = 0, ""
        while not self._stopping:
            began_s = loop.time()
            ending, words = (trouble, "") if trouble else await self._ended()
            deaths = 1 if loop.time() - began_s > STABLE_S else deaths + 1
            if deaths > RESTARTS_MAX:
                self.given_up = True
                self._tell(f"{self.name} stopped {deaths} times in a row and is given up; see {self._log_file}.")
                return
            wait_s = max(self._rest_s, min(RESTART_WAIT_S * 2 ** (deaths - 1), RESTART_WAIT_MAX_S))
            self._tell(f"{self.name} {ending}; starting it again in {wait_s:.1f} s. {words}".rstrip())
            await asyncio.sleep(wait_s)
            trouble = await self._relaunched()

    async def _ended(self) -> tuple[str, str]:
        """Wait for its end: how it came, and what its log says of it."""
        assert self._process is not None
        status = await self._process.wait()
        if status < 0:
            return f"was ended by signal {-status}", ""
        return f"stopped with status {status}", self.last_words() if status else ""

    async def _relaunched(self) -> str:
        """Start it again; why it could not be, which counts as one more death: no memory or disk is left just now."""
        try:
            await self._launch()
        except OSError as error:
            return f"could not be started ({error})"
        return ""


async def _wait(process: asyncio.subprocess.Process, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await process.wait()
    except TimeoutError:
        return
