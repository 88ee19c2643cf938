"""A conversation with the API over HTTP: what `fallow chat` does once it knows whom to ask."""

import json
import sys
from collections.abc import Iterator
from typing import Any, Final

import httpx

from fallow.cli.options import notes
from fallow.cli.plain import one_line, visible
from fallow.domain.errors import FabricError, FallowError

CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 120.0
"""Without a byte for so long the answer is given up."""


class ApiFailed(FallowError):
    """The API refused a request, or ended an answer with an error."""

    code = "api_failed"


def run(
    base: str,
    key: str | None,
    model: str | None,
    question: str | None,
    system: str | None,
    options: dict[str, Any],
) -> None:
    """Ask `question`, or converse when there is none. Raises `ApiFailed` and `FabricError`."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with httpx.Client(base_url=base, headers=headers, timeout=timeout, trust_env=False) as client:
        try:
            body = {"model": model or _first_model(client), "stream": True, **options}
            messages = [{"role": "system", "content": system}] if system else []
            if question is not None:
                _exchange(client, body, messages, question)
            else:
                _converse(client, body, messages)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise FabricError(f"The API at {base} cannot be reached ({reason}). Is `fallow up` running?") from error


def _first_model(client: httpx.Client) -> str:
    reply = client.get("/v1/models")
    _check(reply)
    models = reply.json()["data"]
    if not models:
        raise ApiFailed("The service serves no model yet. Add one with `fallow model add default`, or wait a moment.")
    return str(models[0]["id"])


def _converse(client: httpx.Client, body: dict[str, Any], messages: list[dict[str, str]]) -> None:
    notes.print(f"You are talking to {one_line(body['model'])}. An empty line or Ctrl-D ends it.")
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            return
        if not question:
            return
        try:
            _exchange(client, body, messages, question)
        except ApiFailed as error:
            notes.print(f"\n{one_line(error.message)}", style="red")
        except KeyboardInterrupt:
            notes.print("\n(stopped)")


def _exchange(client: httpx.Client, body: dict[str, Any], messages: list[dict[str, str]], question: str) -> None:
    """One question and its answer; both stay in `messages` when it went well."""
    asked = [*messages, {"role": "user", "content": question}]
    pieces: list[str] = []
    with client.stream("POST", "/v1/chat/completions", json=body | {"messages": asked}) as reply:
        if reply.status_code != httpx.codes.OK:
            reply.read()
        _check(reply)
        for piece in _pieces(reply):
            pieces.append(piece)
            sys.stdout.write(visible(piece.replace("\r", "")))
            sys.stdout.flush()
    sys.stdout.write("\n")
    messages[:] = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def _pieces(reply: httpx.Response) -> Iterator[str]:
    """The text in a stream of server-sent events."""
    for line in reply.iter_lines():
        data = line.removeprefix("data: ")
        if data in (line, "[DONE]"):
            continue
        event = json.loads(data)
        if "error" in event:
            raise ApiFailed(str(event["error"].get("message", "The answer ended with an error.")))
        for choice in event.get("choices", ()):
            yield choice.get("delta", {}).get("content") or ""


def _check(reply: httpx.Response) -> None:
    if reply.status_code == httpx.codes.OK:
        return
    try:
        message = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"The API answered with status {reply.status_code}."
    raise ApiFailed(str(message))
