"""`fallow leave`: how an owner ends a device's membership, in the order in which nobody is hurt.

Rules
- The registrar must answer before anything is touched: a device that cannot be struck off goes on as before.
- Then the device that runs here says goodbye: its running answers move to other devices, and it ends. Only then is it
  struck off, by which its passport is void at once: the bus would cut it, and peers drop it, in the middle of its work.
- No device starts here meanwhile: its folder is held.
- Whatever fails, the owner is told what happened and what did not.
"""

import asyncio
import os
import signal
from typing import Final

from fallow import wiring
from fallow.config import Config
from fallow.domain.errors import ConfigError, MembershipEnded, RegistrarUnavailable
from fallow.processes.lock import hold, holder
from fallow.processes.supervisor import Tell
from fallow.trust import membership
from fallow.trust.membership import Membership

GOODBYE_LIMIT_S: Final = 30.0
"""For the device that runs: its own limit for leaving politely, and a while to close what it has open."""
POLL_S: Final = 0.1


async def leave(config: Config, tell: Tell) -> None:
    """End the membership of this machine's device. Raises `ConfigError`, `TrustError`."""
    folder = config.device_dir
    try:
        member = membership.load(folder, wiring.identity(folder), wiring.clock())
    except PermissionError as error:
        raise _another_users(config, f"{folder} is another user's") from error
    try:
        await _reach(member)
        stopped = await _say_goodbye(config, tell)
        with hold(folder):
            await _strike_off(member, stopped, tell)
    finally:
        await member.close()


def _another_users(config: Config, what: str) -> ConfigError:
    return ConfigError(
        f"{what}, and nothing was changed. Leave as that user (`sudo -u USER fallow leave --state-dir "
        f"{config.state_dir}`), or as root."
    )


async def _reach(member: Membership) -> None:
    try:
        await member.reach()
    except RegistrarUnavailable as error:
        raise RegistrarUnavailable(
            f"{error.message} Nothing was changed: this device is still a member, and goes on if it runs. Try again "
            "when the registrar can be reached. To stop lending now, end `fallow join` (Ctrl-C): that needs nobody."
        ) from None


async def _say_goodbye(config: Config, tell: Tell) -> bool:
    """End the device that runs here, politely. Whether there was one."""
    running = holder(config.device_dir)
    if running is None:
        return False
    tell("The device says goodbye: running answers move to other devices first.")
    try:
        os.kill(running, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it ended meanwhile
    except PermissionError as error:
        raise _another_users(config, f"The device (process {running}) runs as another user") from error
    deadline_s = asyncio.get_running_loop().time() + GOODBYE_LIMIT_S
    while holder(config.device_dir) == running:
        if asyncio.get_running_loop().time() > deadline_s:
            raise ConfigError(
                f"The device (process {running}) was asked to leave and did not end within {GOODBYE_LIMIT_S:g} s. It "
                "is still a member: end that process, and try again."
            )
        await asyncio.sleep(POLL_S)
    if holder(config.device_dir) is not None:
        raise ConfigError("The device was started again at once: end what looks after it first. It is still a member.")
    return True


async def _strike_off(member: Membership, stopped: bool, tell: Tell) -> None:
    name, folder = member.network.name, member.folder
    try:
        await member.leave()
    except MembershipEnded as error:
        tell(f"The membership in {name!r} had ended before. {error.message}")
    except RegistrarUnavailable as error:
        device = "The device was stopped and lends nothing now." if stopped else "The device does not run."
        raise RegistrarUnavailable(
            f"{error.message} {device} Whether its membership has ended is not known: if not, its passport is good for "
            "the rest of its hour. Try again when the registrar can be reached."
        ) from None
    else:
        tell(f"This device has left {name!r}: nothing that it was given there is good any more.")
    tell(f"Delete {folder} to remove everything that Fallow kept for it.")
