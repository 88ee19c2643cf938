"""`fallow chat`: talk to a model from the terminal, over the same HTTP API that any client uses."""

from pathlib import Path
from typing import Annotated

import typer

from fallow.cli.options import ConfigFile, StateDir, settings


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

    The service on this machine is asked, unless --url names another. Without a question a conversation starts, which an
    empty line or Ctrl-D ends.

    Examples:

          fallow chat "Why does ice float?"
          fallow chat --temperature 0 --max-tokens 100 "Name three rivers."
          fallow chat
    """
    from fallow.cli.conversation import run

    options = {"temperature": temperature} | ({"max_tokens": max_tokens} if max_tokens is not None else {})
    run(url or _default_url(state_dir, config), key, model, question, system, options)


def _default_url(state_dir: Path | None, config: Path | None) -> str:
    from fallow.processes.addresses import api_url
    from fallow.processes.runfile import running

    loaded = settings(config, {"state_dir": state_dir}).config
    found = running(loaded.state_dir)
    return found.api_url if found is not None else api_url(loaded)
