"""A network of its own for tests: its keys, its server in trusted mode, and passports for whoever asks."""

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fallow.domain.credentials import PASSPORT_LIFE_S, Role
from fallow.domain.fleet import Tier
from fallow.domain.ids import NodeId
from fallow.domain.network import BUS_NAME, Network
from fallow.fabric.accounts import push_account
from fallow.fabric.broker import Broker
from fallow.fabric.broker_config import BusTrust
from fallow.fabric.nats_bus import NatsBus
from fallow.policy.bus_rights import BusRights
from fallow.trust import jwt
from fallow.trust.certificates import Certificate, new_authority, server_certificate
from fallow.trust.keys import Identity, identity_of, new_identity
from fallow.trust.passports import Held, issue, issue_claims, issue_presence

CELL = "home"
EVERYTHING = BusRights(publish=(">",), subscribe=(">",), may_answer=True)


def person(name: str) -> Identity:
    """The same key for the same name."""
    return identity_of(hashlib.sha256(name.encode()).digest())


@dataclass
class TestNetwork:
    """Every key of a network in one hand."""

    __test__ = False

    operator: Identity = field(default_factory=new_identity)
    account: Identity = field(default_factory=new_identity)
    system: Identity = field(default_factory=new_identity)
    registrar: Identity = field(default_factory=new_identity)
    authority: Certificate = field(default_factory=lambda: new_authority("test", time.time()))

    @property
    def account_name(self) -> str:
        return jwt.account_nkey(self.account.node)

    def account_jwt(self, revoked: dict[NodeId, float] | None = None) -> str:
        # What a network begins with is older than any revocation.
        issued_s = time.time() - (revoked is None)
        return jwt.account_jwt(
            self.operator, self.account.node, name="test", issued_unix_s=issued_s, revoked=revoked or {}
        )

    def system_account_jwt(self, revoked: dict[NodeId, float] | None = None) -> str:
        issued_s = time.time() - (revoked is None)
        return jwt.system_account_jwt(
            self.operator, self.system.node, name="system", issued_unix_s=issued_s, revoked=revoked or {}
        )

    def bus_trust(self) -> BusTrust:
        now_s = time.time()
        certificate = server_certificate(self.authority, BUS_NAME, now_s)
        return BusTrust(
            operator_jwt=jwt.operator_jwt(self.operator, system=self.system.node, name="test", issued_unix_s=now_s),
            account=self.account_name,
            account_jwt=self.account_jwt(),
            system_account=jwt.account_nkey(self.system.node),
            system_account_jwt=self.system_account_jwt(),
            certificate_pem=certificate.certificate_pem,
            key_pem=certificate.key_pem,
        )

    def network(self) -> Network:
        return Network(
            format=1,
            name="test",
            cell=CELL,
            authority_pem=self.authority.certificate_pem,
            account=self.account_name,
            registrar=self.registrar.node,
            tuf_root="",
        )

    def passport(
        self,
        node: NodeId,
        role: Role = Role.NODE,
        *,
        issued_unix_s: float | None = None,
        life_s: float = PASSPORT_LIFE_S,
        rights: BusRights | None = None,
    ) -> str:
        return issue(
            self.account, node=node, role=role, tier=Tier.KEYED, cell=CELL, name="someone",
            issued_unix_s=time.time() if issued_unix_s is None else issued_unix_s, life_s=life_s, rights=rights,
        )  # fmt: skip

    def held(self, identity: Identity, passport: str) -> Held:
        return Held(passport, identity, self.authority.certificate_pem)

    def member(self, identity: Identity, role: Role = Role.NODE) -> Held:
        return self.held(identity, self.passport(identity.node, role))

    def anything(self, name: str) -> Held:
        """Somebody who may do everything on the bus, for suites that care for other things."""
        who = person(name)
        return self.held(who, self.passport(who.node, rights=EVERYTHING))

    def presence(self) -> Held:
        who = person("presence")
        text = issue_presence(self.system, node=who.node, account=self.account.node, issued_unix_s=time.time())
        return self.held(who, text)

    def claims(self) -> Held:
        text = issue_claims(self.system, node=self.registrar.node, account=self.account.node, issued_unix_s=time.time())
        return self.held(self.registrar, text)


@asynccontextmanager
async def bus_server(adapter: str, state: Path, network: TestNetwork | None) -> AsyncIterator[Broker | None]:
    """The bus server of an adapter: none in memory, and with passports where there is a network."""
    if adapter == "memory":
        yield None
        return
    broker = Broker(state / "broker", trust=None if network is None else network.bus_trust())
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


class TrustedRig:
    """A trusted server, and everybody's way in."""

    def __init__(self, network: TestNetwork, broker: Broker) -> None:
        self.network, self.broker = network, broker
        self.buses: list[NatsBus] = []

    async def join(self, held: Held) -> NatsBus:
        self.buses.append(await NatsBus.connect(self.broker.urls, held.identity.node, held))
        return self.buses[-1]

    async def listen(self) -> tuple[NatsBus, list[tuple[str, bytes]]]:
        """Somebody who hears everything, to see what crosses."""
        bus = await self.join(self.network.anything("ear"))
        heard: list[tuple[str, bytes]] = []

        async def hear(subject: str, message: bytes) -> None:
            heard.append((subject, message))

        await bus.subscribe("fallow.>", hear)
        await bus.subscribe("_INBOX.x.>", hear)
        return bus, heard

    async def revoke(self, *nodes: NodeId) -> None:
        bus = await self.join(self.network.claims())
        revoked = {node: time.time() for node in nodes}
        await push_account(bus, self.network.account_name, self.network.account_jwt(revoked))
        system = jwt.account_nkey(self.network.system.node)
        await push_account(bus, system, self.network.system_account_jwt(revoked))


@asynccontextmanager
async def trusted_rig(
    state: Path, network: TestNetwork | None = None, trust: BusTrust | None = None
) -> AsyncIterator[TrustedRig]:
    network = network or TestNetwork()
    broker = Broker(state / "broker", trust=trust or network.bus_trust())
    await broker.start()
    made = TrustedRig(network, broker)
    try:
        yield made
    finally:
        for bus in made.buses:
            await bus.close()
        await broker.close()
