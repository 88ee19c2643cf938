"""The placer's books: what devices claim and who they are cannot make them grow."""

from collections.abc import Awaitable, Callable

import msgspec

from fallow.coordinator.leadership import SoleAuthority
from fallow.coordinator.placer import Placer, PlacerTimes
from fallow.coordinator.registry import Fleet
from fallow.coordinator.roll import Roll
from fallow.domain.fleet import Accepted, DropStage, StageStatus, Subjects
from fallow.domain.ids import Digest
from fallow.domain.model import Span
from fallow.fabric.memory_bus import MemoryHub
from fallow.policy.membership import MembershipRules
from fallow.policy.placement_board import PlacementRules
from fallow.policy.placement_plan import Move
from fallow.simulator.virtual_time import LoopClock, run_virtual
from fallow.trust.open_doors import OpenLease, OpenOrders, OpenPassports
from tests.unit.coordinator.test_registry import LAYERS, MODELS, NODES, beat, entry, ready, store
from tests.unit.trust.grant_world import SwitchedLease

RULES = MembershipRules()
TIMES = PlacerTimes()


class World:
    def __init__(self) -> None:
        self.clock = LoopClock()
        self.fleet = Fleet()
        self.fleet.announce(store(entry(MODELS[0])), 0.0)
        self.placer = Placer(
            MemoryHub().connect("coordinator"), self.clock, Subjects("test"), lambda: self.fleet, PlacementRules(),
            RULES, TIMES, SoleAuthority(), OpenOrders(), OpenLease(),
            Roll("test", OpenPassports(), OpenLease(), self.clock),
        )  # fmt: skip


def run(script: Callable[[World], Awaitable[None]]) -> None:
    async def program() -> None:
        await script(World())

    run_virtual(program())


def test_failures_are_remembered_of_placed_models_alone_and_for_a_time_on_a_standby_too() -> None:
    async def script(world: World) -> None:
        invented = [Digest(f"{index:064x}") for index in range(1000, 1050)]
        failed = [ready(model, Span(0, 3), status=StageStatus.FAILED) for model in (MODELS[0], *invented)]
        world.placer.on_heartbeat(None, beat(NODES[0], 1, *failed))
        assert set(world.placer._failed_s) == {(NODES[0], MODELS[0])}
        await world.clock.sleep(TIMES.failure_retry_s + 1.0)
        world.placer.forget()
        assert not world.placer._failed_s

    run(script)


def test_failures_are_forgotten_when_the_catalogue_is_empty() -> None:
    async def script(world: World) -> None:
        world.placer.on_heartbeat(None, beat(NODES[0], 1, ready(MODELS[0], Span(0, 3), status=StageStatus.FAILED)))
        world.fleet.announce(store(), 1.0)
        await world.clock.sleep(TIMES.failure_retry_s + 1.0)
        await world.placer._place()
        assert not world.placer._failed_s

    run(script)


def test_what_a_node_was_asked_is_forgotten_with_it() -> None:
    async def script(world: World) -> None:
        world.fleet.hear(beat(NODES[0], 1), 0.0, RULES)
        world.placer._order(Move(node=NODES[0], model=MODELS[0], stage=None), None)
        assert world.placer._asked
        world.placer.on_loss(NODES[0])
        assert not world.placer._asked

    run(script)


def test_an_order_without_effect_is_what_devices_are_sounded_out_with() -> None:
    async def script(world: World) -> None:
        heard: list[tuple[str, DropStage]] = []
        bus = world.placer._bus

        async def note(subject: str, message: bytes) -> None:
            heard.append((subject, msgspec.json.decode(message, type=DropStage)))

        for node in NODES:
            world.fleet.hear(beat(node, 1), 0.0, RULES)
            await bus.subscribe(Subjects("test").command(node), note)
        world.placer._witnesses.refused(NODES[0], 7, NODES)
        world.placer._sound_out()
        await world.clock.sleep(0.1)
        assert {subject for subject, _ in heard} == {Subjects("test").command(node) for node in NODES[1:]}
        assert all(command.model not in MODELS for _, command in heard)

    run(script)


def test_a_device_that_was_started_anew_is_asked_again_and_has_not_failed() -> None:
    """The order is for the run before; the first heartbeat of the next one comes while the refusal is on its way."""

    async def script(world: World) -> None:
        node, answers = NODES[0], [Accepted(ok=False, boot="2"), Accepted(ok=True)]

        async def answer(subject: str, message: bytes) -> bytes:
            world.fleet.hear(beat(node, 2, boot="2"), 1.0, RULES)
            return msgspec.json.encode(answers.pop(0))

        world.fleet.hear(beat(node, 1, boot="1"), 0.0, RULES)
        await world.placer._bus.subscribe(Subjects("test").command(node), answer)
        world.placer._order(Move(node=node, model=MODELS[0], stage=None), None)
        await world.clock.sleep(2.0)
        assert not answers, "it was asked twice"
        assert not world.placer._failed_s and world.placer._asked

    run(script)


def test_a_loss_is_due_at_once_for_a_model_that_may_be_placed_and_not_for_one_that_nobody_signed() -> None:
    async def script(world: World) -> None:
        world.placer._lease = lease = SwitchedLease()
        world.fleet.hear(beat(NODES[0], 1, ready(MODELS[0], Span(0, LAYERS))), 0.0, RULES)
        world.fleet.announce(store(entry(MODELS[0]), entry(MODELS[1])), 0.0)
        lease.sign(entry(MODELS[0]))
        assert not world.placer._uncovered()
        lease.sign(entry(MODELS[0]), entry(MODELS[1]))
        assert world.placer._uncovered()

    run(script)
