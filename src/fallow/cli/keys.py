"""`fallow key …`: API keys of clients."""

import re
from typing import Annotated

import typer

from fallow.cli.options import console, notes
from fallow.domain.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Make API keys. The service keeps only their digests.")


@app.command()
def create(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Whose key it is, for logs and limits.")],
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests a minute; unlimited otherwise.")
    ] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Tokens a minute; unlimited otherwise.")] = None,
    concurrent_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests at once; unlimited otherwise.")
    ] = None,
) -> None:
    """Make a key for a client of the API.

    It is shown once, together with the lines for the configuration file, which hold only its digest. As soon as one key
    is configured, the API asks everybody for a key.

    Examples:

          fallow key create alice
          fallow key create batch --tokens-per-minute 100000 --concurrent-requests 4
    """
    from fallow.gateway.keys import new_key

    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", key_id):
        raise ConfigError(f"An id has 1 to 64 letters, digits, dots, dashes, underscores or @; got {key_id[:80]!r}.")
    secret, digest = new_key()
    lines = ["[[gateway.keys]]", f'id = "{key_id}"', f'sha256 = "{digest}"']
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrent_requests,
    }
    lines += [f"{name} = {limit}" for name, limit in limits.items() if limit is not None]
    notes.print("This is the key. It is not kept anywhere, so copy it now:")
    console.print(secret, soft_wrap=True)
    notes.print("\nAdd this to fallow.toml and start the gateway again:\n")
    notes.print("\n".join(lines), soft_wrap=True)
