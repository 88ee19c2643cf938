"""The registrar's word to the bus and to everybody: who was revoked, and its own credentials to say so.

Rules
- The list of revocations carries the registrar's signature and a number that rises; the bus account's JWT carries the
  same revocations for the server. What is older than `REVOCATION_KEPT_S` matters to nobody: passports live an hour.
- Why somebody was revoked is in the journal, and told to nobody else: it may be about a person.
- The account's JWT never seems older than one that was made before, whatever the clock does.
- The registrar may speak in every cell of its network, and hears nothing but hellos and halts.
"""

from typing import Final

from fallow.domain.clock import Clock
from fallow.domain.credentials import Revocation, RevocationList, Role
from fallow.domain.fleet import Subjects, Tier
from fallow.domain.network import BUS_NAME
from fallow.fabric.broker_config import BusTrust
from fallow.policy.bus_rights import BusRights, inbox
from fallow.policy.enrolment import REVOCATION_KEPT_S
from fallow.trust import jwt, passports
from fallow.trust.certificates import server_certificate
from fallow.trust.envelope import Kind, seal
from fallow.trust.registrar import database as db
from fallow.trust.registrar.state import RegistrarState

REVOCATIONS_LISTED_MAX: Final = 1_000
"""On the list for everybody, newest first. The bus is told all of them."""


class RegistrarWord:
    """What one network's registrar says. Its methods block on the disk."""

    def __init__(self, state: RegistrarState, database: db.RegistryDb, clock: Clock) -> None:
        self.state = state
        self._db = database
        self._clock = clock

    def sequence(self) -> int:
        """Rises with everything that changes the list of revocations. Cheap: asked often."""
        with self._db.reading() as connection:
            return int(db.setting(connection, "revocations") or 0)

    def revocations(self) -> bytes:
        """An envelope of the present `RevocationList`."""
        with self._db.reading() as connection:
            sequence = int(db.setting(connection, "revocations") or 0)
            revoked = db.enrolments_revoked_since(connection, self._clock.unix_s() - REVOCATION_KEPT_S)
        told = tuple(
            Revocation(node=who.node, revoked_unix_s=who.revoked_unix_s or 0.0, why="")
            for who in revoked[:REVOCATIONS_LISTED_MAX]
        )
        body = RevocationList(sequence=sequence, cell=self.state.network.cell, revocations=told)
        return seal(Kind.REVOCATIONS, body, self.state.identity)

    def cells(self) -> tuple[str, ...]:
        """Every cell that somebody is in, the network's own first."""
        own = self.state.network.cell
        with self._db.reading() as connection:
            return (own, *(cell for cell in db.all_cells(connection) if cell != own))

    def account_jwt(self) -> str:
        """The bus account with every revocation that still matters."""
        now_s = self._clock.unix_s()
        with self._db.writing() as connection:
            # Whole seconds count in a JWT, and a server that starts between two of one second may take either.
            issued_s = max(now_s, float(db.setting(connection, "account_issued") or 0.0) + 1.0)
            db.set_setting(connection, "account_issued", repr(issued_s))
            revoked = db.enrolments_revoked_since(connection, now_s - REVOCATION_KEPT_S)
        return jwt.account_jwt(
            self.state.operator,
            self.state.account.node,
            name=self.state.network.name,
            issued_unix_s=issued_s,
            revoked={who.node: who.revoked_unix_s or 0.0 for who in revoked},
        )

    def bus_trust(self) -> BusTrust:
        """What the bus's server is given when it starts. No key that signs is in it."""
        now_s = self._clock.unix_s()
        state = self.state
        certificate = server_certificate(state.authority, BUS_NAME, now_s)
        return BusTrust(
            operator_jwt=jwt.operator_jwt(
                state.operator, system=state.system.node, name=state.network.name, issued_unix_s=now_s
            ),
            account=state.network.account,
            account_jwt=self.account_jwt(),
            system_account=jwt.account_nkey(state.system.node),
            system_account_jwt=jwt.system_account_jwt(
                state.operator, state.system.node, name="system", issued_unix_s=now_s
            ),
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

    @property
    def authority_pem(self) -> str:
        return self._word.state.network.authority_pem


class ClaimsCredentials(OwnCredentials):
    """The same for the system account."""

    @property
    def passport(self) -> str:
        return self._word.claims_passport()
