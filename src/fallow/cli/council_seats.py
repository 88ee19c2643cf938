"""How people come to sit in a council: `fallow council init`, `invite`, `join` and `key`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fallow.cli.options import ConfigFile, StateDir, notes, say, write_out
from fallow.cli.plain import one_line
from fallow.domain.errors import ConfigError

if TYPE_CHECKING:
    from fallow.trust.keys import Identity

NetworkFile = Annotated[
    Path | None, typer.Option("--network", help="The network's network.json, when this machine did not join.")
]
RegistrarUrl = Annotated[str | None, typer.Option("--registrar", help="Where the registrar is.", metavar="URL")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
MemberName = Annotated[str, typer.Option("--name", help="What the others call you.")]


def init(
    name: MemberName,
    member: Annotated[
        list[str] | None, typer.Option("--member", help="What `fallow council join` printed for another member.")
    ] = None,
    threshold: Annotated[int, typer.Option("--threshold", "-k", min=1, help="How many must sign.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the founding proposal goes.")] = Path("founding.json"),
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Found a network's council on the machine that will run `fallow up`.

    Without --member it is a council of you alone, at once; `fallow up` does the same by itself. With other members it
    writes a proposal that K of you sign (`fallow council sign`) and that is then published here.

    Examples:

          fallow council init --name alice
          fallow council init --name alice --member fallow-member-… --member fallow-member-… -k 2
    """

    from fallow.cli.council_place import place_of
    from fallow.policy.council import publisher_name, quorum_remark
    from fallow.trust.council import tuf_format as tuf
    from fallow.trust.council.ceremonies import Wanted, founding
    from fallow.trust.council.files import encode_proposal, found_council_of_one, members_of_texts
    from fallow.trust.keys import load_or_create

    place = place_of(state_dir, config)
    if place.has_repository:
        raise ConfigError("This network has a council already: change it with `fallow council propose`.")
    others = members_of_texts(tuple(member or ()), "")
    if not others:
        found_council_of_one(place.paths.state, name, time.time())
        say(f"You are the council. Your key is {place.paths.member_key}: keep a copy where nobody else finds it.")
        say(quorum_remark(1, 1) or "")
        return
    own = load_or_create(place.paths.member_key)
    publisher = load_or_create(place.paths.publisher_key)
    members = {own.node: name, **{node: each for node, each in others.items() if node != own.node}}
    wanted = Wanted(
        members=members,
        threshold=threshold,
        online=load_or_create(place.paths.online_keys / "1.key").node,
        publishers={tuf.role_of(kind, publisher_name(name)): publisher.node for kind in tuf.KINDS},
    )
    write_out(out, encode_proposal(founding(wanted, time.time())))
    say(f"Wrote {out}. Now `fallow council sign {out}` here, and on copies of it on {threshold - 1} other machines;")
    say(f"then `fallow council publish {out} COPY…` here, and `fallow up`.")
    remark = quorum_remark(len(members), threshold)
    if remark is not None:
        notes.print(remark)


def invite(
    state_dir: StateDir = None, config: ConfigFile = None, network: NetworkFile = None, registrar: RegistrarUrl = None
) -> None:
    """Print what somebody needs to become a member. It is public; that they are let in is for the council to sign."""

    from fallow.cli.council_place import place_of
    from fallow.trust.council import tuf_format as tuf
    from fallow.trust.council.files import CouncilInvitation, invitation_text
    from fallow.trust.council.proposals import first_root_payload, verify_base

    place = place_of(state_dir, config, network, registrar)
    base = place.base()
    root, _, _ = verify_base(base)
    council = root.roles["root"]
    invitation = CouncilInvitation(
        name=place.name,
        network=place.network,
        first_root=tuf.sha256(first_root_payload(base.roots[0])),
        threshold=council.threshold,
        members=len(council.keyids),
    )
    notes.print("Give this to the new member, who runs `fallow council join TEXT --name THEIR-NAME`:")
    say(invitation_text(invitation))
    notes.print("What that prints goes into `fallow council propose --add`.")


def join(
    name: MemberName,
    text: Annotated[
        str, typer.Argument(help="What `fallow council invite` printed; nothing before there is a network.")
    ] = "",
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Make your member's key on this machine, and print the public half for the others.

    The key stays here (`council/member.key`, readable for you alone). Make a copy and lock it away.
    """

    from fallow.cli.council_place import place_of
    from fallow.trust.council.files import invitation_of, member_text
    from fallow.trust.council.pins import Pin, pin_of, write_pin
    from fallow.trust.keys import load_or_create

    place = place_of(state_dir, config)
    network = ""
    if text:
        invitation = invitation_of(text)
        network = invitation.network
        pin = pin_of(place.paths)
        if pin is not None and pin.first_root != invitation.first_root:
            raise ConfigError("This machine's member belongs to another network: use another --state-dir.")
        if pin is None:
            write_pin(place.paths, Pin(name=name, network=network, first_root=invitation.first_root))
        elif not pin.network:  # a founder's: what it has seen stays, or an older list could be shown to it again
            write_pin(place.paths, msgspec.structs.replace(pin, name=name, network=network))
        called = one_line(invitation.name) or "(unnamed)"
        notes.print(f"The network {called}: {invitation.threshold} of {invitation.members} sign today.")
    own = load_or_create(place.paths.member_key)
    notes.print(f"Your key is {place.paths.member_key}. Give this to who proposes you:", soft_wrap=True)
    say(member_text(own, name, network))


def key(
    publisher: Annotated[bool, typer.Option("--publisher", help="A publisher's key; made when there is none.")] = False,
    new_online: Annotated[
        bool, typer.Option("--new-online", help="Another key for the registrar on this machine.")
    ] = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Show the public halves of this machine's keys, as `propose` takes them."""

    from fallow.cli.council_place import place_of
    from fallow.trust.council.files import member_of
    from fallow.trust.keys import load_or_create

    paths = place_of(state_dir, config).paths
    if publisher:
        say(f"models=NAME:{load_or_create(paths.publisher_key).node}")
    elif new_online:
        say(_new_online_key(paths.online_keys).node)
        notes.print("Propose it: `fallow council propose --online-key KEY`. The old one counts until that is in force.")
    else:
        say(member_of(paths).node)


def _new_online_key(folder: Path) -> "Identity":
    """A key that was not there before: one that is may be stolen. Raises `ConfigError`."""
    from fallow.trust.council.repository import ONLINE_KEYS_MAX
    from fallow.trust.keys import create

    kept = list(folder.glob("*.key"))
    if len(kept) >= ONLINE_KEYS_MAX:
        raise ConfigError(f"{folder} has {len(kept)} keys already: delete those that the council replaced.")
    numbers = (int(path.stem) for path in kept if path.stem.isascii() and path.stem.isdigit() and len(path.stem) < 9)
    return create(folder / f"{max(numbers, default=0) + 1}.key")
