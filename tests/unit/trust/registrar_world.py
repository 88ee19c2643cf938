"""A founded network in a temporary folder, its registrar, and parties that ask of it. Everything real but the clock."""

import base64
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from fallow.domain.credentials import Role
from fallow.domain.fleet import Tier
from fallow.domain.network import Places
from fallow.gateway.server import HttpServer, ServerLimits, serve
from fallow.system_clock import SystemClock
from fallow.trust.certificates import server_context
from fallow.trust.council.files import CouncilPaths, found_council_of_one
from fallow.trust.envelope import Kind as Envelopes
from fallow.trust.envelope import seal
from fallow.trust.keys import Identity, new_identity
from fallow.trust.membership import enrolment_of
from fallow.trust.registrar.api import ApiLimits, RegistrarApi
from fallow.trust.registrar.consent import sign_consent
from fallow.trust.registrar.database import RegistryDb, open_database
from fallow.trust.registrar.invitations import Invitation, from_text
from fallow.trust.registrar.journal import Entry
from fallow.trust.registrar.journal_db import read_all
from fallow.trust.registrar.requests import Admitted, Answer, Enrol, Renew, Request
from fallow.trust.registrar.service import Registrar
from fallow.trust.registrar.state import found, write_places, write_server_certificate
from fallow.trust.registrar.word import RegistrarWord

BEGIN_UNIX_S = time.time()
"""TLS judges certificates by the machine's clock, whatever ours says."""
BUS_URLS = ("tls://127.0.0.1:4222",)


class HandClock(SystemClock):
    """A clock that a test sets; it sleeps as any."""

    def __init__(self, unix_s: float = BEGIN_UNIX_S) -> None:
        self.now_s = unix_s

    def unix_s(self) -> float:
        return self.now_s


class World:
    """A network and its registrar."""

    def __init__(self, folder: Path, clock: SystemClock | None = None) -> None:
        self.clock = clock or HandClock()
        now_s = self.clock.unix_s()
        root = found_council_of_one(folder, "home", now_s)
        self.state = found(folder, name="Ørsted", cell="home", tuf_root=root, now_unix_s=now_s)
        self.database = open_database(self.state.paths.database)
        self.registrar = Registrar(self.state, self.database, self.clock)
        self.word = RegistrarWord(self.state, self.database, self.clock)
        self.repository = CouncilPaths(folder).open_repository(self.state.digest)
        self.places(("https://127.0.0.1:1",))

    def places(self, urls: tuple[str, ...]) -> None:
        write_places(self.state.paths, Places(registrar_urls=urls, bus_urls=BUS_URLS))

    def another(self) -> RegistryDb:
        """The same database, as another process opens it."""
        return open_database(self.state.paths.database)

    def ask(self, who: Identity, action: object) -> Answer:
        """A signed request as the interface gets it."""
        return self.registrar.answer(self.signed(who, action))

    def signed(self, who: Identity, action: object, **changes: str) -> bytes:
        nonce = self.registrar.challenge().nonce
        request = Request(network=self.state.digest, nonce=nonce, action=action)  # type: ignore[arg-type]
        return seal(Envelopes.REQUEST, msgspec.structs.replace(request, **changes), who)

    def invitation(self, role: Role = Role.NODE, life_s: float = 60.0, name: str | None = None) -> Invitation:
        return from_text(self.registrar.invite(role, Tier.KEYED, life_s, name).text)

    def enrolment(self, who: Identity, invitation: Invitation, name: str = "a device") -> Enrol:
        """What a newcomer asks, its owner's consent included."""
        words = "I lend this device."
        consent = sign_consent(who, self.state.digest, invitation.role, words)
        return enrolment_of(invitation, name, consent if invitation.role is Role.NODE else None)

    def member(self, role: Role = Role.NODE, name: str = "a device") -> Identity:
        """Somebody who was admitted."""
        who = new_identity()
        self.ask(who, self.enrolment(who, self.invitation(role), name))
        return who

    def renewed(self, who: Identity) -> Admitted:
        answer = self.ask(who, Renew())
        assert isinstance(answer, Admitted)
        return answer

    def journal(self) -> list[Entry]:
        with self.database.reading() as connection:
            return list(read_all(connection))

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.journal()]


def cut_by(account_jwt: str) -> dict[str, int]:
    """Whom the bus's server cuts by an account's JWT, and up to when their own JWTs are void."""
    part = account_jwt.split(".")[1]
    claims = msgspec.json.decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return dict(claims["nats"]["revocations"])


@asynccontextmanager
async def served(
    world: World, limits: ApiLimits | None = None, connections: ServerLimits | None = None
) -> AsyncIterator[HttpServer]:
    """The registrar on a port of 127.0.0.1, by HTTPS."""
    certificate, key = write_server_certificate(world.state, world.clock.unix_s())
    api = RegistrarApi(world.registrar, world.word, world.repository, world.clock, limits=limits)
    server = await serve(api.app(), "127.0.0.1", 0, connections, server_context(certificate, key))
    world.places((server.url,))
    try:
        yield server
    finally:
        await server.close()
        api.close()
