"""The commands and their help, gathered. Each command's module is imported when its help or itself is asked for."""

from typing import Annotated

import typer

from fallow import __version__
from fallow.cli import (
    audit,
    bus,
    chat,
    council,
    doctor,
    fleet,
    invite,
    keys,
    model,
    revoke,
    serve,
    settings,
    sim,
    status,
)

app = typer.Typer(
    name="fallow",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Fallow turns idle devices into one inference service behind an OpenAI-compatible API.\n\n"
        'Start with `fallow up --nodes 3` on one machine, then ask `fallow chat "What is a fallow field?"`. '
        "To lend another machine, run the `fallow join …` line that `fallow up` prints."
    ),
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fallow {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


app.command("up")(fleet.up)
app.command("join")(fleet.join)
app.command("invite")(invite.invite)
app.command("revoke")(revoke.revoke)
app.command("leave")(revoke.leave)
app.command("status")(status.status)
app.command("chat")(chat.chat)
app.command("doctor")(doctor.doctor)
app.add_typer(model.app, name="model")
app.add_typer(keys.app, name="key")
app.add_typer(council.app, name="council")
app.add_typer(audit.app, name="audit")
app.add_typer(bus.app, name="bus")
app.add_typer(settings.app, name="config")
app.add_typer(serve.app, name="serve")
app.add_typer(sim.app, name="sim")
