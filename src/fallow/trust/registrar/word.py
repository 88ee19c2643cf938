"""The registrar's word to the bus and to everybody: who was revoked or left, where the network is, and its own
credentials to say so.

Rules
- The list of revocations carries the registrar's signature, its time and a number that rises. What is older than
  `REVOCATION_KEPT_S` matters to nobody: passports live an hour.
- The JWTs of the bus's accounts, the fleet's and the system's, carry revocations for the server: of who left, those of
  the last two hours (`policy/enrolment.py`). Both have room for so many; who was shut out comes before who left, so
  that leavers keep no revocation from anybody.
- Why somebody was revoked is in the journal, and told to nobody else: it may be about a person.
- The list says where the network is, too: members that cannot reach the registrar any more hear it on the bus. Who they
  find there must still show a certificate of the network's authority.
- An account's JWT never seems older than one that was made before, whatever the clock does, and no list older than
  the newest of those.
- The registrar may speak in every cell of its network, and hears nothing but hellos and halts.
"""

from typing import Final

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.credentials import RevocationList, Role
from fallow.domain.fleet import Subjects, Tier
from fallow.domain.network import BUS_NAME
from fallow.fabric.broker_config import BusTrust
from fallow.policy.bus_rights import BusRights, inbox
from fallow.policy.enrolment import REVOCATION_KEPT_S, bus_since_unix_s
from fallow.trust import jwt, passports
from fallow.trust.certificates import server_certificate
from fallow.trust.envelope import Kind, seal
from fallow.trust.registrar import database as db
from fallow.trust.registrar import departures_db
from fallow.trust.registrar.state import NO_PLACES, RegistrarState, read_places

REVOCATIONS_LISTED_MAX: Final = 1_000
"""On the list for everybody."""
REVOCATIONS_ON_BUS_MAX: Final = 8_000
"""In an account's JWT, which goes to the server in one message of up to 1 MiB: some 95 bytes each."""


class RegistrarWord:
    """What one network's registrar says. Its methods block on the disk."""

    def __init__(self, state: RegistrarState, database: db.RegistryDb, clock: Clock) -> None:
        self.state = state
        self._db = database
        self._clock = clock

    def sequence(self) -> int:
        """Rises with everything that changes the list of revocations. Cheap: asked often."""
        with self._db.reading() as connection:
            return departures_db.revocations_sequence(connection)

    def revocations(self) -> bytes:
        """An envelope of the present `RevocationList`."""
        now_s = self._clock.unix_s()
        with self._db.reading() as connection:
            sequence = departures_db.revocations_sequence(connection)
            issued_s = max(now_s, float(db.setting(connection, "account_issued") or 0.0))
            found = departures_db.departures(connection, now_s - REVOCATION_KEPT_S, now_s - REVOCATION_KEPT_S)
        places = read_places(self.state.paths)
        body = RevocationList(
            sequence=sequence,
            issued_unix_s=issued_s,
            cell=self.state.network.cell,
            revocations=tuple(found[:REVOCATIONS_LISTED_MAX]),
            places=None if places == NO_PLACES else places,
        )
        return seal(Kind.REVOCATIONS, body, self.state.identity)

    def tell_places(self) -> None:
        """Have everybody told where the network is, if that is elsewhere than they were told last."""
        places = msgspec.json.encode(read_places(self.state.paths)).decode()
        with self._db.writing() as connection:
            if db.setting(connection, "places") != places:
                db.set_setting(connection, "places", places)
                departures_db.raise_revocations_sequence(connection, self._clock.unix_s())

    def cells(self) -> tuple[str, ...]:
        """Every cell that somebody is in, the network's own first."""
        own = self.state.network.cell
        with self._db.reading() as connection:
            return (own, *(cell for cell in db.all_cells(connection) if cell != own))

    def accounts(self) -> dict[str, str]:
        """The JWTs of the bus's accounts by their public nkeys, the fleet's first, with every revocation that still
        matters to it, as far as there is room."""
        now_s, state = self._clock.unix_s(), self.state
        with self._db.writing() as connection:
            # Whole seconds count in a JWT, and a server that starts between two of one second may take either.
            issued_s = max(now_s, float(db.setting(connection, "account_issued") or 0.0) + 1.0)
            db.set_setting(connection, "account_issued", repr(issued_s))
            since = bus_since_unix_s(departures_db.last_revoked_unix_s(connection), now_s)
            found = departures_db.departures(connection, *since)
        revoked = {each.node: each.revoked_unix_s for each in found[:REVOCATIONS_ON_BUS_MAX]}
        fleet = jwt.account_jwt(
            state.operator, state.account.node, name=state.network.name, issued_unix_s=issued_s, revoked=revoked
        )
        system = jwt.system_account_jwt(
            state.operator, state.system.node, name="system", issued_unix_s=issued_s, revoked=revoked
        )
        return {state.network.account: fleet, jwt.account_nkey(state.system.node): system}

    def bus_trust(self) -> BusTrust:
        """What the bus's server is given when it starts. No key that signs is in it."""
        now_s = self._clock.unix_s()
        state = self.state
        certificate = server_certificate(state.authority, BUS_NAME, now_s)
        accounts, system = self.accounts(), jwt.account_nkey(state.system.node)
        return BusTrust(
            operator_jwt=jwt.operator_jwt(
                state.operator, system=state.system.node, name=state.network.name, issued_unix_s=now_s
            ),
            account=state.network.account,
            account_jwt=accounts[state.network.account],
            system_account=system,
            system_account_jwt=accounts[system],
            certificate_pem=certificate.certificate_pem,
            key_pem=certificate.key_pem,
        )

    def passport(self) -> str:
        """The registrar's own, made now: for the bus, in every cell."""
        node, everywhere = self.state.identity.node, Subjects("*")
        rights = BusRights(
            publish=(everywhere.revocations, everywhere.halt, everywhere.charter),
            subscribe=(everywhere.halt, everywhere.hello, f"{inbox(node)}.>"),
        )
        return passports.issue(
            self.state.account,
            node=node,
            role=Role.REGISTRAR,
            tier=Tier.KEYED,
            cell=self.state.network.cell,
            name="registrar",
            issued_unix_s=self._clock.unix_s(),
            rights=rights,
        )

    def claims_passport(self) -> str:
        """The registrar's leave to bring the bus a newer account."""
        return passports.issue_claims(
            self.state.system,
            node=self.state.identity.node,
            account=self.state.account.node,
            issued_unix_s=self._clock.unix_s(),
        )


class OwnCredentials:
    """The registrar's `BusCredentials`: a passport that is made anew whenever it is asked for."""

    def __init__(self, word: RegistrarWord) -> None:
        self._word = word

    @property
    def passport(self) -> str:
        return self._word.passport()

    def sign(self, nonce: bytes) -> bytes:
        return self._word.state.identity.sign_nonce(nonce)

    def refused(self) -> None:
        """The next is made anew in any case."""

    @property
    def authority_pem(self) -> str:
        return self._word.state.network.authority_pem


class ClaimsCredentials(OwnCredentials):
    """The same for the system account."""

    @property
    def passport(self) -> str:
        return self._word.claims_passport()
