"""`fallow invite`: an invitation as text, and as a QR code for a phone's camera."""

import datetime
import re
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fallow.cli.options import ConfigFile, StateDir, notes, say
from fallow.domain.credentials import Role
from fallow.domain.errors import ConfigError
from fallow.domain.fleet import Tier
from fallow.trust.registrar.requests import NAME_PATTERN

if TYPE_CHECKING:
    from fallow.cli.registrar_place import Afar, Here

_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def invite(
    role: Annotated[
        str, typer.Option("--role", help="node, gateway, coordinator, operator, auditor or reader.")
    ] = "node",
    tier: Annotated[
        str,
        typer.Option("--tier", help="How well its user is known: anonymous, keyed, or attested (by your own word)."),
    ] = "keyed",
    expires: Annotated[str, typer.Option("--expires", help="For how long it is good, such as 10m, 1h or 7d.")] = "1h",
    name: Annotated[
        str | None, typer.Option("--name", help="What its user will be called; as they say themselves otherwise.")
    ] = None,
    cell: Annotated[str | None, typer.Option("--cell", help="Into which cell; the network's own otherwise.")] = None,
    withdraw: Annotated[
        str | None,
        typer.Option(
            "--withdraw",
            metavar="ID|NAME",
            help="Invite nobody: make the unused invitation of that id void, or all that were made for that name.",
        ),
    ] = None,
    qr: Annotated[bool, typer.Option("--qr/--no-qr", help="Show a QR code as well.")] = True,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Invite one device or person into the network.

    Whoever has the text can use it, once, until it expires: hand it over as you would a key. On stdout there is the
    text alone. From another machine than the registrar's, an operator invites devices, gateways, auditors and readers.

    Examples:

          fallow invite
          fallow invite --role auditor --name "data protection office" --expires 7d
          fallow invite --withdraw 3f9a1c20
          fallow invite --no-qr | ssh desk 'fallow join --yes "$(cat)"'
    """
    from fallow.cli.registrar_place import Here, place_of
    from fallow.trust.registrar.invitations import as_qr, from_text
    from fallow.trust.registrar.requests import Invite

    wanted, known, life_s = _role(role), _tier(tier), parse_life_s(expires)
    place = place_of(state_dir, config)
    if withdraw is not None:
        _withdraw(place, withdraw)
        return
    if isinstance(place, Here):
        made = place.registrar.invite(wanted, known, life_s, name, cell)
    else:
        asked = Invite(role=wanted, tier=known, life_s=life_s, name=name, cell=cell)
        made = place.ask(lambda client, who: client.invite(who, asked))
    until = datetime.datetime.fromtimestamp(made.expires_unix_s).astimezone()
    if qr:
        notes.print(as_qr(made.text), soft_wrap=True)
    purpose = "To lend a device" if wanted is Role.NODE else f"To take part as {wanted}"
    notes.print(
        f"{purpose}, run there: fallow join TEXT. It works once, until {until:%Y-%m-%d %H:%M:%S %Z}, or "
        f"until you withdraw it: fallow invite --withdraw {from_text(made.text).id.hex()[:12]}. The text is:"
    )
    say(made.text)


def _withdraw(place: "Here | Afar", which: str) -> None:
    from fallow.cli.registrar_place import Here
    from fallow.trust.registrar.requests import Withdraw

    if re.search(NAME_PATTERN, which) is None:
        raise ConfigError("Name an invitation by its id, or by 8 or more of its first digits, or give a member's name.")
    if isinstance(place, Here):
        gone = place.registrar.withdraw(which).invitations
    else:
        gone = place.ask(lambda client, who: client.withdraw(who, Withdraw(which=which))).invitations
    say(f"{len(gone)} invitation{'' if len(gone) == 1 else 's'} withdrawn, and that is in the journal.")


def parse_life_s(text: str) -> float:
    """Seconds in `90s`, `10m`, `1h` or `7d`. Raises `ConfigError`."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)([smhd])", text.strip())
    if match is None:
        raise ConfigError(f"Expected a time such as 30m, 1h or 7d, got {text[:40]!r}.")
    return float(match[1]) * _UNITS[match[2]]


def _role(text: str) -> Role:
    try:
        return Role(text.lower())
    except ValueError:
        raise ConfigError(f"There is no role {text[:40]!r}; it is one of {', '.join(Role)}.") from None


def _tier(text: str) -> Tier:
    try:
        return Tier[text.upper()]
    except KeyError:
        names = ", ".join(tier.name.lower() for tier in Tier)
        raise ConfigError(f"There is no tier {text[:40]!r}; it is one of {names}.") from None
