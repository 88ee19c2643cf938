"""The coordinator: listens to the bus, keeps the registry, answers questions, says who is gone.

Rules
- It sees no prompt, no token and no activation, and no session depends on it once it has its chain. It may be restarted
  at any time: it says hello, everybody reports, and it knows what it knew.
- A broken bus connection, silence and a goodbye all end a node's presence here at once, and `NodeGone` tells gateways,
  which probe for themselves. A newer heartbeat brings the node back.
- Of several coordinators of a cell one leads: it answers questions, gives orders and announces who is gone. The others
  listen to the same facts, so that they know the fleet when they take over; they say nothing but that they stand by.
- A message that cannot be true is dropped (`guard.py`).

Decisions are in `policy/`; orders are given by `placer.py`; who leads is seen to by `leadership.py`.
"""

import asyncio
import logging
from collections.abc import Coroutine
from itertools import islice
from typing import Any

import msgspec

from fallow.coordinator import checks, registry
from fallow.coordinator.answers import STATUS_NODES_MAX, KeptAnswer, catalogue_answer, encode_catalogue, encode_status
from fallow.coordinator.colleagues import Colleagues
from fallow.coordinator.granted import granted, refusal, without_strangers
from fallow.coordinator.guard import Guard
from fallow.coordinator.leadership import Authority, SoleAuthority
from fallow.coordinator.neighbours import Neighbours
from fallow.coordinator.placer import Placer, PlacerTimes
from fallow.coordinator.registry import NODES_MAX, Fleet
from fallow.coordinator.roll import Roll
from fallow.coordinator.router import Router
from fallow.coordinator.stores import believed, disbelieved, stores_to_drop
from fallow.coordinator.suspects import Suspects
from fallow.coordinator.weighing import weigh_for_ever
from fallow.domain.charter import Standing
from fallow.domain.clock import Clock
from fallow.domain.errors import FabricError
from fallow.domain.fleet import (
    Catalogue,
    CoordinatorReport,
    FleetStatus,
    LeaderChanged,
    NodeGone,
    RouteReply,
    RouteRequest,
    Subjects,
)
from fallow.domain.ids import NodeId
from fallow.fabric.contract import Bus, BusHandler, PresenceWatcher, Subscription
from fallow.policy import membership
from fallow.policy.cells import CellRules
from fallow.policy.membership import MembershipRules, Presence
from fallow.policy.placement_board import PlacementRules
from fallow.policy.routing import RoutingRules
from fallow.trust.contract import CoordinatorTrust

QUESTIONS_AT_ONCE = 64
"""Of a kind: a route may have to wait for a neighbour cell, and must not hold up the others."""
CHECKS_PER_INTERVAL = 4
"""How often silence is looked for in a heartbeat interval."""
REPORT_PERIOD_S = 1.0
"""Between two words of a coordinator about itself."""
STALE = "Stale Connection"
"""NATS's word for a client that did not answer its pings."""
RECENT_LOSS_S = 5.0
"""Who was lost so shortly before a term is announced again: the last leader may have died of the same."""
OVERDUE_INTERVALS = 1.3
"""Whose heartbeat is later than this gets no repair of a running answer, where there is a chain without it."""

log = logging.getLogger(__name__)


class CoordinatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The cell, and the rules of every decision."""

    cell: str
    placement: PlacementRules = PlacementRules()
    membership: MembershipRules = MembershipRules()
    routing: RoutingRules = RoutingRules()
    times: PlacerTimes = PlacerTimes()
    cells: CellRules = CellRules()


class Coordinator:
    """One cell's coordinator. `start`, then it runs until `close`."""

    def __init__(
        self,
        config: CoordinatorConfig,
        bus: Bus,
        clock: Clock,
        presence: PresenceWatcher | None = None,
        authority: Authority | None = None,
        id: str = "coordinator",  # noqa: A002
        name: str = "coordinator",
        *,
        trust: CoordinatorTrust,
    ) -> None:
        """Without an `authority` it leads alone. `id` is its name on the bus, `name` is for people."""
        self._config = config
        self._bus = bus
        self._clock = clock
        self._presence = presence
        self._subjects = Subjects(config.cell)
        self._lease = trust.lease
        self._issuer = trust.issuer
        self._orders = trust.orders
        self._roll = Roll(config.cell, trust.passports, trust.lease, clock)
        self.fleet = Fleet()
        self._suspects = Suspects(clock, trust.lease, self.fleet)
        self._started_s = clock.monotonic_s()
        self._guard = Guard(clock)
        self._authority = authority or SoleAuthority()
        self._placer = Placer(
            bus, clock, self._subjects, lambda: self.fleet, config.placement, config.membership, config.times,
            self._authority, trust.orders, trust.lease, self._roll,
        )  # fmt: skip
        self._router = Router(config.routing, config.membership.heartbeat_interval_s)
        self._neighbours = Neighbours(
            config.cell, bus, clock, config.cells, self.fleet, self.route, self._router.weights, self._guard.drop,
            trust.cells, self._suspects.hear_cell,
        )  # fmt: skip
        self._subscriptions: list[Subscription] = []
        self._colleagues = Colleagues(CoordinatorReport(id=id, name=name, lease=self._authority.by_lease), clock)
        self._status_answer = KeptAnswer()
        self._acting: int | None = None
        """The epoch that we lead under."""
        self._questions: list[Subscription] = []
        self._placing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and ask everybody to report. Raises `BusUnavailable`."""
        for kind, subject, handler in (
            ("heartbeat", self._subjects.heartbeat(), self._on_heartbeat),
            ("leaving", self._subjects.leaving(), self._on_leaving),
            ("store", self._subjects.store(), self._on_store),
            ("gateway", self._subjects.gateway(), self._on_gateway),
            ("coordinator", self._subjects.coordinator(), self._on_coordinator),
        ):
            self._subscriptions.append(await self._bus.subscribe(subject, self._guard.before(kind, handler)))
        if self._presence is not None:
            await self._presence.start(self._on_disconnect)
        self._spawn(self._watch_silence())
        self._spawn(weigh_for_ever(self._router, self.fleet, self._clock, self._config.routing.refresh_s))
        self._spawn(self._follow_standing())
        await self._bus.publish(self._subjects.hello, b"")
        await self._authority.start()
        await self._take_turns()
        self._spawn(self._follow())
        self._spawn(self._report())
        log.info("coordinator %s of cell %s is up", self._colleagues.me.name, self._config.cell)

    async def close(self) -> None:
        """Stop; nodes and running answers go on. The bus remains its owner's to close."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stop_leading()
        await self._authority.close()
        for subscription in self._subscriptions:
            await subscription.cancel()
        self._subscriptions.clear()
        if self._presence is not None:
            await self._presence.close()

    # --- leading --------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            await self._authority.changed(self._acting)
            await self._take_turns()

    async def _take_turns(self) -> None:
        """Begin to lead, or stop, as the authority has it."""
        leading = self._authority.leading
        if leading == self._acting:
            return
        await self._stop_leading()
        self._acting = leading
        self._colleagues.turned(leading)
        if leading is not None:
            try:
                await self._start_leading(leading)
            except FabricError as error:
                log.warning("leading begins without a bus: %s", error)

    async def _start_leading(self, epoch: int) -> None:
        await asyncio.gather(
            self._answer("route", self._subjects.route(), self._on_route),
            self._answer("catalogue", self._subjects.catalogue, self._on_catalogue),
            self._answer("status", self._subjects.status, self._on_status),
        )
        # From here on, devices refuse what an earlier leader may still have under way, and open questions come to us.
        changed = LeaderChanged(epoch=epoch, name=self._colleagues.me.name)
        await self._bus.publish(self._subjects.leader, self._orders.announce(changed))
        self._placing = self._spawn(self._placer.run())
        self._placer.on_change()
        for node in membership.lost_since(self.fleet.members, self._clock.monotonic_s() - RECENT_LOSS_S):
            await self._announce_gone(node, "it was lost when the coordinator was")
        await self._neighbours.start()

    async def _stop_leading(self) -> None:
        questions, self._questions = self._questions, []
        for subscription in questions:
            await subscription.cancel()
        await self._neighbours.close()
        placing, self._placing = self._placing, None
        if placing is not None:
            placing.cancel()
            await asyncio.gather(placing, return_exceptions=True)
        self._acting = None

    async def _answer(self, kind: str, subject: str, handler: BusHandler) -> None:
        async def handle(subject: str, message: bytes) -> bytes | None:
            return await handler(subject, message) if await self._authority.confirmed() is not None else None

        guarded = self._guard.before(kind, handle)
        self._questions.append(await self._bus.subscribe(subject, guarded, at_once=QUESTIONS_AT_ONCE))

    async def _follow_standing(self) -> None:
        """What the council says may have changed what is to be placed."""
        while True:
            await self._lease.changed(self._lease.standing)
            self._placer.on_change()

    async def _report(self) -> None:
        while True:
            report = self._colleagues.report()
            # Who was asleep may not know yet that another leads: it says nothing until it has looked.
            if report.epoch is None or report.epoch == self._authority.epoch():
                try:
                    await self._bus.publish(self._subjects.coordinator(report.id), msgspec.json.encode(report))
                except FabricError as error:
                    log.debug("no report: %s", error)
            await self._clock.sleep(REPORT_PERIOD_S)

    async def _on_coordinator(self, subject: str, message: bytes) -> None:
        self._colleagues.heard(subject, message)

    # --- facts ----------------------------------------------------------------------------------

    async def _on_heartbeat(self, subject: str, message: bytes) -> None:
        heartbeat = self._suspects.enter(self._roll.enter(checks.heartbeat(subject, message)))
        now_s = self._clock.monotonic_s()
        heard = self.fleet.hear(heartbeat, now_s, self._config.membership)
        if heard is None:
            return
        before, after = heard.before, heard.after
        was_present = before is not None and before.presence is Presence.PRESENT
        if membership.restarted(before, after):
            await self._announce_gone(heartbeat.node, "it was started anew")
            self._placer.on_loss(heartbeat.node)
            was_present = False
        self._router.settle(heartbeat.node, now_s)
        self._placer.on_heartbeat(before.heartbeat if before and was_present else None, heartbeat)
        if not was_present:
            log.info("node %s (%s) is here", heartbeat.node[:8], heartbeat.name)
            self._placer.on_join()

    async def _on_leaving(self, subject: str, message: bytes) -> None:
        await self._depart(checks.leaving(subject, message).node, Presence.LEFT, "it said goodbye")

    def _on_disconnect(self, client: str, reason: str) -> None:
        self._colleagues.forget(client)
        if not reason.startswith(STALE):
            # A client that only stopped answering may still believe that it is connected; its lease runs out soon.
            self._authority.disconnected(client)
        self._spawn(self._depart(NodeId(client), Presence.GONE, f"its connection to the bus broke: {reason}"))

    async def _depart(self, node: NodeId, presence: Presence, reason: str) -> None:
        before = self.fleet.depart(node, presence, self._clock.monotonic_s())
        if before is None or before.presence is not Presence.PRESENT:
            return
        log.info("node %s (%s) is gone: %s", node[:8], before.heartbeat.name, reason)
        self._router.forget(node)
        self._placer.on_loss(node)
        await self._announce_gone(node, reason)

    async def _announce_gone(self, node: NodeId, reason: str) -> None:
        if self._authority.epoch() is None:
            return
        try:
            await self._bus.publish(self._subjects.gone, msgspec.json.encode(NodeGone(node=node, reason=reason)))
        except FabricError as error:
            log.warning("gateways could not be told that node %s is gone: %s", node[:8], error)

    async def _watch_silence(self) -> None:
        rules = self._config.membership
        period_s = rules.heartbeat_interval_s / CHECKS_PER_INTERVAL
        checked_s = self._clock.monotonic_s()
        while True:
            await self._clock.sleep(period_s)
            now_s = self._clock.monotonic_s()
            if now_s - checked_s > rules.heartbeat_interval_s:
                # We were asleep or starved; what nodes sent meanwhile is still to be read.
                self.fleet.excuse(now_s - checked_s)
            checked_s = now_s
            for node in membership.silent(self.fleet.members, now_s, rules):
                await self._depart(node, Presence.GONE, f"nothing was heard for {rules.silence_max_s:g} s")
            self.fleet.forget(now_s, rules)
            self._roll.forget_but(self.fleet.members)
            gone = stores_to_drop(self.fleet.stores, self.fleet.charter, self._roll.revoked, now_s)
            if self.fleet.heed(self._lease.charter) | self.fleet.part_with(gone):
                self._placer.on_change()
            self._placer.forget()

    async def _on_store(self, subject: str, message: bytes) -> None:
        announced = checks.store_announced(subject, message)
        charter = self._lease.charter
        if charter is None and self._lease.standing is not Standing.WORKING:
            return  # What publishers signed is not known yet. In the development mode nobody signs, and all works.
        for error in disbelieved(announced, charter):
            self._guard.drop("figures", error)
        if self.fleet.heed(charter) | self.fleet.announce(announced, self._clock.monotonic_s()):
            log.info("store %s serves %d models", announced.address.node[:8], len(announced.models))
            ours = self.fleet.entries()
            others = [entry.name for entry in believed(announced, charter) if ours.get(entry.model) != entry]
            if others:
                log.warning("store %s: another store came first with %s", announced.address.node[:8], ", ".join(others))
            self._placer.on_change()

    async def _on_gateway(self, subject: str, message: bytes) -> None:
        self.fleet.report(checks.gateway_report(subject, message), self._clock.monotonic_s())

    # --- questions ------------------------------------------------------------------------------

    async def _on_route(self, subject: str, message: bytes) -> bytes:
        request = checks.gateway_request(subject, message)
        self._suspects.hear(request)
        entry = self.fleet.entries().get(request.model)
        if entry is None or request.spare or self._lease.standing is not Standing.WORKING:
            return msgspec.json.encode(self.route(request))
        return msgspec.json.encode(await self._neighbours.route(request, entry.config.layer_count))

    def route(self, request: RouteRequest) -> RouteReply:
        """A chain of this cell's devices for a session, by what is known now, with a grant for each."""
        request = without_strangers(request, self._roll, self.fleet)
        return refusal(self._lease) or granted(self._chain(request), request, self._issuer)

    def _chain(self, request: RouteRequest) -> RouteReply:
        entry = self.fleet.entries().get(request.model)
        if entry is None:
            return RouteReply(error=f"no store of this cell announces a model {request.model[:12]}")
        carriers, shape, now_s = self.fleet.carriers(entry.model), registry.shape_of(entry), self._clock.monotonic_s()
        if request.rebuild_tokens:
            # What took one device of a chain may have taken others, of whom we have not heard since.
            lately = self.fleet.heard_since(now_s - OVERDUE_INTERVALS * self._config.membership.heartbeat_interval_s)
            reply = self._router.route(request, shape, {n: c for n, c in carriers.items() if n in lately}, now_s)
            if reply.hops:
                return reply
        return self._router.route(request, shape, carriers, now_s)

    async def _on_catalogue(self, _: str, __: bytes) -> bytes:
        return encode_catalogue(self.catalogue())

    def catalogue(self) -> Catalogue:
        return catalogue_answer(self.fleet, self._suspects.count())

    async def _on_status(self, _: str, __: bytes) -> bytes:
        now_s = self._clock.monotonic_s()
        return self._status_answer.give(now_s, lambda: encode_status(self.status(STATUS_NODES_MAX)))

    def status(self, nodes_max: int = NODES_MAX) -> FleetStatus:
        now_s = self._clock.monotonic_s()
        nodes = tuple(islice(self.fleet.present().values(), nodes_max))
        return FleetStatus(
            nodes=nodes,
            nodes_left_out=len(self.fleet.present()) - len(nodes),
            silent_s={beat.node: now_s - self.fleet.members[beat.node].heard_s for beat in nodes},
            models=self.catalogue().models,
            gateways=tuple(heard.report for heard in self.fleet.gateways.values()),
            coordinator_uptime_s=now_s - self._started_s,
            unplaceable=dict(self._placer.unplaceable),
            dropped_messages=dict(self._guard.dropped),
            coordinators=(self._colleagues.report(), *self._colleagues.others()),
            quarantined=self._suspects.told(),
            neighbours=self._neighbours.known(),
            size=self._neighbours.size.told(),
            standing=self._lease.standing,
            why=self._lease.why,
        )

    # --- helpers --------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the coordinator failed", exc_info=task.exception())
