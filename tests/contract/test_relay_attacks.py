"""A captured bus against the sealed relay: whatever it does to messages, no frame arrives that was not sent next.

Method: the in-memory bus with a hook, through which every message passes on its way, and a link between two devices
that talk by numbered frames. Each attack says what the bus does. What must hold: frames that arrived are a prefix of
what was sent, the link ends with `SealBroken` or stays whole, and another link between the same devices goes on.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.domain.errors import BusTimeout, FabricError, FrameError, LinkClosed, SealBroken
from fallow.domain.fleet import Subjects
from fallow.domain.frames import Frame, PeerAddress, Rows
from fallow.domain.ids import NodeId
from fallow.fabric import sealed_endpoint
from fallow.fabric.codec import encode
from fallow.fabric.local_handshake import Identity
from fallow.fabric.memory_bus import MemoryBus, MemoryHub, Message
from fallow.fabric.sealed_endpoint import HANDSHAKES_PER_SENDER_MAX, LINKS_PER_PEER_MAX, RelayEndpoint
from fallow.fabric.sealed_link import SealedLink
from fallow.fabric.sealing import HEAD_BYTES, Dialler, Kind, Listener, parse_head
from fallow.policy.relay import WINDOW_BYTES_MIN, record_cost_bytes
from tests.unit.fabric.support import STEADY, eventually, rows

ALICE, BOB, EVE = (bytes([number] * 32) for number in (1, 2, 3))
A, B, E = (Identity.from_seed(seed).node for seed in (ALICE, BOB, EVE))
SUBJECTS = Subjects("test")
TO_BOB = SUBJECTS.relay(B, A)

Carried = tuple[str, bytes]
Attack = Callable[[str, bytes], list[Carried]]
"""What the bus makes of a message: any number of messages, on any subjects."""


def honest(subject: str, message: bytes) -> list[Carried]:
    return [(subject, message)]


class CapturedHub(MemoryHub):
    """A bus in the hands of an attacker."""

    def __init__(self) -> None:
        super().__init__()
        self.attack: Attack = honest
        self.answer_attack: Callable[[bytes], bytes] = lambda answer: answer
        self.carried: list[Carried] = []
        self.answers: list[bytes] = []

    def deliver(self, message: Message) -> bool:
        self.carried.append((message.subject, message.message))
        found = False
        for subject, data in self.attack(message.subject, message.message):
            found = super().deliver(Message(subject, data, message.sender, message.reply)) or found
        return found

    def answer(self, message: Message, answerer: MemoryBus, answer: bytes) -> None:
        self.answers.append(answer)
        super().answer(message, answerer, self.answer_attack(answer))

    def inject(self, subject: str, data: bytes) -> None:
        """Say something that nobody sent."""
        super().deliver(Message(subject, data, self.connect("attacker"), None))

    def sent_to_bob(self) -> list[bytes]:
        return [data for subject, data in self.carried if subject == TO_BOB]


class Rig:
    """Two devices and the bus between them."""

    def __init__(self, hub: CapturedHub, alice: RelayEndpoint, bob: RelayEndpoint) -> None:
        self.hub, self.alice, self.bob = hub, alice, bob

    async def link(self) -> tuple[SealedLink, SealedLink]:
        near, far = await asyncio.gather(self.alice.connect(self.bob.address), anext(self.bob.accept()))
        assert isinstance(far, SealedLink)
        return near, far


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    hub = CapturedHub()
    alice, bob = [await RelayEndpoint.open(hub.connect(node), "test", seed) for node, seed in ((A, ALICE), (B, BOB))]
    try:
        yield Rig(hub, alice, bob)
    finally:
        hub.attack = honest
        await alice.close()
        await bob.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


def is_record(message: bytes) -> bool:
    return parse_head(message).kind is Kind.RECORD


async def until_end(link: SealedLink) -> tuple[list[int], FabricError]:
    """Positions of the frames that arrive, and how the link ends."""
    came: list[int] = []
    try:
        while True:
            frame = await link.receive()
            assert isinstance(frame.header, Rows)
            came.append(frame.header.position)
    except FabricError as error:
        return came, error


class OnRecords:
    """An attack on the records to Bob, counted from 0; everything else passes."""

    def __init__(self, attack: Callable[[int, bytes], list[bytes]], link: SealedLink | None = None) -> None:
        self._attack = attack
        self._link = link
        self._count = -1

    def __call__(self, subject: str, message: bytes) -> list[Carried]:
        if subject != TO_BOB or not is_record(message):
            return honest(subject, message)
        if self._link is not None and parse_head(message).link_id != self._link.link_id:
            return honest(subject, message)
        self._count += 1
        return [(subject, data) for data in self._attack(self._count, message)]


def altered(at: int) -> Callable[[int, bytes], list[bytes]]:
    def attack(count: int, message: bytes) -> list[bytes]:
        if count != 3:
            return [message]
        changed = bytearray(message)
        changed[at] ^= 1
        return [bytes(changed)]

    return attack


class Reordered:
    def __init__(self) -> None:
        self.held: list[bytes] = []

    def __call__(self, count: int, message: bytes) -> list[bytes]:
        if count == 3:
            self.held.append(message)
            return []
        held, self.held = self.held, []
        return [message, *held]


ATTACKS: dict[str, Callable[[], Callable[[int, bytes], list[bytes]]]] = {
    "alters the last byte": lambda: altered(-1),
    "alters the first sealed byte": lambda: altered(HEAD_BYTES + 8),
    "alters the counter": lambda: altered(HEAD_BYTES + 7),
    "drops one": lambda: lambda count, message: [] if count == 3 else [message],
    "sends one twice": lambda: lambda count, message: [message, message] if count == 3 else [message],
    "swaps two": Reordered,
    "cuts one short": lambda: lambda count, message: [message[:-1]] if count == 3 else [message],
    "lengthens one": lambda: lambda count, message: [message + b"!"] if count == 3 else [message],
    "replaces one by noise": lambda: (
        lambda count, message: [message[:HEAD_BYTES] + os.urandom(64)] if count == 3 else [message]
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_the_relay_does_to_records_is_noticed(attack: str) -> None:
    async def main() -> None:
        async with rig() as r:
            near, far = await r.link()
            other_near, other_far = await r.link()
            r.hub.attack = OnRecords(ATTACKS[attack](), near)
            for i in range(6):
                near.post(rows(i))
                other_near.post(rows(i))
                await asyncio.sleep(0)  # a record each
                await eventually(lambda: near._queued_bytes == 0)
            came, error = await until_end(far)
            assert came == list(range(len(came))) and 3 <= len(came) <= 4
            assert isinstance(error, SealBroken) and error.code == "seal_broken"
            _, told = await until_end(near)
            assert "seal_broken" in str(told), "the sender is told, by a sealed word"
            for i in range(6):
                frame = await other_far.receive()
                assert isinstance(frame.header, Rows) and frame.header.position == i
            assert not far.post(rows(0)) and not near.post(rows(0))

    run(main())


@settings(STEADY, max_examples=60)
@given(st.dictionaries(st.integers(0, 9), st.sampled_from(["drop", "twice", "late", "flip", "old"]), max_size=3))
def test_whatever_mixture_of_these_a_prefix_arrives(tampering: dict[int, str]) -> None:
    sealed_records = 10

    async def main() -> None:
        async with rig() as r:
            near, far = await r.link()
            passed: list[bytes] = []
            delivered: list[bytes] = []
            late: list[bytes] = []

            def attack(count: int, message: bytes) -> list[bytes]:
                what = tampering.get(count)
                out = {
                    None: [message],
                    "drop": [],
                    "twice": [message, message],
                    "late": [],
                    "flip": [message[:-3] + bytes([message[-3] ^ 8]) + message[-2:]],
                    "old": [*passed[:1], message],
                }[what]
                out += late
                late[:] = [message] if what == "late" else []
                passed.append(message)
                delivered.extend(out)
                return out

            r.hub.attack = OnRecords(attack, near)
            for i in range(sealed_records):
                near.post(rows(i))
                await asyncio.sleep(0)
                await eventually(lambda: near._queued_bytes == 0)
                if near._end is not None:
                    break
            r.hub.attack = honest
            await near.close()
            came, error = await until_end(far)
            in_order = next(
                (i for i, pair in enumerate(zip(delivered, passed, strict=False)) if pair[0] != pair[1]), None
            )
            in_order = min(len(delivered), len(passed)) if in_order is None else in_order
            assert came == list(range(in_order))
            assert isinstance(error, SealBroken) == (delivered != passed), error

    run(main())


def test_a_record_of_one_link_does_not_pass_in_another_of_the_same_devices() -> None:
    async def main() -> None:
        async with rig() as r:
            (a1, b1), (a2, b2) = await r.link(), await r.link()
            assert a1.link_id != a2.link_id

            def mix(count: int, message: bytes) -> list[bytes]:
                return [message, message[:2] + a2.link_id + message[HEAD_BYTES:]] if count == 0 else [message]

            r.hub.attack = OnRecords(mix, a1)
            await a1.send(rows(1))
            came, error = await until_end(b2)
            assert came == [] and isinstance(error, SealBroken)
            frame = await b1.receive()
            assert isinstance(frame.header, Rows) and frame.header.position == 1

    run(main())


def test_a_record_is_not_reflected_to_its_sender() -> None:
    async def main() -> None:
        async with rig() as r:
            near, _ = await r.link()
            back = SUBJECTS.relay(A, B)
            r.hub.attack = lambda subject, message: [(back if subject == TO_BOB else subject, message)]
            await near.send(rows(1))
            came, error = await until_end(near)
            assert came == [] and isinstance(error, SealBroken)

    run(main())


def test_another_senders_record_touches_no_link() -> None:
    """Eve may publish as herself: she knows the link's id and what passed, and still nothing of hers is looked at."""

    async def main() -> None:
        async with rig() as r:
            near, far = await r.link()
            await near.send(rows(1))
            await far.receive()
            record = r.hub.sent_to_bob()[-1]
            for data in (record, record[:HEAD_BYTES] + os.urandom(80)):
                r.hub.inject(SUBJECTS.relay(B, E), data)
            await near.send(rows(2))
            frame = await far.receive()
            assert isinstance(frame.header, Rows) and frame.header.position == 2

    run(main())


def test_truncation_is_no_end() -> None:
    """The bus carries nothing more: no frame is made up, and no end either. Pings notice the silence."""

    async def main() -> None:
        async with rig() as r:
            near, far = await r.link()
            big = bytes(200_000)
            r.hub.attack = OnRecords(lambda count, message: [message] if count < 2 else [])
            await near.send(rows(1, big))
            await eventually(lambda: far.bytes_received > 100_000)
            await near.close("done", "")
            for _ in range(20):
                await asyncio.sleep(0)
            assert far._end is None and not far._inbox
            far.abort("silent for 1.5 s")  # what `Peers` does
            came, error = await until_end(far)
            assert came == [] and isinstance(error, LinkClosed)

    run(main())


def test_dropping_everything_but_the_goodbye_is_noticed() -> None:
    async def main() -> None:
        async with rig() as r:
            near, far = await r.link()
            r.hub.attack = OnRecords(lambda count, message: [] if count == 0 else [message])
            await near.send(rows(1))
            await eventually(lambda: near._queued_bytes == 0)
            await near.close("done", "all was said")
            came, error = await until_end(far)
            assert came == [] and isinstance(error, SealBroken) and "lost or held back" in str(error)

    run(main())


# --- the handshake ------------------------------------------------------------------------------


def test_the_bus_cannot_answer_in_anothers_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_endpoint, "DIAL_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with rig() as r:
            eve = Identity.from_seed(EVE)

            async def answer(_: str, dial: bytes) -> bytes:
                redirected = dial[: HEAD_BYTES + 32] + eve.public_bytes + dial[HEAD_BYTES + 64 :]
                with pytest.raises(SealBroken):
                    Listener(eve, "test", A, redirected)
                posing = Dialler(eve, A, "test")
                posing.link_id = parse_head(dial).link_id
                return posing.dial[:2] + posing.link_id + os.urandom(32 + 80 + 64)

            bus = r.hub.connect("eve")
            await r.bob.close()
            await bus.subscribe(TO_BOB, answer)
            with pytest.raises(SealBroken):
                await r.alice.connect(PeerAddress(B, ("relay:test",)))
            # Eve's own, perfectly valid answer to a dial that was meant for Bob.
            eves = await RelayEndpoint.open(bus, "test", EVE)
            r.hub.attack = lambda subject, message: [(subject.replace(B, E), message)]
            with pytest.raises(LinkClosed, match="did not answer"):
                await r.alice.connect(PeerAddress(B, ("relay:test",)))
            assert not eves._links and not r.alice._links
            await eves.close()

    run(main())


@pytest.mark.parametrize("which", ["dial", "answer", "confirm"])
def test_an_altered_handshake_makes_no_link(which: str) -> None:
    async def main() -> None:
        async with rig() as r:
            kind = {"dial": Kind.DIAL, "confirm": Kind.CONFIRM}.get(which)

            def flip(message: bytes) -> bytes:
                return message[:-70] + bytes([message[-70] ^ 4]) + message[-69:]

            if kind is None:
                r.hub.answer_attack = flip
            r.hub.attack = lambda subject, message: [
                (subject, flip(message) if parse_head(message).kind is kind else message)
            ]
            dialling = asyncio.ensure_future(r.alice.connect(r.bob.address))
            if which == "answer":
                with pytest.raises(SealBroken):
                    await dialling
            elif which == "confirm":  # the dialler's side stands, and hears nothing: no Hello comes
                near = await dialling
                await near.send(rows(1))
                await eventually(lambda: near._queued_bytes == 0)
            else:
                await asyncio.wait({dialling}, timeout=0.2)
                assert not dialling.done() or dialling.exception() is not None
                dialling.cancel()
            assert not r.bob._links and not r.bob._accepted._links

    run(main())


def test_a_recorded_conversation_played_again_changes_nothing() -> None:
    async def main() -> None:
        async with rig() as r:
            near, far = await r.link()
            for i in range(3):
                await near.send(rows(i))
                await far.receive()
            recorded = r.hub.sent_to_bob()
            await near.close()
            await until_end(far)
            await eventually(lambda: not r.bob._links and not r.alice._links)
            for message in recorded * 2:
                r.hub.inject(TO_BOB, message)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not r.bob._links and not r.bob._accepted._links
            assert len(r.bob._handshakes) <= 1, "one half-open handshake, for HANDSHAKE_TIMEOUT_S at most"
            again, far = await r.link()
            await again.send(rows(9))
            assert isinstance((await far.receive()).header, Rows)

    run(main())


def test_a_recorded_dial_does_not_disturb_the_link_it_once_made() -> None:
    async def main() -> None:
        async with rig() as r:
            near, far = await r.link()
            handshake = r.hub.sent_to_bob()[:2]
            for message in handshake:
                r.hub.inject(TO_BOB, message)
            await near.send(rows(1))
            assert isinstance((await far.receive()).header, Rows)
            assert len(r.bob._links) == 1 and not r.bob._handshakes

    run(main())


def test_half_open_handshakes_are_few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_endpoint, "HANDSHAKE_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with rig() as r:
            bus = r.hub.connect("eve")
            eve = Identity.from_seed(EVE)
            answers = [
                parse_head(await bus.request(SUBJECTS.relay(B, E), Dialler(eve, B, "test").dial, 1)).kind
                for _ in range(3 * HANDSHAKES_PER_SENDER_MAX)
            ]
            assert answers.count(Kind.ANSWER) == HANDSHAKES_PER_SENDER_MAX
            assert answers.count(Kind.BUSY) == 2 * HANDSHAKES_PER_SENDER_MAX
            await r.link()  # others are not kept out
            await eventually(lambda: not r.bob._handshakes)

    run(main())


def test_dials_that_prove_nothing_are_as_limited() -> None:
    """A check of a signature costs more than asking for one."""

    async def main() -> None:
        async with rig() as r:
            bus = r.hub.connect("eve")
            eve = Identity.from_seed(EVE)
            checked = 0
            for _ in range(3 * HANDSHAKES_PER_SENDER_MAX):
                dial = Dialler(eve, B, "test").dial
                try:
                    answer = await bus.request(SUBJECTS.relay(B, E), dial[:-1] + bytes([dial[-1] ^ 1]), 0.02)
                    assert parse_head(answer).kind is Kind.BUSY
                except BusTimeout:
                    checked += 1
            assert checked == HANDSHAKES_PER_SENDER_MAX == len(r.bob._handshakes)

    run(main())


def test_a_peer_opens_so_many_links_and_no_more() -> None:
    async def main() -> None:
        async with rig() as r:
            links = [await r.link() for _ in range(LINKS_PER_PEER_MAX)]
            with pytest.raises(LinkClosed, match="takes no more links"):
                await r.alice.connect(r.bob.address)
            links[0][1].abort("enough")
            await eventually(lambda: len(r.bob._links) < LINKS_PER_PEER_MAX)
            await r.link()

    run(main())


def test_noise_on_the_subject_is_ignored() -> None:
    async def main() -> None:
        async with rig() as r:
            near, far = await r.link()
            for sender in (A, E, "x", "*"):
                for data in (b"", b"\x01", os.urandom(18), b"\x01\x01" + os.urandom(200), b"\x01\x03" + bytes(200)):
                    r.hub.inject(f"fallow.test.relay.{B}.{sender}", data)
            await near.send(rows(1))
            assert isinstance((await far.receive()).header, Rows)

    run(main())


# --- a peer that is authenticated, and hostile ----------------------------------------------------


class Hostile:
    """Eve holds a proper link to Bob, and seals what she likes."""

    def __init__(self, r: Rig) -> None:
        self._bus = r.hub.connect("eve")
        self._bob = r.bob

    async def open(self) -> SealedLink:
        dialler = Dialler(Identity.from_seed(EVE), B, "test")
        answer = await self._bus.request(SUBJECTS.relay(B, E), dialler.dial, 1)
        confirm, self._seals = dialler.answered(answer)
        await self._bus.publish(SUBJECTS.relay(B, E), confirm)
        link = await anext(self._bob.accept())
        assert isinstance(link, SealedLink)
        return link

    async def seal(self, plain: bytes) -> None:
        await self._bus.publish(SUBJECTS.relay(B, E), self._seals.sealer.seal(plain))


@pytest.mark.parametrize(
    ("plain", "complaint"),
    [
        (b"", "at least 9 bytes"),
        (b"\x00" * 8, "at least 9 bytes"),
        (b"\x07" + bytes(8), "unknown kind of record"),
        (bytes(9) + b"\xff" * 64, "too large"),
    ],
)
def test_an_authenticated_peer_that_sends_garbage_loses_its_link(plain: bytes, complaint: str) -> None:
    async def main() -> None:
        async with rig() as r:
            eve = Hostile(r)
            link = await eve.open()
            await eve.seal(plain)
            came, error = await until_end(link)
            assert came == [] and isinstance(error, FrameError) and complaint in str(error)

    run(main())


def test_a_peer_that_sends_past_its_credit_loses_its_link() -> None:
    async def main() -> None:
        async with rig() as r:
            eve = Hostile(r)
            link = await eve.open()
            link._holding = True  # nobody reads: nothing more is granted
            piece = bytes(9) + encode(rows(1, bytes(16_000)))
            fitting = link._granted_bytes // record_cost_bytes(len(piece) - 9)
            for _ in range(fitting):
                await eve.seal(piece)
            await eventually(lambda: len(link._inbox) == fitting)
            assert link._end is None
            await eve.seal(piece)
            came, error = await until_end(link)
            assert len(came) == fitting and isinstance(error, FrameError) and "were granted" in str(error)

    run(main())


def test_a_peer_that_grants_without_limit_turns_back_pressure_off_for_one_window_at_most() -> None:
    async def main() -> None:
        async with rig() as r:
            eve = Hostile(r)
            link = await eve.open()
            await eve.seal(b"\x00" + b"\xff" * 8)
            await eventually(lambda: link._may_send_bytes > WINDOW_BYTES_MIN)
            for i in range(64):
                link.post(rows(i, bytes(60_000)))
            before = -1
            while before != link._queued_bytes:
                before = link._queued_bytes
                await asyncio.sleep(0.01)
            assert link._queued_bytes > 60_000, "Eve took nothing, so most of it still waits"

    run(main())


def test_a_frame_is_what_was_sent_whatever_its_size() -> None:
    """The attacks above end links; this one shows that the rig itself carries frames of several records unharmed."""

    async def main() -> None:
        async with rig() as r:
            near, far = await r.link()
            payload = os.urandom(3_000_000)
            sending = asyncio.create_task(near.send(rows(1, payload)))
            frame: Frame = await far.receive()
            await sending
            assert frame.payload == payload
            assert all(len(data) < 70_000 for data in r.hub.sent_to_bob())

    run(main())


def test_a_device_does_not_dial_itself_nor_another_cell() -> None:
    async def main() -> None:
        async with rig() as r:
            for address in (
                r.alice.address,
                PeerAddress(B, ("relay:other", "127.0.0.1:1")),
                PeerAddress(NodeId(B), ()),
            ):
                with pytest.raises(LinkClosed, match="not on the relay"):
                    await r.alice.connect(address)
            with pytest.raises(LinkClosed, match="nobody answers"):
                await r.alice.connect(PeerAddress(E, ("relay:test",)))

    run(main())
