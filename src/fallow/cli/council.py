"""`fallow council …`: who decides what a network runs, and how they sign it.

Each command is one step of a member; what the steps mean is in docs/security/council.md.
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from fallow.cli.council_halt import halt, obey
from fallow.cli.council_models import sign_model, withdraw_model
from fallow.cli.council_seats import NetworkFile, RegistrarUrl, Yes, init, invite, join, key
from fallow.cli.options import ConfigFile, StateDir, console, say, write_out
from fallow.domain.errors import CharterInvalid, ConfigError

app = typer.Typer(no_args_is_help=True, help="Sign what a network may run, with others; and stop it, alone.")


for command in (init, invite, join, key, sign_model, withdraw_model, halt, obey):
    app.command()(command)


@app.command()
def propose(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the proposal goes.")] = Path("proposal.json"),
    add: Annotated[list[str] | None, typer.Option("--add", help="A new member's text.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="A member's name or key.")] = None,
    threshold: Annotated[int | None, typer.Option("--threshold", "-k", min=1, help="How many must sign.")] = None,
    allow_model: Annotated[
        list[str] | None, typer.Option("--allow-model", help="A model's digest or local name; only named ones, then.")
    ] = None,
    forbid_model: Annotated[
        list[str] | None, typer.Option("--forbid-model", help="Take one from the allowed ones.")
    ] = None,
    allow_all_models: Annotated[bool, typer.Option("--allow-all-models", help="Whatever publishers sign.")] = False,
    lease: Annotated[float | None, typer.Option("--lease", help="Seconds that a device works unheard.")] = None,
    version_min: Annotated[str | None, typer.Option("--version-min", help="The oldest Fallow that may work.")] = None,
    tier_min: Annotated[str | None, typer.Option("--tier-min", help="anonymous, keyed or attested.")] = None,
    session_tokens_max: Annotated[int | None, typer.Option(help="Of one session.")] = None,
    sessions_per_device_max: Annotated[int | None, typer.Option(help="On one device.")] = None,
    quarantine_per_hour_max: Annotated[int | None, typer.Option(help="Devices taken out on suspicion.")] = None,
    quarantine_share_max: Annotated[float | None, typer.Option(help="Of the fleet, 0 to 1.")] = None,
    publisher: Annotated[
        list[str] | None,
        typer.Option("--publisher", help="A new one, or a new key for one: models=NAME:KEY, or releases=NAME:KEY."),
    ] = None,
    remove_publisher: Annotated[
        list[str] | None, typer.Option(help="With all that they signed, without their help: models=NAME or models=KEY.")
    ] = None,
    withdraw: Annotated[
        list[str] | None,
        typer.Option("--withdraw", help="Off a publisher's list: models=NAME:DIGEST, models=NAME:all; they sign, too."),
    ] = None,
    online_key: Annotated[str | None, typer.Option("--online-key", help="The registrar's new key.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="End the halt: a policy of a higher epoch.")] = False,
    renew: Annotated[bool, typer.Option("--renew", help="Nothing new, signed for another 90 days.")] = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    network: NetworkFile = None,
    registrar: RegistrarUrl = None,
) -> None:
    """Write one proposal: a change of policy, of the council, of publishers, or the end of a halt.

    Nothing is in force before enough members signed it and it was published.

    Examples:

          fallow council propose --lease 300 --allow-model smollm2-135m-instruct
          fallow council propose --add fallow-member-… --threshold 2
          fallow council propose --remove carol --resume
          fallow council propose --publisher models=dora:KEY
    """

    from fallow.cli.council_place import place_of
    from fallow.cli.council_wishes import PolicyWish, PublisherWish, SeatWish, wanted_of
    from fallow.cli.council_words import show_review
    from fallow.trust.council.ceremonies import Wanted, proposal
    from fallow.trust.council.files import encode_proposal
    from fallow.trust.council.proposals import review

    place = place_of(state_dir, config, network, registrar)
    seats = SeatWish(tuple(add or ()), tuple(remove or ()), threshold, online_key)
    policy = PolicyWish(
        allow=tuple(allow_model or ()),
        forbid=tuple(forbid_model or ()),
        allow_all=allow_all_models,
        resume=resume,
        values={
            "lease_s": lease,
            "version_min": version_min,
            "tier_min": tier_min,
            "limits.session_tokens_max": session_tokens_max,
            "limits.sessions_per_device_max": sessions_per_device_max,
            "quarantine.devices_per_hour_max": quarantine_per_hour_max,
            "quarantine.fleet_share_max": quarantine_share_max,
        },
    )
    publishers = PublisherWish(tuple(publisher or ()), tuple(remove_publisher or ()), tuple(withdraw or ()))
    base = place.base()
    wanted = wanted_of(place, base, seats, policy, publishers)
    if wanted is None and not renew:
        raise ConfigError("This would change nothing. `fallow council propose --help` lists what can be proposed.")
    proposed = proposal(base, wanted or Wanted(), time.time())
    write_out(out, encode_proposal(proposed))
    show_review(review(proposed))
    say(f"\nWrote {out}. Members run `fallow council sign` on it or on copies of it; then `fallow council publish`.")


@app.command()
def sign(
    file: Annotated[Path, typer.Argument(metavar="PROPOSAL", help="The proposal, or your copy of it.")],
    yes: Yes = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Look at a proposal and sign it with the keys of this machine. Needs no network.

    What is shown is read from the documents that you sign, compared with what the council signed before.
    """

    from fallow.cli.council_place import confirmed, place_of
    from fallow.cli.council_words import show_review
    from fallow.trust.council.ceremonies import sign as sign_proposal
    from fallow.trust.council.files import encode_proposal, read_proposal, signing_keys
    from fallow.trust.council.pins import Pin, check_pin, pin_of, write_pin
    from fallow.trust.council.proposals import review

    place = place_of(state_dir, config)
    proposed = read_proposal(file)
    found = review(proposed)
    pin = pin_of(place.paths) or Pin(name="", network=place.network, first_root=found.founds)
    if pin.first_root != found.founds:
        raise CharterInvalid("This proposal is of another network than the one that this machine's member belongs to.")
    if proposed.base is not None:
        pin = check_pin(pin, proposed.base)
    keys = signing_keys(place.paths)
    show_review(found)
    if proposed.base is None:
        say(f"\nThis founds a network. Compare this with the other members, by telephone: {found.founds}")
    say(f"\nYou sign as {', '.join(key.node[:16] + '…' for key in keys)}.")
    confirmed("Sign it?", yes)
    signed, documents = sign_proposal(proposed, keys)
    write_out(file, encode_proposal(signed))
    write_pin(place.paths, pin)
    say(f"Signed {', '.join(documents)} in {file}.")
    if review(signed).is_complete:
        say(f"It has all the signatures that it needs: `fallow council publish {file}`.")


@app.command()
def publish(
    files: Annotated[list[Path], typer.Argument(metavar="PROPOSAL…", help="One proposal, or signed copies of one.")],
    state_dir: StateDir = None,
    config: ConfigFile = None,
    network: NetworkFile = None,
    registrar: RegistrarUrl = None,
) -> None:
    """Put a proposal in force that has the signatures it needs; copies signed apart are merged."""

    from fallow.cli.council_place import place_of
    from fallow.trust.council.ceremonies import merge, publication_of
    from fallow.trust.council.files import read_proposal

    place = place_of(state_dir, config, network, registrar)
    merged = merge([read_proposal(file) for file in files])
    place.publish(publication_of(merged), time.time())
    say("It is in force. Devices follow within seconds, or at their next check.")


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    network: NetworkFile = None,
    registrar: RegistrarUrl = None,
) -> None:
    """Say what is in force, who decides, and what is halted and why. Every signature is checked on the way."""

    from fallow.cli.council_look import look
    from fallow.cli.council_place import place_of

    situation = look(place_of(state_dir, config, network, registrar))
    if as_json:
        console.print_json(data=situation.facts())
        return
    for sentence in situation.sentences():
        say(sentence)
