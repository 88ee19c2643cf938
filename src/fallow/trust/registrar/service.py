"""The registrar: admits, renews, invites, revokes, and records all of it.

Rules
- Every decision is `policy/enrolment.py`'s. Here it is asked, carried out and recorded in one transaction: an
  invitation that two come with at once is used by one of them.
- What is refused changes nothing but the journal, and that only for keys and invitations that are known, and seldom. Of
  a stranger's request the nonce is kept, until it expires within a minute. (Publications are the repository's.)
- `answer` is for requests that came from anywhere. The other methods are for whoever holds the registrar's files, who
  is recorded as `machine`.
- All methods block on the disk, and may be called from several threads and processes at once.
"""

import base64
import re
import secrets
from contextlib import AbstractContextManager
from typing import Any, Final

import msgspec
import sqlalchemy as sql

from fallow.domain.clock import Clock
from fallow.domain.credentials import PASSPORT_LIFE_S, Role
from fallow.domain.errors import FallowError, InvitationRefused, MembershipEnded, RequestRefused, TrustError
from fallow.domain.fleet import Tier
from fallow.domain.ids import NodeId
from fallow.policy.enrolment import (
    FORGOTTEN_S,
    INVITATION_LIFE_S,
    MACHINE,
    Action,
    Enrolment,
    InvitationRecord,
    Standpoint,
    Verdict,
    Weight,
    invitations_open_max,
    issue_unix_s,
    may_ask,
    may_enrol,
    may_invite,
    may_move,
    seen_unix_s,
    void_until_unix_s,
)
from fallow.trust import passports
from fallow.trust.envelope import Kind as Envelopes
from fallow.trust.envelope import unseal
from fallow.trust.registrar import database as db
from fallow.trust.registrar import departures_db
from fallow.trust.registrar.consent import NEEDED_FROM, digest_of, read_consent
from fallow.trust.registrar.invitations import as_text, new_invitation, secret_hash, secret_matches
from fallow.trust.registrar.journal import Entry, Head, Kind
from fallow.trust.registrar.journal_db import append, read, read_head
from fallow.trust.registrar.requests import (
    CELL_PATTERN,
    NAME_PATTERN,
    NONCE_LIFE_S,
    Admitted,
    Answer,
    Challenge,
    Enrol,
    Gone,
    Invite,
    Invited,
    JournalPage,
    Leave,
    ReadJournal,
    Renew,
    Request,
    Revoke,
    Withdraw,
    Withdrawn,
    new_nonce,
    nonce_expiry,
)
from fallow.trust.registrar.state import RegistrarState, read_places

REFUSALS_KEPT_PER_INVITATION: Final = 3
KEPT_EVERY_S: Final = 3600.0
"""A member that is refused, or reads the journal, again and again is recorded once an hour."""
WITHDRAWN_RECORDED_MAX: Final = 100
"""Ids in one entry."""
RETIRED_AT_ONCE_MAX: Final = 1_000
JOURNAL_PAGE_ENTRIES: Final = 200

_ACTIONS: Final[dict[type, Action]] = {
    Renew: Action.RENEW,
    Leave: Action.LEAVE,
    Invite: Action.INVITE,
    Withdraw: Action.WITHDRAW,
    Revoke: Action.REVOKE,
    ReadJournal: Action.READ_JOURNAL,
}


class Registrar:
    """One network's registrar, over its state and database."""

    def __init__(self, state: RegistrarState, database: db.RegistryDb, clock: Clock) -> None:
        self.state = state
        self._db = database
        self._clock = clock
        with database.writing() as connection:
            if read_head(connection).seq == 0:
                founded = {"network": state.digest, "name": state.network.name, "cell": state.network.cell}
                self._record(connection, Kind.NETWORK_FOUNDED, MACHINE, founded)
            kept = db.setting(connection, "nonce_key")
            if kept is None:
                kept = secrets.token_hex(32)
                db.set_setting(connection, "nonce_key", kept)
        self._nonce_key = bytes.fromhex(kept)

    # --- from anywhere --------------------------------------------------------------------------

    def challenge(self) -> Challenge:
        """A nonce for one request."""
        return Challenge(nonce=new_nonce(self._nonce_key, self._clock.unix_s()), life_s=NONCE_LIFE_S)

    def answer(self, envelope: bytes) -> Answer:
        """Do what a signed request asks. Raises `SignatureInvalid`, `RequestRefused`, `InvitationRefused`."""
        request, signer = unseal(Envelopes.REQUEST, Request, envelope)
        if request.network != self.state.digest:
            raise RequestRefused("This request is for another network.")
        now_s = self._clock.unix_s()
        expires_s = nonce_expiry(self._nonce_key, request.nonce, now_s)
        refusal: FallowError | None = None
        with self._db.writing() as connection:
            if not db.use_nonce(connection, request.nonce, expires_s, now_s):
                raise RequestRefused("This request was made before; every request needs a challenge of its own.")
            try:
                answer = self._carry_out(connection, request.action, signer, now_s)
            except TrustError as error:  # raised before anything was changed; what was recorded of it is kept
                refusal = error
        if refusal is not None:
            raise refusal
        return answer

    def _carry_out(self, connection: sql.Connection, action: Any, signer: NodeId, now_s: float) -> Answer:
        if isinstance(action, Enrol):
            return self._enrol(connection, action, signer, now_s)
        who = self._asker(connection, _ACTIONS[type(action)], signer, now_s)
        match action:
            case Renew():
                return self._admitted(connection, self._moved(connection, who, action.cell, now_s), now_s)
            case Leave():
                return self._leave(connection, who, now_s)
            case Invite():
                self._check(may_invite(Standpoint.AFAR, action.role, action.tier, action.life_s))
                return self._invite(connection, signer, action, now_s)
            case Withdraw():
                return self._withdraw(connection, signer, action.which, now_s)
            case Revoke():
                target = db.enrolment(connection, action.node)
                if target is None:
                    raise RequestRefused("Nobody with that key was admitted here.")
                return self._revoke(connection, signer, target, action.why, now_s)
            case _:
                page = tuple(read(connection, action.after_seq, JOURNAL_PAGE_ENTRIES))
                if not db.told_of_reading(connection, signer, now_s, KEPT_EVERY_S):
                    self._record(connection, Kind.JOURNAL_READ, signer, {"name": who.name})
                return JournalPage(entries=page, head=str(read_head(connection)))

    def _asker(self, connection: sql.Connection, action: Action, signer: NodeId, now_s: float) -> Enrolment:
        who = db.enrolment(connection, signer)
        verdict = may_ask(who, action, now_s)
        if who is not None and not verdict.yes:
            told = db.told_of_refusal(connection, signer, now_s, KEPT_EVERY_S)
            kind = Kind.RENEWAL_REFUSED if action is Action.RENEW else Kind.REQUEST_REFUSED
            if not told:
                body = {"name": who.name, "role": who.role, "action": action, "why": verdict.refusal}
                self._record(connection, kind, signer, body)
        self._check(verdict)
        assert who is not None
        return who

    # --- with the files in hand -----------------------------------------------------------------

    def invite(
        self,
        role: Role = Role.NODE,
        tier: Tier = Tier.KEYED,
        life_s: float = INVITATION_LIFE_S,
        name: str | None = None,
        cell: str | None = None,
    ) -> Invited:
        """Make an invitation, to the network's own cell without `cell`. Raises `RequestRefused`."""
        self._check(may_invite(Standpoint.MACHINE, role, tier, life_s))
        if name is not None and not re.search(NAME_PATTERN, name):
            raise RequestRefused(f"A name has 1 to 64 characters, all of them visible; got {name[:80]!r}.")
        if cell is not None and not re.search(CELL_PATTERN, cell):
            raise RequestRefused(f"A cell's name has 1 to 32 letters, digits, dashes and _; got {cell[:80]!r}.")
        wanted = Invite(role=role, tier=tier, life_s=life_s, name=name, cell=cell)
        with self._db.writing() as connection:
            return self._invite(connection, MACHINE, wanted, self._clock.unix_s())

    def withdraw(self, which: str) -> Withdrawn:
        """Make unused invitations void: the one of that id, or all for that name. Raises `RequestRefused`."""
        with self._db.writing() as connection:
            return self._withdraw(connection, MACHINE, which, self._clock.unix_s())

    def revoke(self, node: NodeId, why: str) -> Gone:
        """Shut a key out for good. Raises `RequestRefused` when it was never admitted."""
        with self._db.writing() as connection:
            target = db.enrolment(connection, node)
            if target is None:
                raise RequestRefused(f"Nobody with the key {node[:16]} was admitted here.")
            return self._revoke(connection, MACHINE, target, why, self._clock.unix_s())

    def reading(self) -> AbstractContextManager[sql.Connection]:
        """A consistent view of the database, for the journal's readers."""
        return self._db.reading()

    def members(self) -> list[Enrolment]:
        """Everybody who was ever admitted, oldest first."""
        with self._db.reading() as connection:
            return db.all_enrolments(connection)

    def named(self, name_or_node: str) -> list[Enrolment]:
        """Whom a person means, by name or by the first 8 or more digits of the key."""
        with self._db.reading() as connection:
            return db.enrolments_named(connection, name_or_node)

    def record(self, kind: Kind, body: dict[str, Any]) -> Entry:
        """Record what was decided elsewhere, such as by the council."""
        with self._db.writing() as connection:
            return self._record(connection, kind, MACHINE, body)

    def retire_forgotten(self) -> int:
        """Retire devices that were not seen for `FORGOTTEN_S`; how many (at most `RETIRED_AT_ONCE_MAX`)."""
        now_s = self._clock.unix_s()
        with self._db.writing() as connection:
            forgotten = db.enrolments_unseen_since(connection, now_s - FORGOTTEN_S, RETIRED_AT_ONCE_MAX)
            for who in forgotten:
                db.save_enrolment(connection, msgspec.structs.replace(who, left_unix_s=now_s))
                body = {"name": who.name, "seen_unix_s": who.seen_unix_s}
                self._record(connection, Kind.RETIRED, MACHINE, {"node": who.node} | body)
        return len(forgotten)

    def journal_head(self) -> Head:
        with self._db.reading() as connection:
            return read_head(connection)

    # --- each action, inside a transaction -------------------------------------------------------

    def _enrol(self, connection: sql.Connection, asked: Enrol, node: NodeId, now_s: float) -> Admitted:
        known = db.enrolment(connection, node)
        invitation = self._invitation(connection, asked, node)
        inviter = db.enrolment(connection, invitation.made_by)
        verdict = may_enrol(invitation, node, asked.role, known, inviter, now_s)
        if not verdict.yes:
            self._refuse_invitation(connection, asked.invitation, node, verdict.refusal or "")
        if invitation.used_by == node and known is not None:  # the answer to the first attempt was lost
            return self._admitted(connection, known, now_s)
        consent = None
        if asked.role in NEEDED_FROM:
            if asked.consent is None:
                raise RequestRefused(f"A {asked.role} is admitted with its owner's consent, and none came.")
            consent = digest_of(read_consent(asked.consent, node, self.state.digest, asked.role).words)
        if not db.use_invitation(connection, asked.invitation, node):
            raise InvitationRefused("This invitation was used already; each is for one device. Ask for another.")
        who = Enrolment(
            node=node,
            role=invitation.role,
            tier=invitation.tier,
            name=invitation.name or asked.name,
            cell=invitation.cell,
            enrolled_unix_s=now_s,
            seen_unix_s=seen_unix_s(known, now_s),
            consent=consent,
        )
        if known is not None and known.left_unix_s is not None:
            void_s = max(known.left_unix_s, departures_db.void_unix_s(connection, node) or 0.0)
            departures_db.readmit(connection, node, void_s)
            departures_db.raise_revocations_sequence(connection, now_s)
        self._record_enrolment(connection, who, known, asked)
        return self._admitted(connection, who, now_s)

    def _invitation(self, connection: sql.Connection, asked: Enrol, node: NodeId) -> InvitationRecord:
        found = db.invitation(connection, asked.invitation)
        if found is None:
            raise InvitationRefused("This network knows no such invitation.")
        record, kept = found
        if not secret_matches(asked.secret, kept):
            self._refuse_invitation(connection, asked.invitation, node, "It came with a wrong secret.")
        return record

    def _refuse_invitation(self, connection: sql.Connection, id_: str, node: NodeId, why: str) -> None:
        if db.count_refusal(connection, id_, REFUSALS_KEPT_PER_INVITATION):
            self._record(connection, Kind.INVITATION_REFUSED, node, {"invitation": id_, "why": why})
        raise InvitationRefused(why)

    def _record_enrolment(
        self, connection: sql.Connection, who: Enrolment, before: Enrolment | None, asked: Enrol
    ) -> None:
        body = {"name": who.name, "tier": who.tier.name.lower(), "cell": who.cell}
        self._record(connection, Kind.INVITATION_USED, who.node, {"invitation": asked.invitation})
        if who.consent is not None and asked.consent is not None:
            signed = base64.b64encode(asked.consent).decode()
            self._record(connection, Kind.CONSENT_GIVEN, who.node, {"words": who.consent, "envelope": signed})
        self._record(connection, Kind.ENROLLED, who.node, body | {"again": before is not None})
        self._record(
            connection, Kind.ROLE_GRANTED, MACHINE, {"node": who.node, "role": who.role, "invitation": asked.invitation}
        )

    def _admitted(self, connection: sql.Connection, who: Enrolment, now_s: float) -> Admitted:
        """Keep the member as seen, and give it a passport; a revocation counts from that one's time on."""
        issued_s = issue_unix_s(departures_db.void_unix_s(connection, who.node), now_s)
        who = msgspec.structs.replace(who, seen_unix_s=seen_unix_s(who, issued_s))
        db.save_enrolment(connection, who)
        presence = None
        if who.role is Role.COORDINATOR:
            presence = passports.issue_presence(
                self.state.system, node=who.node, account=self.state.account.node, issued_unix_s=issued_s
            )
        return Admitted(
            passport=passports.issue(
                self.state.account,
                node=who.node,
                role=who.role,
                tier=who.tier,
                cell=who.cell,
                name=who.name,
                issued_unix_s=issued_s,
            ),
            issued_unix_s=issued_s,
            expires_unix_s=issued_s + PASSPORT_LIFE_S,
            places=read_places(self.state.paths),
            list_sequence=departures_db.revocations_sequence(connection),
            journal_head=str(read_head(connection)),
            system_passport=presence,
        )

    def _moved(self, connection: sql.Connection, who: Enrolment, cell: str | None, now_s: float) -> Enrolment:
        """The member in the cell that it chose, which devices may: the nearest."""
        if cell is None or cell == who.cell:
            return who
        self._check(may_move(who, cell, {self.state.network.cell, *db.all_cells(connection)}, now_s))
        self._record(connection, Kind.CELL_CHANGED, who.node, {"name": who.name, "from": who.cell, "to": cell})
        return msgspec.structs.replace(who, cell=cell, moved_unix_s=now_s)

    def _leave(self, connection: sql.Connection, who: Enrolment, now_s: float) -> Gone:
        db.save_enrolment(connection, msgspec.structs.replace(who, left_unix_s=void_until_unix_s(who, now_s)))
        departures_db.raise_revocations_sequence(connection, now_s)
        self._record(connection, Kind.LEFT, who.node, {"name": who.name})
        return Gone(node=who.node, name=who.name)

    def _invite(self, connection: sql.Connection, by: str, asked: Invite, now_s: float) -> Invited:
        urls = read_places(self.state.paths).registrar_urls
        if not urls:
            raise RequestRefused(
                "The registrar has not run yet, so that nobody could reach it: start `fallow up` first."
            )
        if db.open_invitations(connection, by, now_s) >= (open_max := invitations_open_max(by)):
            raise RequestRefused(
                f"You have {open_max} open invitations already: withdraw some (`fallow invite --withdraw`)."
            )
        invitation = new_invitation(urls, self.state.digest, asked.role, now_s + asked.life_s)
        record = InvitationRecord(
            id=invitation.id.hex(),
            role=asked.role,
            tier=asked.tier,
            name=asked.name,
            cell=asked.cell or self.state.network.cell,
            made_by=by,
            made_unix_s=now_s,
            expires_unix_s=now_s + asked.life_s,
        )
        db.add_invitation(connection, record, secret_hash(invitation.secret))
        body = {"invitation": record.id, "role": asked.role, "tier": asked.tier.name.lower(), "name": asked.name}
        body["cell"] = record.cell
        self._record(connection, Kind.INVITATION_MADE, by, body | {"expires_unix_s": record.expires_unix_s})
        return Invited(text=as_text(invitation), expires_unix_s=record.expires_unix_s)

    def _withdraw(self, connection: sql.Connection, by: str, which: str, now_s: float) -> Withdrawn:
        found = db.withdraw_invitations(connection, which, now_s)
        if not found:
            raise RequestRefused(f"No unused invitation has that id or is for that name: {which[:80]!r}.")
        body = {"count": len(found), "invitations": found[:WITHDRAWN_RECORDED_MAX]}
        self._record(connection, Kind.INVITATION_WITHDRAWN, by, body)
        return Withdrawn(invitations=tuple(found))

    def _revoke(self, connection: sql.Connection, by: str, target: Enrolment, why: str, now_s: float) -> Gone:
        if target.revoked_unix_s is None:
            void_s = void_until_unix_s(target, now_s)
            db.save_enrolment(connection, msgspec.structs.replace(target, revoked_unix_s=void_s, revoked_why=why))
            departures_db.raise_revocations_sequence(connection, now_s)
            body = {"node": target.node, "name": target.name, "role": target.role, "why": why}
            self._record(connection, Kind.REVOKED, by, body)
        return Gone(node=target.node, name=target.name)

    def _record(self, connection: sql.Connection, kind: Kind, who: str, body: dict[str, Any]) -> Entry:
        return append(connection, self._clock.unix_s(), kind, who, body)

    @staticmethod
    def _check(verdict: Verdict) -> None:
        if verdict.refusal is not None:
            ended = verdict.weight is Weight.FOR_GOOD
            raise (MembershipEnded if ended else RequestRefused)(verdict.refusal)
