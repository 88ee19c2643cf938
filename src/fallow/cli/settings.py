"""`fallow config …`: which settings are in force, and why."""

from typing import Annotated, Any

import typer
from rich.table import Table

from fallow.cli.options import ConfigFile, console, settings
from fallow.config import SECRET_SETTINGS, Config, setting_names, value_of

app = typer.Typer(no_args_is_help=True, help="Show the settings. Flags beat FALLOW_* variables, which beat the file.")


@app.command()
def show(
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every setting, its value now, and where the value comes from.

    Passwords and keys are not shown. Write the settings that you want to change into fallow.toml.

    Examples:

          fallow config show
      FALLOW_GATEWAY_PORT=9000 fallow config show --json
    """
    loaded = settings(config, {})
    shown = {name: _shown(loaded.config, name) for name in setting_names()}
    if as_json:
        console.print_json(data={name: {"value": shown[name], "source": loaded.sources[name]} for name in shown})
        return
    table = Table("setting", "value", "source", box=None, pad_edge=False, header_style="bold")
    for name, value in shown.items():
        table.add_row(name, "–" if value is None else str(value), loaded.sources[name])
    console.print(table)
    console.print(f"\nFile: {loaded.file or 'none; ./fallow.toml would be read'}")


def _shown(config: Config, name: str) -> Any:
    value = value_of(config, name)
    if name in SECRET_SETTINGS and value:
        return f"{len(value)} keys" if isinstance(value, tuple) else "set, not shown"
    if isinstance(value, tuple):
        return len(value)
    return value if value is None or isinstance(value, int | float | str) else str(value)
