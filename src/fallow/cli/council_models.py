"""`fallow council sign-model` and `withdraw-model`: a publisher's work from any machine."""

import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from fallow.cli.council_seats import NetworkFile, RegistrarUrl, Yes
from fallow.cli.options import ConfigFile, StateDir, say
from fallow.domain.errors import ConfigError
from fallow.domain.ids import Digest

if TYPE_CHECKING:
    from fallow.cli.council_place import Place
    from fallow.trust.council.publication import InForce
    from fallow.trust.keys import Identity

_DIGEST = re.compile(r"[0-9a-f]{64}")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name in this machine's store, or its digest.")]


def sign_model(
    model: Model,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    network: NetworkFile = None,
    registrar: RegistrarUrl = None,
) -> None:
    """Vouch for a model in this machine's store with this machine's publisher key: devices may load it.

    It goes onto this publisher's own list, and makes that last for another year. On the machine that runs `fallow up`,
    `fallow model add` does this by itself.
    """
    from fallow.cli.council_place import place_of
    from fallow.models.store import Store
    from fallow.trust.council import tuf_format as tuf
    from fallow.trust.council.lists import listing

    place = place_of(state_dir, config, network, registrar)
    digest = _digest(place, model)
    manifest = Store(place.paths.state / "models").manifest_bytes(digest)
    state, publisher = _ready(place)
    now_s = time.time()
    place.publish(listing(state, tuf.MODELS, {digest: manifest}, publisher, now_s), now_s)
    say(f"Signed {digest}. Devices may load it within seconds, or from their next check on.")


def withdraw_model(
    model: Model,
    yes: Yes = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    network: NetworkFile = None,
    registrar: RegistrarUrl = None,
) -> None:
    """Take a model off this machine's publisher's own list: devices load it no more, and drop it.

    Where another publisher signed it as well, it stays until they withdraw it, too.
    """
    from fallow.cli.council_place import confirmed, place_of
    from fallow.trust.council import tuf_format as tuf
    from fallow.trust.council.lists import delisting, signers_of

    place = place_of(state_dir, config, network, registrar)
    digest = _digest(place, model)
    state, publisher = _ready(place)
    now_s = time.time()
    publication = delisting(state, tuf.MODELS, digest, publisher, now_s)
    others = [role for role in signers_of(state, tuf.MODELS, digest) if role not in publication.delegated]
    if not others:
        confirmed(f"Every device drops the model {digest[:16]}… and the sessions that use it. Withdraw it?", yes)
    place.publish(publication, now_s)
    say(f"Withdrew {digest}.")
    if others:
        say(f"Devices go on loading it, since {', '.join(others)} lists it, too.")


def _ready(place: "Place") -> "tuple[InForce, Identity]":
    from fallow.trust.council.files import in_force_of
    from fallow.trust.keys import load

    try:
        publisher = load(place.paths.publisher_key)
    except FileNotFoundError:
        raise ConfigError(
            "This machine has no publisher's key. `fallow council key --publisher` makes one, and `fallow council "
            "propose --publisher` asks the council to let it publish."
        ) from None
    return in_force_of(place.base()), publisher


def _digest(place: "Place", model: str) -> Digest:
    from fallow.models.store import Store

    if _DIGEST.fullmatch(model):
        return Digest(model)
    digest, _ = Store(place.paths.state / "models").by_name(model)
    return Digest(digest)
