"""Passports: issued by the registrar with the account's key, read by everybody who pins that account.

Rules
- A passport is the NATS user JWT of `jwt.py` with three tags: role, tier and cell. Nothing else may stand among them.
- What was verified once is remembered by its whole text, in a bounded cache, so that a repeat costs no signature. Time
  and revocations are looked at on every reading.
- Revocations come as a whole list, signed by the registrar, and only a newer one is taken that was issued within the
  last `REVOCATION_KEPT_S`: an old one, played to who has heard none, shuts nobody out.
- That a key was revoked is kept for `REVOCATION_KEPT_S` from when it was heard last, even if a newer list leaves it
  out, or says less of it: a list has no room for more than so many, and a registrar whose database was restored has
  forgotten some.
- That a key left holds until a newer list leaves it out or says that it was admitted again: it may be back. Its earlier
  passports stay void, for `REVOCATION_KEPT_S`.
"""

from collections import OrderedDict
from typing import Final, NamedTuple

import msgspec

from fallow.domain.clock import Clock
from fallow.domain.credentials import PASSPORT_GRACE_S, PASSPORT_LIFE_S, Departure, Passport, RevocationList, Role
from fallow.domain.errors import PassportRefused, RequestRefused, SignatureInvalid
from fallow.domain.fleet import Tier
from fallow.domain.ids import NodeId
from fallow.domain.network import Network
from fallow.policy.bus_rights import BusRights, claims_rights, presence_rights, rights_of
from fallow.policy.enrolment import REVOCATION_KEPT_S
from fallow.trust import envelope
from fallow.trust.jwt import NAME_CHARS_MAX, account_nkey, peek, read_user, user_jwt
from fallow.trust.keys import Identity

VERIFIED_MAX: Final = 4096
"""Passports remembered as well signed: twice a large cell's devices and gateways."""

REVOCATIONS_KEPT_MAX: Final = 10_000
"""Revoked keys remembered; of more, those heard of longest ago go."""

_TIERS: Final = {str(int(tier)): tier for tier in Tier}


def issue(
    account: Identity,
    *,
    node: NodeId,
    role: Role,
    tier: Tier,
    cell: str,
    name: str,
    issued_unix_s: float,
    life_s: float = PASSPORT_LIFE_S,
    rights: BusRights | None = None,
) -> str:
    """A passport for a key, as text. The rights are those of the role, unless narrower ones are given.

    Raises `RequestRefused` for a life, name, cell or key that no passport may have.
    """
    if not 0 < life_s <= PASSPORT_LIFE_S:
        raise RequestRefused(f"expected a passport for up to {PASSPORT_LIFE_S:.0f} s, got one for {life_s} s")
    if len(name) > NAME_CHARS_MAX:
        raise RequestRefused(f"expected a name of up to {NAME_CHARS_MAX} characters, got {len(name)}")
    return user_jwt(
        account,
        node=node,
        name=name,
        issued_unix_s=issued_unix_s,
        life_s=life_s,
        rights=rights_of(role, node, cell) if rights is None else rights,
        tags=(f"fallow:role={role}", f"fallow:tier={int(tier)}", f"fallow:cell={cell}"),
    )


def issue_presence(
    system: Identity, *, node: NodeId, account: NodeId, issued_unix_s: float, life_s: float = PASSPORT_LIFE_S
) -> str:
    """Leave for a coordinator's key to hear who joins and leaves the bus. Opens the system account, and is no passport
    to anybody else."""
    rights = presence_rights(node, account_nkey(account))
    return user_jwt(
        system, node=node, name="presence", issued_unix_s=issued_unix_s, life_s=min(life_s, PASSPORT_LIFE_S),
        rights=rights,
    )  # fmt: skip


def issue_claims(
    system: Identity, *, node: NodeId, account: NodeId, issued_unix_s: float, life_s: float = PASSPORT_LIFE_S
) -> str:
    """Leave for the registrar's key to bring the server new revocations, in the fleet's account and the system's. Opens
    the system account."""
    rights = claims_rights(node, (account_nkey(account), account_nkey(system.node)))
    return user_jwt(
        system, node=node, name="claims", issued_unix_s=issued_unix_s, life_s=min(life_s, PASSPORT_LIFE_S),
        rights=rights,
    )  # fmt: skip


class Held(msgspec.Struct, frozen=True):
    """`BusCredentials` of a passport that nobody renews: for what is over before it ends, and for tests."""

    passport: str
    identity: Identity
    authority_pem: str

    def sign(self, nonce: bytes) -> bytes:
        """With the passport's key."""
        return self.identity.sign_nonce(nonce)

    def refused(self) -> None:
        """There is no other."""


class _Void(NamedTuple):
    """What is known of a key on a list."""

    until_unix_s: float
    """Its passports issued up to then are void."""
    heard_unix_s: float
    """When that was heard last."""
    departure: Departure


class PassportReader:
    """The `Passports` of one network."""

    def __init__(self, network: Network, clock: Clock) -> None:
        self._account = network.account
        self._registrar = network.registrar
        self._cell = network.cell
        self._clock = clock
        self._verified: OrderedDict[str, Passport] = OrderedDict()
        self._sequence = -1
        self._void: OrderedDict[NodeId, _Void] = OrderedDict()
        """Those heard of last come last."""

    def read(self, text: str, holder: NodeId | None = None) -> Passport:
        """Raises `PassportRefused`."""
        passport = self._verified.get(text)
        if passport is None:
            passport = _passport(text, self._account)
            self._verified[text] = passport
            if len(self._verified) > VERIFIED_MAX:
                self._verified.popitem(last=False)
        else:
            self._verified.move_to_end(text)
        if holder is not None and passport.node != holder:
            raise PassportRefused(f"expected the passport of {holder[:8]}, got that of {passport.node[:8]}")
        now_s = self._clock.unix_s()
        if now_s >= passport.expires_unix_s + PASSPORT_GRACE_S:
            ago_s = now_s - passport.expires_unix_s
            raise PassportRefused(f"the passport of {passport.node[:8]} expired {ago_s:.0f} s ago: it must be renewed")
        if now_s < passport.issued_unix_s - PASSPORT_GRACE_S:
            raise PassportRefused(
                f"the passport of {passport.node[:8]} begins in {passport.issued_unix_s - now_s:.0f} s: "
                "is one of the two clocks wrong?"
            )
        void = self._void.get(passport.node)
        if void is not None and passport.issued_unix_s <= void.until_unix_s:
            raise PassportRefused(f"the passport of {passport.node[:8]} was revoked")
        return passport

    def revoked(self, node: NodeId) -> bool:
        """Whether a key is out by a list's word, of now or of not long ago."""
        void = self._void.get(node)
        return void is not None and void.departure is not Departure.RETURNED

    @property
    def sequence(self) -> int | None:
        """Of the newest list of revocations; `None` before the first."""
        return self._sequence if self._sequence >= 0 else None

    def learn(self, sealed: bytes) -> RevocationList | None:
        """Take a list of revocations, an envelope as it came. What is new, or `None` when it is not newer than what
        is known, or too old to matter. Raises `SignatureInvalid` unless this network's registrar signed it, for this
        cell."""
        found, signer = envelope.unseal(envelope.Kind.REVOCATIONS, RevocationList, sealed)
        if signer != self._registrar:
            raise SignatureInvalid(
                f"expected revocations signed by the registrar {self._registrar[:8]}, got them signed by {signer[:8]}"
            )
        if found.cell != self._cell:
            raise SignatureInvalid(f"expected revocations of cell {self._cell}, got those of {found.cell[:40]}")
        if found.sequence <= self._sequence or self._clock.unix_s() - found.issued_unix_s >= REVOCATION_KEPT_S:
            return None
        self._sequence = found.sequence
        self._remember(found)
        return found

    def _remember(self, found: RevocationList) -> None:
        now_s = self._clock.unix_s()
        named = {each.node for each in found.revocations}
        for node, void in list(self._void.items()):
            if void.departure is Departure.LEFT and node not in named:
                self._void[node] = void._replace(departure=Departure.RETURNED)
        for each in found.revocations:
            void, known = _Void(each.revoked_unix_s, now_s, each.departure), self._void.get(each.node)
            if known is not None:
                void = void._replace(until_unix_s=max(known.until_unix_s, void.until_unix_s))
                if known.departure is Departure.REVOKED is not each.departure:  # the registrar has forgotten it
                    void = void._replace(departure=Departure.REVOKED, heard_unix_s=known.heard_unix_s)
            self._void[each.node] = void
            self._void.move_to_end(each.node)
        for node in [node for node, void in self._void.items() if now_s - void.heard_unix_s >= REVOCATION_KEPT_S]:
            del self._void[node]
        while len(self._void) > REVOCATIONS_KEPT_MAX:
            self._void.popitem(last=False)


def is_for(text: str, node: NodeId, role: Role) -> bool:
    """Whether one's own passport, of whatever time and unchecked, is for that key and role."""
    said = peek(text)
    return said is not None and said[1] == node and f"fallow:role={role}" in said[0].nats.tags


def _passport(text: str, account: str) -> Passport:
    claims, node = read_user(text, account)
    tags = dict(tag.partition("=")[::2] for tag in claims.nats.tags)
    expected = {"fallow:role", "fallow:tier", "fallow:cell"}
    if len(claims.nats.tags) != len(expected) or tags.keys() != expected:
        raise PassportRefused("expected a passport that says role, tier and cell, got one that says other things")
    tier = _TIERS.get(tags["fallow:tier"])
    try:
        role = Role(tags["fallow:role"])
    except ValueError:
        role = None
    if role is None or tier is None:
        raise PassportRefused("a passport of a role or tier that this release does not know: is it newer?")
    return Passport(
        node=node,
        role=role,
        tier=tier,
        cell=tags["fallow:cell"],
        name=claims.name,
        issued_unix_s=float(claims.iat),
        expires_unix_s=float(claims.exp or 0),
        text=text,
    )
