"""`fallow bus …`: the control bus as a nats-server of the operator's own."""

from pathlib import Path
from typing import Annotated

import typer

from fallow.cli.options import ConfigFile, StateDir, notes, say, settings

app = typer.Typer(
    no_args_is_help=True,
    help="Run the control bus as a NATS server of your own. `fallow up` starts one otherwise.",
)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the server's files are written.")]


@app.command()
def configure(
    folder: Folder,
    listen: Annotated[str, typer.Option("--listen", help="Where the server listens.", metavar="HOST:PORT")],
    at: Annotated[
        Path | None,
        typer.Option("--at", help="Where the folder will lie, if on another machine or elsewhere.", metavar="FOLDER"),
    ] = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Write the configuration of a nats-server for this network, with a certificate and its key.

    No key that signs is in it: the server lets in whom the registrar admitted, and can admit nobody. A first use founds
    the network. On stdout there is the configuration's path alone.

    Examples:

          fallow bus configure /var/lib/fallow-bus --listen 0.0.0.0:4222
          fallow bus configure bus --listen 0.0.0.0:4222 --at /var/lib/fallow-bus      to be copied there
    """
    from fallow.processes.operators_bus import configure as write

    there = at or folder.absolute()
    path = write(settings(config, {"state_dir": state_dir}).config, folder, listen, there, notes.print)
    notes.print(
        f"Start it with `nats-server -c {there / path.name}`, then Fallow with `--bus tls://HOST:PORT`. "
        "Its certificate is good for 90 days; `fallow bus renew` makes another.",
        soft_wrap=True,
    )
    say(str(path))


@app.command()
def renew(folder: Folder, state_dir: StateDir = None, config: ConfigFile = None) -> None:
    """Replace the certificate and its key in a folder that `fallow bus configure` wrote.

    Then have the server read them: `nats-server --signal reload`, or SIGHUP. Connections go on. Where the files belong
    to the user that the server runs as, run this as root: they stay that user's.

    Examples:

          fallow bus renew /var/lib/fallow-bus && nats-server --signal reload
    """
    from fallow.processes.operators_bus import renew as write

    write(settings(config, {"state_dir": state_dir}).config, folder)
    say(f"{folder} has a new certificate, good for 90 days. Have the server read it: `nats-server --signal reload`.")
