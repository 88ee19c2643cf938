"""Attacks by accusation: quarantine as a weapon.

A real coordinator on virtual time, twenty devices that report with true passports, and liars. The rule and its budget:
`tests/unit/policy/test_quarantine.py`; random liars: `tests/unit/coordinator/test_suspects.py`; a device that is really
damaged: `tests/simulation/test_quarantine.py`.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from fallow.coordinator.checks import ACCUSED_MAX
from fallow.coordinator.placer import PlacerTimes
from fallow.coordinator.service import Coordinator, CoordinatorConfig
from fallow.coordinator.suspects import OWN_WORD_RETRY_S, QUARANTINED
from fallow.domain.charter import FleetPolicy, Quarantine
from fallow.domain.credentials import Role
from fallow.domain.errors import NumericFault
from fallow.domain.fleet import Accusation, FindChain, RouteReply, RouteRequest, StageStatus, Subjects
from fallow.domain.frames import Fault, PeerAddress
from fallow.domain.ids import NodeId, SessionId
from fallow.domain.model import Span
from fallow.fabric.memory_bus import MemoryHub
from fallow.gateway.accusations import Accusations
from fallow.policy.membership import MembershipRules
from fallow.policy.quarantine import BUDGET_PERIOD_S, QUARANTINE_S
from fallow.policy.routing import RoutingRules
from fallow.simulator.virtual_time import run_virtual
from fallow.trust.cell_words import SignedCellWords
from fallow.trust.contract import CoordinatorTrust
from fallow.trust.grants import Author, Issuer, SealedOrders
from fallow.trust.keys import identity_of
from tests.simulation.trusted import RunningClock
from tests.unit.coordinator.test_registry import LAYERS, MODELS, beat, entry, ready, store
from tests.unit.node import rights_world
from tests.unit.trust.grant_world import CELL, COORDINATOR, NODE, STRANGER, SwitchedLease, author, passport, reader

SUBJECTS = Subjects(CELL)
DEVICES = [identity_of(bytes([50 + index]) * 32) for index in range(20)]
GATEWAYS = [identity_of(bytes([150 + index]) * 32).node for index in range(6)]
OTHER_CELLS = {name: identity_of(name.encode() * 8) for name in ("away", "afar")}
DAMAGED = msgspec.structs.replace(ready(MODELS[0], Span(0, LAYERS), status=StageStatus.FAILED), damaged=True)
BUDGET = Quarantine(devices_per_hour_max=5, fleet_share_max=0.2)
SHARE_MAX = 4
"""Of twenty."""


class Cell:
    def __init__(self) -> None:
        self.hub = MemoryHub()
        self.clock = RunningClock()
        self.lease = SwitchedLease()
        self.lease.sign(entry(MODELS[0]))
        assert self.lease.charter is not None
        policy = FleetPolicy(epoch=1, quarantine=BUDGET)
        self.lease.charter = msgspec.structs.replace(self.lease.charter, policy=policy)
        by, passports = author(self.clock), reader(self.clock)
        trust = CoordinatorTrust(
            passports, Issuer(by, self.lease), SealedOrders(by, passports), SignedCellWords(by, passports), self.lease
        )
        bus = self.hub.connect(COORDINATOR.node)
        # Everything that is done at an interval is done rarely: an hour costs less.
        config = CoordinatorConfig(
            cell=CELL,
            membership=MembershipRules(heartbeat_interval_s=60),
            routing=RoutingRules(refresh_s=600),
            times=PlacerTimes(period_s=600),
        )
        self.coordinator = Coordinator(config, bus, self.clock, trust=trust)
        self.buses = {node: self.hub.connect(node) for node in (*GATEWAYS, *(device.node for device in DEVICES))}
        self.beats = 0
        self.questions = 0

    async def beat(self, *damaged: NodeId) -> set[NodeId]:
        """Everybody reports, some that they are damaged; who is in quarantine."""
        self.beats += 1
        for device in DEVICES:
            shown = passport(device, Role.NODE, at_s=self.clock.unix_s())
            told = beat(device.node, self.beats, ready(MODELS[0], Span(0, LAYERS)))
            told = msgspec.structs.replace(told, passport=shown, kv_free_bytes=1 << 40)
            if device.node in damaged:
                told = msgspec.structs.replace(told, hosted=(DAMAGED,))
            await self.buses[device.node].publish(SUBJECTS.heartbeat(device.node), msgspec.json.encode(told))
        await self.clock.sleep(0.01)
        return {each.node for each in self.coordinator.status().nodes if each.standing == QUARANTINED}

    async def ask(self, gateway: NodeId, *accused: Accusation) -> RouteReply:
        self.questions += 1
        request = RouteRequest(
            model=MODELS[0], session=SessionId(f"{self.questions:032x}"), reserve_tokens=1, accused=accused
        )
        answer = await self.buses[gateway].request(SUBJECTS.route(gateway), msgspec.json.encode(request), 1.0)
        return msgspec.json.decode(answer, type=RouteReply)

    async def ask_from(self, cell: str, gateway: NodeId, *accused: Accusation) -> RouteReply:
        """The coordinator of another cell asks for a chain, for a gateway that it names."""
        self.questions += 1
        request = RouteRequest(
            model=MODELS[0], session=SessionId(f"{self.questions:032x}"), reserve_tokens=1, origin=gateway,
            accused=accused,
        )  # fmt: skip
        leader = OTHER_CELLS[cell]
        shown = passport(leader, Role.COORDINATOR, at_s=self.clock.unix_s(), cell=cell)
        words = SignedCellWords(Author(leader, lambda: shown, cell, self.clock.unix_s), reader(self.clock))
        question = words.ask(FindChain(cell=cell, request=request), CELL)
        answer = await self.hub.connect(leader.node).request(SUBJECTS.ask, question, 1.0)
        return msgspec.json.decode(answer, type=RouteReply)

    async def served(self) -> None:
        """By devices that are not in quarantine."""
        out = await self.beat()
        reply = await self.ask(GATEWAYS[0])
        assert reply.hops and not {hop.address.node for hop in reply.hops} & out, reply.error


def run(script: Callable[[Cell], Awaitable[None]]) -> None:
    async def main() -> None:
        cell = Cell()
        await cell.coordinator.start()
        await cell.beat()
        announced = msgspec.json.encode(store(entry(MODELS[0])))
        await cell.buses[GATEWAYS[0]].publish(SUBJECTS.store(store().address.node), announced)
        try:
            await script(cell)
        finally:
            await cell.coordinator.close()

    run_virtual(main())


def accused(device: NodeId, *others: NodeId) -> Accusation:
    """The first of the others is the one that refused."""
    return Accusation(node=device, others=others, refused_by=others[0] if others else None)


def test_one_gateway_accuses_everybody() -> None:
    """
    Attack: a gateway reports every device, again and again, each time with other witnesses of its invention.
    Expected: nobody is taken out of service: one party is behind all of it.
    Unharmed: chains are given as before.
    """

    async def script(cell: Cell) -> None:
        for turn in range(10):
            for index, device in enumerate(DEVICES):
                witness = DEVICES[(index + turn + 1) % len(DEVICES)].node
                await cell.ask(GATEWAYS[0], accused(device.node, witness), accused(device.node))
            assert await cell.beat() == set()
        await cell.served()

    run(script)


def test_one_device_has_every_gateway_accuse_the_others() -> None:
    """
    Attack: a device claims in the sessions of all gateways, which are honest, that what came from others was damaged.
    Expected: nobody is taken out of service: it is named in every report.
    Unharmed: chains are given as before, over those that it accused.
    """

    async def script(cell: Cell) -> None:
        liar = DEVICES[0].node
        for gateway in GATEWAYS:
            for index, device in enumerate(DEVICES[1:], 1):
                await cell.ask(gateway, accused(device.node, liar, DEVICES[index - 1].node))
        assert await cell.beat() == set()
        await cell.served()

    run(script)


def test_a_device_early_in_the_chain_has_others_compute_nonsense() -> None:
    """
    Attack: a device sends rows that its successor takes for sound and makes unsound ones of, in the sessions of several
        honest gateways, so that several honest devices refuse what the successor sends.
    Expected: the successor stays in service: whose rows it computed with is named in every report.
    Unharmed: chains are given as before.
    """

    async def script(cell: Cell) -> None:
        liar, framed, *honest = (device.node for device in DEVICES)
        for gateway, witness in zip(GATEWAYS, honest, strict=False):
            await cell.ask(gateway, accused(framed, liar, witness))
        assert await cell.beat() == set()
        await cell.served()

    run(script)


def test_many_liars_take_no_more_out_than_the_council_allows() -> None:
    """
    Attack: six gateways together accuse every device of the fleet, for more than an hour.
    Expected: never more than a fifth of the fleet is out, and never more than five go in an hour.
    Unharmed: the rest serves the model.
    """

    async def script(cell: Cell) -> None:
        before: set[NodeId] = set()
        began_s: list[float] = []
        everybody = [accused(device.node) for device in DEVICES]
        for _ in range(7):
            for start in range(0, len(everybody), ACCUSED_MAX):
                for gateway in GATEWAYS:
                    await cell.ask(gateway, *everybody[start : start + ACCUSED_MAX])
            out = await cell.beat()
            now_s = cell.clock.monotonic_s()
            began_s += [now_s] * len(out - before)
            assert len(out) <= SHARE_MAX
            assert sum(now_s - at_s < BUDGET_PERIOD_S for at_s in began_s) <= BUDGET.devices_per_hour_max
            await cell.served()
            await cell.clock.sleep(QUARANTINE_S / 3)
            before = await cell.beat()
        assert len(began_s) > SHARE_MAX, "the attack has some effect: this is what the budget bounds"

    run(script)


def test_reports_that_cannot_be_are_not_read() -> None:
    """
    Attack: a gateway sends reports by the hundred, with witnesses by the thousand, and such as name no device.
    Expected: refused as a message that cannot be true.
    Unharmed: nobody is taken out of service; others' requests are answered.
    """

    async def script(cell: Cell) -> None:
        device = DEVICES[0].node
        many = tuple(accused(device, witness.node) for witness in DEVICES)
        crowd = accused(device, *(NodeId(f"{index:064x}") for index in range(1000)))
        for told in (many, (crowd,), (accused(NodeId("x")),), (accused(device, NodeId("")),)):
            reply = await cell.ask(GATEWAYS[1], *told)
            assert not reply.hops and "expected" in (reply.error or "")
        assert cell.coordinator.status().dropped_messages == {"route": 4}
        assert await cell.beat() == set()
        await cell.served()

    run(script)


def test_a_liar_pushes_out_what_is_said_of_it() -> None:
    """
    Attack: a device that one gateway has reported claims through that gateway that what came from everybody else was
        damaged, again and again, with ever other company, so that the report on itself is forgotten there.
    Expected: it is out as soon as a second gateway reports it: it has pushed out its own claims alone.
    Unharmed: those that it accused stay in service.
    """

    async def script(cell: Cell) -> None:
        liar, witness, another, *others = (device.node for device in DEVICES)
        await cell.ask(GATEWAYS[0], accused(liar, witness))
        for turn in range(5):
            for index, device in enumerate(others):
                await cell.ask(GATEWAYS[0], accused(device, liar, others[index - turn - 1]))
        await cell.ask(GATEWAYS[1], accused(liar, another))
        assert await cell.beat() == {liar}
        await cell.served()

    run(script)


def test_decoys_that_call_themselves_damaged_use_up_the_budget() -> None:
    """
    Attack: so many devices as the council lets be taken out say that they are damaged, before one that is with them is
        reported.
    Expected: it is out when it is reported: own words get half of the budget.
    Unharmed: the rest serves the model.
    """

    async def script(cell: Cell) -> None:
        liar, witness, another, *decoys = (device.node for device in DEVICES)
        out = await cell.beat(*decoys[:SHARE_MAX])
        assert len(out) == SHARE_MAX / 2
        await cell.ask(GATEWAYS[0], accused(liar, witness))
        await cell.ask(GATEWAYS[1], accused(liar, another))
        assert await cell.beat(*decoys[:SHARE_MAX]) == out | {liar}
        await cell.served()

    run(script)


def test_a_damaged_device_waits_until_the_budget_has_forgotten_it() -> None:
    """
    Attack: decoys keep the budget used up while a device says that it is damaged, which is not heard then.
    Expected: it is out as soon as there is room: it still says so, and was not acted on.
    Unharmed: the decoys, who were acted on, are not taken out again for the same word.
    """

    async def script(cell: Cell) -> None:
        damaged, *decoys = (device.node for device in DEVICES[: 1 + SHARE_MAX])
        out = await cell.beat(*decoys)
        assert damaged not in await cell.beat(damaged, *out)
        await cell.clock.sleep(QUARANTINE_S)
        await cell.beat(damaged, *out)
        await cell.clock.sleep(OWN_WORD_RETRY_S)
        assert await cell.beat(damaged, *out) == {damaged}
        await cell.served()

    run(script)


def test_a_liar_whose_chains_another_cell_borrows() -> None:
    """
    Attack: a device sends damaged rows in sessions of its cell, and in those of a cell that borrows its devices.
    Expected: what that cell's gateways report counts here, as one more witness.
    Unharmed: the cell that asks is given a chain without it.
    """

    async def script(cell: Cell) -> None:
        liar, witness, another, *_ = (device.node for device in DEVICES)
        await cell.ask(GATEWAYS[0], accused(liar, witness))
        assert await cell.beat() == set()
        await cell.ask_from("away", GATEWAYS[1], accused(liar, another))
        assert await cell.beat() == {liar}
        reply = await cell.ask_from("away", GATEWAYS[1])
        assert reply.hops and liar not in {hop.address.node for hop in reply.hops}
        await cell.served()

    run(script)


def test_a_coordinator_of_another_cell_invents_gateways() -> None:
    """
    Attack: another cell's coordinator reports devices here in the name of many gateways, with any witnesses, and so
        often that what others reported would be forgotten.
    Expected: nobody is taken out of service: it is a party to all of it, and fills its own places alone.
    Unharmed: what two gateways here report counts.
    """

    async def script(cell: Cell) -> None:
        liar, witness, another, *others = (device.node for device in DEVICES)
        await cell.ask(GATEWAYS[0], accused(liar, witness))
        for index in range(300):
            invented = identity_of(index.to_bytes(32, "big")).node
            device, by = others[index % len(others)], others[index % 7 - 7]
            await cell.ask_from("away", invented, accused(device, *({by} - {device})))
        assert await cell.beat() == set()
        await cell.ask_from("afar", GATEWAYS[1], accused(liar, another))
        assert await cell.beat() == {liar}
        await cell.served()

    run(script)


def test_a_device_has_those_before_it_accuse_in_its_stead(tmp_path: Path) -> None:
    """
    Attack: a device complains to the one before it, as a next stage may, of numbers of a third, or of that device's
        own, so that the gateway hears it from a device that is not the liar, and the liar is in no report.
    Expected: the complaint reaches the gateway as one about the liar, and of who comes after it in the chain a device
        accuses nobody: no report.
    Unharmed: the session is on the device as before, and its gateway knows what is wrong.
    """

    async def script(world: rights_world.World) -> None:
        gateway = await world.party()
        liar = await world.party(STRANGER, Role.NODE)
        onward = msgspec.structs.replace(rights_world.flow(), next=PeerAddress(STRANGER.node, ()))
        await gateway.say(world.opening(world.grant()), onward)
        for suspect in (DEVICES[0].node, NODE.node, None):
            gateway.heard.clear()
            await liar.say(
                Fault(session=rights_world.SESSION, epoch=1, code=NumericFault.code, message="", suspect=suspect)
            )
            (fault,) = [frame.header for frame in gateway.heard]
            assert isinstance(fault, Fault) and fault.suspect == STRANGER.node
            reports = Accusations()
            reports.note((DEVICES[0].node, NODE.node, STRANGER.node), fault.suspect, NODE.node)
            assert reports.waiting() == ()
        assert world.agent.relay.session_count == 1

    rights_world.run(tmp_path, script)
