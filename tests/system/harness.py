"""What system tests share: a service in a temporary folder, and an HTTP client that streams answers.

`LocalService` (src/fallow/processes/local_service.py) starts and stops the real processes. Here are the test's own
needs: a store that is imported once for all tests, and answers with the time at which every piece came.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import msgspec

from fallow.gateway.keys import new_key
from fallow.processes.local_service import LocalService

ANSWER_LIMIT_S = 120.0
MODEL = "smollm2-135m-instruct"
SPLIT = ("--nodes", "3", "--max-share", "0.7", "--memory", "1GiB")
"""Three devices, none of which holds the whole model, every piece on two."""


KEYS = {name: new_key() for name in ("neighbour", "rude", "newcomer")}
"""Of `OneDevice`."""


class Answer(msgspec.Struct):
    """A streamed answer. `at_s` is when each piece came, after the request."""

    pieces: list[str] = []
    at_s: list[float] = []
    finish: str | None = None
    error: str | None = None
    usage: dict[str, object] = {}

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def longest_gap_s(self) -> float:
        return max((after - before for before, after in zip(self.at_s, self.at_s[1:], strict=False)), default=0.0)


@contextmanager
def service(folder: Path, store: Path | None, *arguments: str, settings: str = "") -> Iterator[LocalService]:
    """A running service; its logs are in the message of whatever fails inside."""
    with LocalService(folder, arguments, store=store, settings=settings) as running:
        try:
            yield running
        except Exception as error:
            error.add_note(running.log_tail())
            raise


class OneDevice:
    """A service of one device, with `KEYS`, that files of tests use one after the other: it is started when it is first
    lent, and again when it was ended in between. Who spoils it ends it."""

    def __init__(self, folder: Callable[[], Path], store: Path) -> None:
        self._folder = folder
        self._store = store
        self._running = ExitStack()
        self._service: LocalService | None = None

    def lend(self) -> LocalService:
        if self._service is None:
            keys = "\n".join(f'[[gateway.keys]]\nid = "{name}"\nsha256 = "{sha}"' for name, (_, sha) in KEYS.items())
            settings = f'local_nodes = 1\n[node]\nmemory_bytes = "1GiB"\n{keys}'
            self._service = self._running.enter_context(service(self._folder(), self._store, settings=settings))
            self._service.wait_until_servable()
        return self._service

    def end(self) -> None:
        self._service = None
        self._running.close()


def ask(
    url: str,
    question: str,
    max_tokens: int = 60,
    key: str | None = None,
    on_piece: Callable[[Answer], None] = lambda answer: None,
    **options: object,
) -> Answer:
    """Stream a greedy answer; `on_piece` is called after every piece, in the same thread."""
    answer = Answer()
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    headers = {"authorization": f"Bearer {key}"} if key else {}
    began_s = time.monotonic()
    with (
        httpx.Client(base_url=url, headers=headers, timeout=ANSWER_LIMIT_S, trust_env=False) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as reply,
    ):
        if reply.status_code != httpx.codes.OK:
            reply.read()
            answer.error = reply.json()["error"]["message"]
            return answer
        for line in reply.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                answer.error = event["error"]["message"]
                continue
            answer.usage = event.get("usage") or answer.usage
            for choice in event["choices"]:
                answer.finish = choice.get("finish_reason") or answer.finish
                piece = choice["delta"].get("content")
                if piece:
                    answer.pieces.append(piece)
                    answer.at_s.append(time.monotonic() - began_s)
                    on_piece(answer)
    return answer
