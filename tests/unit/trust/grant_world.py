"""A network of a few keys for tests of rights: parties with real passports, a clock to set, and a lease to switch."""

import asyncio

import msgspec

from fallow.domain.charter import Charter, FleetPolicy, SignedModel, Standing
from fallow.domain.credentials import PASSPORT_LIFE_S, Departure, Revocation, RevocationList, Role
from fallow.domain.fleet import ModelEntry, Tier
from fallow.domain.ids import Digest, NodeId
from fallow.domain.network import Network
from fallow.policy.figures import figures_of_entry
from fallow.trust import jwt
from fallow.trust.envelope import Kind, seal
from fallow.trust.grants import Author
from fallow.trust.keys import Identity, identity_of
from fallow.trust.passports import PassportReader, issue

ACCOUNT, REGISTRAR, COORDINATOR, GATEWAY, NODE, OTHER_NODE, STRANGER, MEMBER = (
    identity_of(bytes([index]) * 32) for index in range(1, 9)
)
CELL = "home"
NOW_S = 1_800_000_000.0
MODEL = Digest("d" * 64)
NETWORK = Network(
    format=1,
    name="test",
    cell=CELL,
    authority_pem="",
    account=jwt.account_nkey(ACCOUNT.node),
    registrar=REGISTRAR.node,
    tuf_root="",
)


class SetClock:
    """Wall clock as set; the other one is the running loop's."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def unix_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(max(0.0, duration_s))


class SwitchedLease:
    """A `Lease` as a test says."""

    def __init__(self, standing: Standing = Standing.WORKING) -> None:
        self.standing = standing
        self.charter: Charter | None = Charter(
            policy=FleetPolicy(epoch=1),
            council={},
            root_version=1,
            timestamp_version=1,
            timestamp_expires_unix_s=NOW_S + 600,
            models=frozenset({MODEL}),
        )
        self._turned = asyncio.Event()

    @property
    def why(self) -> str:
        return "" if self.standing is Standing.WORKING else f"the test says {self.standing}"

    def allows(self, model: Digest) -> bool:
        return self.charter is not None and model in self.charter.models

    def allow(self, *models: Digest) -> None:
        """From now on, the council allows these."""
        assert self.charter is not None
        self.charter = msgspec.structs.replace(self.charter, models=frozenset(models))

    def sign(self, *entries: ModelEntry) -> None:
        """From now on, the council allows these, and publishers signed what a store announces of them."""
        assert self.charter is not None
        self.allow(*(entry.model for entry in entries))
        signed = {entry.model: SignedModel(0, (figures_of_entry(entry),)) for entry in entries}
        self.charter = msgspec.structs.replace(self.charter, signed=signed)

    def turn(self, standing: Standing) -> None:
        self.standing = standing
        self._turned.set()
        self._turned = asyncio.Event()

    async def changed(self, standing: Standing) -> Standing:
        while self.standing is standing:
            await self._turned.wait()
        return self.standing


def passport(
    holder: Identity, role: Role, *, cell: str = CELL, tier: Tier = Tier.KEYED, at_s: float = NOW_S,
    life_s: float = PASSPORT_LIFE_S, account: Identity = ACCOUNT,
) -> str:  # fmt: skip
    return issue(
        account, node=holder.node, role=role, tier=tier, cell=cell, name=str(role), issued_unix_s=at_s, life_s=life_s
    )


def author(
    clock: SetClock, who: Identity = COORDINATOR, role: Role = Role.COORDINATOR, cell: str = CELL, text: str = ""
) -> Author:
    shown = text or passport(who, role, cell=cell, at_s=clock.unix_s())
    return Author(who, lambda: shown, cell, clock.unix_s)


def reader(clock: SetClock) -> PassportReader:
    return PassportReader(NETWORK, clock)


def revoke(passports: PassportReader, node: NodeId, sequence: int = 1, at_s: float = NOW_S + 1) -> None:
    told = (Revocation(node=node, revoked_unix_s=at_s, departure=Departure.REVOKED),)
    body = RevocationList(sequence=sequence, issued_unix_s=at_s, cell=CELL, revocations=told)
    passports.learn(seal(Kind.REVOCATIONS, body, REGISTRAR))
