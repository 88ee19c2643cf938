"""`fallow revoke` and `fallow leave`: how a membership ends, by the operator's will or by its owner's."""

import asyncio
import datetime
from typing import Annotated

import typer

from fallow.cli.options import ConfigFile, StateDir, notes, say, settings
from fallow.domain.errors import ConfigError

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask, for scripts.")]


def revoke(
    who: Annotated[str, typer.Argument(metavar="NAME|KEY", help="A member's name, or 8 or more digits of its key.")],
    why: Annotated[str, typer.Option("--why", help="For the journal, and for whoever is revoked.")],
    yes: Yes = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Shut a device or person out of the network, for good.

    The bus cuts its connection, others drop their links with it, and it gets no new passport: within 5 seconds where
    the registrar runs, within the hour that its passport has left where nobody can be told. It comes back only with a
    new key and a new invitation. From another machine, name it by its whole key, as `fallow status --json` shows it.

    Examples:

          fallow revoke "old laptop" --why "sold on Saturday"
          fallow revoke 3f9a1c20d4e5 --why "its disk was stolen" --yes
    """
    from fallow.cli.registrar_place import Here, place_of, short
    from fallow.trust.registrar.requests import Revoke

    if not 1 <= len(why) <= 500:
        raise ConfigError("Give a reason of 1 to 500 characters with --why: it is kept in the journal.")
    place = place_of(state_dir, config)
    if isinstance(place, Here):
        found = place.registrar.named(who)
        if len(found) != 1:
            several = "; ".join(f"{each.name!r} {each.role} {short(each.node)}" for each in found[:10])
            raise ConfigError(
                f"{len(found)} members are called {who[:80]!r}: {several}. Name one by its key."
                if found
                else f"Nobody called {who[:80]!r} was admitted here; `fallow audit members` lists who was."
            )
        seen = datetime.datetime.fromtimestamp(found[0].seen_unix_s).astimezone()
        notes.print(f"{found[0].role} {found[0].name!r}, key {short(found[0].node)}…, last seen {seen:%Y-%m-%d %H:%M}.")
        _confirm(found[0].name, yes)
        gone = place.registrar.revoke(found[0].node, why)
    else:
        if len(who) != 64:
            raise ConfigError("From another machine than the registrar's, name a member by its whole key.")
        _confirm(who[:12], yes)
        gone = place.ask(lambda client, me: client.farewell(me, Revoke(node=who, why=why)))
    say(f"{gone.name!r} is revoked, and that is in the journal.")


def leave(
    yes: Yes = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """End this device's membership, at once. Its key and its files stay until you delete them.

    If the device runs, it says goodbye first: running answers move to other devices, and `fallow join` ends. Then the
    registrar strikes it off: the bus cuts it and others drop it, within 5 seconds where the registrar runs, and it gets
    no new passport. To lend the device again it takes a new invitation.
    """
    from fallow.processes.leaving import leave as ended
    from fallow.trust import membership
    from fallow.trust.registrar.state import NETWORK_FILE, read_network

    loaded = settings(config, {"state_dir": state_dir}).config
    folder = loaded.device_dir
    if not membership.is_member(folder):
        raise ConfigError(f"The device whose files lie in {folder} is no member of a network.")
    name = read_network((folder / NETWORK_FILE).read_bytes()).name
    if not yes and not typer.confirm(f"Leave the network {name!r}?", default=False):
        raise typer.Exit(1)
    asyncio.run(ended(loaded, say))


def _confirm(name: str, yes: bool) -> None:
    """Have the name typed: shutting out the wrong one cannot be undone."""
    if (
        not yes
        and typer.prompt(f"This cannot be undone. Type {name!r} to revoke it", default="", show_default=False) != name
    ):
        raise ConfigError("That is another name; nobody was revoked.")
