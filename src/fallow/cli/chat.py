"""`fallow chat`: talk to a model from the terminal, over the same HTTP API that any client uses."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import typer

from fallow.cli.options import ConfigFile, StateDir, notes, settings
from fallow.domain.errors import FabricError, FallowError

CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 120.0
"""Without a byte for so long the answer is given up."""


class ApiFailed(FallowError):
    """The API refused a request, or ended an answer with an error."""

    code = "api_failed"


def chat(
    question: Annotated[str | None, typer.Argument(help="Ask this and stop; without it a conversation starts.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Which model; the first one otherwise.")] = None,
    url: Annotated[
        str | None, typer.Option("--url", envvar="FALLOW_URL", help="The API, such as http://192.168.1.10:8484.")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", envvar="FALLOW_API_KEY", help="An API key, if the service asks for one.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer.")] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=2.0, help="0 always gives the same answer.")
    ] = 0.7,
    system: Annotated[str | None, typer.Option("--system", help="What the model should know or be.")] = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Chat with a model of the service. Answers appear as they are made.

    Examples:

          fallow chat "Why does ice float?"
          fallow chat --temperature 0 --max-tokens 100 "Name three rivers."
          fallow chat                         a conversation; an empty line or Ctrl-D ends it
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    base = url or _default_url(state_dir, config)
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with httpx.Client(base_url=base, headers=headers, timeout=timeout, trust_env=False) as client:
        try:
            chosen = model or _first_model(client)
            body: dict[str, Any] = {"model": chosen, "temperature": temperature, "stream": True}
            if max_tokens is not None:
                body["max_tokens"] = max_tokens
            messages = [{"role": "system", "content": system}] if system else []
            if question is not None:
                _exchange(client, body, messages, question)
            else:
                _converse(client, body, messages)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise FabricError(f"The API at {base} cannot be reached ({reason}). Is `fallow up` running?") from error


def _default_url(state_dir: Path | None, config: Path | None) -> str:
    from fallow.processes.gateway import api_url
    from fallow.processes.runfile import running

    loaded = settings(config, {"state_dir": state_dir}).config
    found = running(loaded.state_dir)
    return found.api_url if found is not None else api_url(loaded)


def _first_model(client: httpx.Client) -> str:
    reply = client.get("/v1/models")
    _check(reply)
    models = reply.json()["data"]
    if not models:
        raise ApiFailed("The service serves no model yet. Add one with `fallow model add default`, or wait a moment.")
    return str(models[0]["id"])


def _converse(client: httpx.Client, body: dict[str, Any], messages: list[dict[str, str]]) -> None:
    notes.print(f"You are talking to {body['model']}. An empty line or Ctrl-D ends it.", highlight=False)
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
            notes.print(f"\n{error.message}", style="red", highlight=False, markup=False)
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
            sys.stdout.write(piece)
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
