"""A streamed answer of the API, and when it came: for benchmarks that count tokens a second.

Read with `http.client`: the client shares the cores with what is measured, and this one takes the least of them. Times
are of `time.perf_counter`, from the first piece to the last, so that the prompt does not count.
"""

import contextlib
import http.client
import json
import time
from typing import NamedTuple
from urllib.parse import urlsplit

TIMEOUT_S = 300.0


class Streamed(NamedTuple):
    """An answer: how long it took from its first piece to its last, how many tokens it has, and what it says."""

    span_s: float
    tokens: int
    text: str

    @property
    def token_s(self) -> float:
        """What a token took. The first one, which ends the prompt, does not count."""
        return self.span_s / max(1, self.tokens - 1)


def ask(api_url: str, key: str, model: str, prompt: str, tokens: int, question: dict[str, float]) -> Streamed:
    """Stream an answer of at most so many tokens behind its first. `question`: further fields of the request.

    Raises `OSError`, and `RuntimeError` when it is refused or fails on the way.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens + 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        **question,
    }
    at_s: list[float] = []
    pieces: list[str] = []
    count = 0
    connection = http.client.HTTPConnection(urlsplit(api_url).netloc, timeout=TIMEOUT_S)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != http.client.OK:
            raise RuntimeError(reply.read().decode())
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(event["error"])
            if event["choices"] and (piece := event["choices"][0]["delta"].get("content")):
                at_s.append(time.perf_counter())
                pieces.append(piece)
            elif event.get("usage"):
                count = event["usage"]["completion_tokens"]
    return Streamed(at_s[-1] - at_s[0], count, "".join(pieces))
