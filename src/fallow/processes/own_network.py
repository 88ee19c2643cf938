"""What `fallow up` has of its own network: the founded keys, where it is reached, and leave for its own processes.

Rules
- Its processes are admitted as everybody is, by an invitation that is used once; they get it in their environment, and
  only while they have no membership yet.
- The console of this machine (`fallow status` and its like) is a member as well, with the role of an operator.
"""

from pathlib import Path
from typing import Final

from fallow import wiring
from fallow.config import Config
from fallow.domain.credentials import Role
from fallow.fabric.broker_config import BusTrust
from fallow.processes.founding import ensure_network
from fallow.processes.party import CONSOLE
from fallow.processes.registrar import answering, settle
from fallow.processes.supervisor import Tell
from fallow.trust import membership
from fallow.trust.registrar import invitations
from fallow.trust.registrar.database import open_database
from fallow.trust.registrar.service import Registrar
from fallow.trust.registrar.word import RegistrarWord
from fallow.trust.registrar_client import met

READY_LIMIT_S: Final = 30.0
INVITATION_LIFE_S: Final = 600.0
INVITATION: Final = "FALLOW_TRUST_INVITATION"


class OwnNetwork:
    """The network of a state folder, on the machine that holds its keys."""

    def __init__(self, config: Config, tell: Tell) -> None:
        """Founds it when there is none. Raises `ConfigError`."""
        self._config = config
        self.state = ensure_network(config, tell)
        database = open_database(self.state.paths.database)
        self._registrar = Registrar(self.state, database, wiring.clock())
        self._word = RegistrarWord(self.state, database, wiring.clock())

    def bus_trust(self) -> BusTrust:
        """For the control bus's server. Raises `BusUnavailable` when the registrar's database cannot be used."""
        return self._word.bus_trust()

    def announce(self, bus_url: str) -> None:
        """Say where the network is reached from now on, and settle the registrar's port. Raises `ConfigError`."""
        settle(self._config, bus_url)

    def leave_for(self, role: Role, folder: Path, name: str) -> dict[str, str]:
        """What a process of ours has in its environment: an invitation, or none when it is a member. One that is in the
        settings of who started us is for a device of theirs, and not for these.

        Raises `ConfigError` for a folder that holds a membership of another network: this one was founded anew.
        """
        membership.require_network(folder, self.state.digest)
        if membership.is_member(folder):
            return {INVITATION: ""}
        return {INVITATION: self._registrar.invite(role=role, life_s=INVITATION_LIFE_S, name=name).text}

    async def wait_until_up(self) -> None:
        """Raises `RegistrarUnavailable` when the registrar does not answer in `READY_LIMIT_S`."""
        await answering(self._config, READY_LIMIT_S)

    async def admit_console(self) -> None:
        """Make the person at this machine a member, once."""
        folder = self._config.state_dir / CONSOLE
        if membership.is_member(folder):
            return
        invited = self._registrar.invite(role=Role.OPERATOR, life_s=INVITATION_LIFE_S, name=CONSOLE)
        invitation = invitations.from_text(invited.text)
        asked = membership.enrolment_of(invitation, CONSOLE, None)
        known = met(self.state.network_json)
        who = wiring.identity(folder)
        member = await membership.enrol(folder, who, known, invitation, asked, wiring.clock())
        await member.close()
