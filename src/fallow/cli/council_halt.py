"""`fallow council halt` and `obey`: stop a network with one key, by every way that there is.

Rules
- A halt goes by two ways at once: to the registrar, and over the control bus with this machine's console. Each way's
  outcome is said; what the bus carried is known by hearing it back.
- Where neither works, the halt is a text. `--deliver` brings it to the registrar from elsewhere; `obey` brings it to
  the devices of a machine, past every server.
- A halt that does not hold, by what a device last verified itself, is not obeyed.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fallow.cli.council_seats import NetworkFile, RegistrarUrl, Yes
from fallow.cli.options import ConfigFile, StateDir, notes, say, settings
from fallow.cli.plain import one_line
from fallow.domain.errors import (
    CharterInvalid,
    CharterUnavailable,
    ConfigError,
    FallowError,
    RegistrarUnavailable,
    SignatureInvalid,
)

if TYPE_CHECKING:
    from fallow.cli.council_place import Place
    from fallow.config import Config

OFFLINE_EPOCHS: Final = 16
"""A halt made without seeing the newest policy names an epoch so far above the last one seen: it must not miss it."""
BUS_LIMIT_S: Final = 10.0
"""For reaching the control bus and hearing the halt back."""
PROCESS_FOLDERS: Final = ("device", "gateway", "nodes/*/device", "coordinators/*")
"""Where the processes of a machine keep what they know, below the state folder."""


def halt(
    why: Annotated[str, typer.Option("--why", help="For everybody who finds their device stopped.")] = "",
    deliver: Annotated[str | None, typer.Option("--deliver", help="Bring a halt that came as text.")] = None,
    yes: Yes = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    network: NetworkFile = None,
    registrar: RegistrarUrl = None,
) -> None:
    """Stop the network: your key alone is enough. It stays stopped until the council together resumes.

    It goes to the registrar, and over the control bus where this machine is an operator's. It is also printed, so that
    it can be carried by any way: `fallow council halt --deliver TEXT` on a machine that reaches the registrar, or
    `fallow council obey TEXT` on a device.
    """
    from fallow.cli.council_place import confirmed, place_of
    from fallow.trust.council.files import member_of
    from fallow.trust.council.halts import halt_of_text, halt_text, seal_halt

    place = place_of(state_dir, config, network, registrar)
    loaded = settings(config, {"state_dir": state_dir}).config
    if deliver is not None:
        _send(place, loaded, halt_of_text(deliver))
        say("If its signer is in the council, the network stops.")
        return
    if not 1 <= len(why.strip()) <= 1000:
        raise ConfigError("Say --why in up to 1000 characters: it is what people read when their devices stop.")
    own = member_of(place.paths)
    digest, epoch = _what_to_halt(place)
    confirmed("This stops every device of the network. Only the council together can resume. Halt?", yes)
    envelope = seal_halt(own, digest, epoch, why.strip(), time.time())
    say(halt_text(envelope))
    _send(place, loaded, envelope)
    say("Halted. Devices that hear of it stop at once, those that are cut off when their lease ends.")


def obey(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What `fallow council halt` printed: fallow-halt-…")],
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Stop this machine's devices by a halt that came as text, whatever the registrar and the bus keep from them.

    It is checked against the council that each of them last verified, and lies on their disks from then on. A process
    that runs obeys at its next check of the council's repository, and at its next start before anything else.
    """
    from fallow.trust.council.halts import halt_of_text

    envelope = halt_of_text(text)
    state = settings(config, {"state_dir": state_dir}).config.state_dir
    folders = [folder for pattern in PROCESS_FOLDERS for folder in sorted(state.glob(pattern))]
    whys: list[str] = []
    refusal: SignatureInvalid | None = None
    for folder in folders:
        try:
            why = _obey_in(folder, envelope)
        except SignatureInvalid as error:
            refusal = error
        else:
            whys += [why] if why is not None else []
    if not whys and refusal is not None:
        raise refusal
    if not whys:
        raise ConfigError(
            f"No device in {state} has verified its network's council yet, so that none can tell whose halt this is. "
            "(None of them works before it has.)"
        )
    say(f"{len(whys)} of this machine's processes will obey: {one_line(whys[0])}")
    say("One that runs stops within a quarter of a lease (two and a half minutes, usually). To stop it now, end it:")
    say("when it starts again, it is halted.")


def _obey_in(folder: Path, envelope: bytes) -> str | None:
    """Why that process stops; `None` when it knows no council. Raises `SignatureInvalid` for what does not hold."""
    from fallow.policy.council import halt_holds
    from fallow.trust.council.client import last_known
    from fallow.trust.council.halts import HaltBook, read_halt
    from fallow.trust.registrar.state import NETWORK_FILE, digest_of

    known = last_known(folder / "charter")
    if known is None or not (folder / NETWORK_FILE).is_file():
        return None
    council, epoch = known
    network = digest_of((folder / NETWORK_FILE).read_bytes())
    found, signer = read_halt(envelope, network)
    if not halt_holds(found, signer, council.values(), network, epoch):
        raise SignatureInvalid(
            f"This halt does not hold: {signer[:16]}… is not in the council, or the council resumed since."
        )
    HaltBook(folder / "halts", network).add(envelope, council, epoch)
    return found.why


def _send(place: "Place", config: "Config", envelope: bytes) -> None:
    """By both ways at once. Raises `RegistrarUnavailable` when neither worked."""
    ways: dict[str, Callable[[], None]] = {
        "the registrar": lambda: place.post_halt(envelope),
        "the control bus": lambda: asyncio.run(_over_the_bus(config, envelope)),
    }
    with ThreadPoolExecutor(len(ways)) as pool:
        under_way = {name: pool.submit(way) for name, way in ways.items()}
    refusals: dict[str, str] = {}
    for name, future in under_way.items():
        try:
            future.result()
        except SignatureInvalid:
            raise
        except FallowError as error:
            refusals[name] = error.message
        else:
            say(f"✓ {name} has it.")
    if len(refusals) == len(ways):
        raise RegistrarUnavailable(
            f"The halt was signed, but not delivered ({' '.join(refusals.values())}). Carry its text to a machine that "
            "reaches the registrar, and run `fallow council halt --deliver TEXT` there; or to each device, and run "
            "`fallow council obey TEXT`."
        )
    for name, why in refusals.items():
        notes.print(f"✗ Not by {name}: {one_line(why)}", soft_wrap=True)


async def _over_the_bus(config: "Config", envelope: bytes) -> None:
    """Publish it as this machine's console, and hear it back. Raises `ConfigError`, `TrustError`, `FabricError`."""
    from fallow.domain.errors import BusUnavailable
    from fallow.processes.party import open_console

    heard = asyncio.Event()

    async def on_halt(_: str, message: bytes) -> None:
        if message == envelope:
            heard.set()

    try:
        async with asyncio.timeout(BUS_LIMIT_S):
            bus, subjects = await open_console(config)
            try:
                await bus.subscribe(subjects.halt, on_halt)
                await bus.publish(subjects.halt, envelope)
                await heard.wait()
            finally:
                await bus.close()
    except TimeoutError:
        raise BusUnavailable(
            "the control bus did not carry it: it is away, or this machine's console is not an operator's"
        ) from None


def _what_to_halt(place: "Place") -> tuple[str, int]:
    """The network, and an epoch that its policy does not exceed."""
    from fallow.trust.council.pins import pin_of
    from fallow.trust.council.proposals import verify_base

    pin = pin_of(place.paths)
    digest = place.network or (pin.network if pin is not None else "")
    if not digest:
        raise ConfigError("This machine does not know the network's description: name it with --network FILE.")
    try:
        return digest, verify_base(place.base())[2].epoch
    except (CharterUnavailable, CharterInvalid, ConfigError):
        epoch = (pin.epoch if pin is not None else 0) + OFFLINE_EPOCHS
        notes.print(f"The policy in force cannot be seen from here; the halt is made for epochs up to {epoch}.")
        return digest, epoch
