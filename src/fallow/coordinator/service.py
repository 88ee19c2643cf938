"""The coordinator: listens to the bus, keeps the registry, answers questions, says who is gone.

Rules
- It sees no prompt, no token and no activation, and no session depends on it once it has its chain. It may be restarted
  at any time: it says hello, everybody reports, and it knows what it knew.
- A broken bus connection, silence and a goodbye all end a node's presence here at once, and `NodeGone` tells gateways,
  which probe for themselves. A newer heartbeat brings the node back.
- A message that cannot be true is dropped, counted by kind, and named in the log,
  a kind at most once in `LOG_PERIOD_S`.

Decisions are in `policy/`; orders are given by `placer.py`.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from fallow.coordinator import checks, registry
from fallow.coordinator.placer import Placer, PlacerTimes
from fallow.coordinator.recent import RecentRoutes
from fallow.coordinator.registry import Fleet
from fallow.domain.clock import Clock
from fallow.domain.errors import BusMessageError, FabricError
from fallow.domain.fleet import Catalogue, FleetStatus, NodeGone, RouteReply, RouteRequest, Subjects
from fallow.domain.ids import NodeId
from fallow.fabric.contract import MAX_BUS_MESSAGE_BYTES, Bus, PresenceWatcher, Subscription
from fallow.policy import membership
from fallow.policy.membership import MembershipRules, Presence
from fallow.policy.placement_board import PlacementRules
from fallow.policy.routing import RoutingRules, route

CHECKS_PER_INTERVAL = 4
"""How often silence is looked for in a heartbeat interval."""
LOG_PERIOD_S = 10.0
STATUS_NODES_MAX = 500
"""Devices in a status that would not fit a bus message with all of them."""

log = logging.getLogger(__name__)


class CoordinatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The cell, and the rules of every decision."""

    cell: str
    placement: PlacementRules = PlacementRules()
    membership: MembershipRules = MembershipRules()
    routing: RoutingRules = RoutingRules()
    times: PlacerTimes = PlacerTimes()


class Coordinator:
    """One cell's coordinator. `start`, then it runs until `close`."""

    def __init__(
        self, config: CoordinatorConfig, bus: Bus, clock: Clock, presence: PresenceWatcher | None = None
    ) -> None:
        self._config = config
        self._bus = bus
        self._clock = clock
        self._presence = presence
        self._subjects = Subjects(config.cell)
        self.fleet = Fleet()
        self._started_s = clock.monotonic_s()
        self._placer = Placer(
            bus, clock, self._subjects, lambda: self.fleet, config.placement, config.membership, config.times
        )
        self._recent = RecentRoutes(config.membership.heartbeat_interval_s)
        self._dropped: Counter[str] = Counter()
        self._logged_s: dict[str, float] = {}
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and ask everybody to report. Raises `BusUnavailable`."""
        listen: list[tuple[str, str, Callable[[str, bytes], Awaitable[bytes | None]]]] = [
            ("heartbeat", self._subjects.heartbeat(), self._on_heartbeat),
            ("leaving", self._subjects.leaving, self._on_leaving),
            ("store", self._subjects.store, self._on_store),
            ("gateway", self._subjects.gateway, self._on_gateway),
            ("route", self._subjects.route, self._on_route),
            ("catalogue", self._subjects.catalogue, self._on_catalogue),
            ("status", self._subjects.status, self._on_status),
        ]
        for kind, subject, handler in listen:
            self._subscriptions.append(await self._bus.subscribe(subject, self._guarded(kind, handler)))
        if self._presence is not None:
            await self._presence.start(self._on_disconnect)
        self._spawn(self._watch_silence())
        self._spawn(self._placer.run())
        await self._bus.publish(self._subjects.hello, b"")
        log.info("coordinator of cell %s is up", self._config.cell)

    async def close(self) -> None:
        """Stop; nodes and running answers go on. The bus remains its owner's to close."""
        for subscription in self._subscriptions:
            await subscription.cancel()
        self._subscriptions.clear()
        if self._presence is not None:
            await self._presence.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _guarded(
        self, kind: str, handler: Callable[[str, bytes], Awaitable[bytes | None]]
    ) -> Callable[[str, bytes], Awaitable[bytes | None]]:
        async def handle(subject: str, message: bytes) -> bytes | None:
            try:
                return await handler(subject, message)
            except BusMessageError as error:
                self._drop(kind, error)
                return msgspec.json.encode(RouteReply(error=error.message)) if kind == "route" else None

        return handle

    def _drop(self, kind: str, error: BusMessageError) -> None:
        self._dropped[kind] += 1
        now_s = self._clock.monotonic_s()
        if now_s - self._logged_s.get(kind, -LOG_PERIOD_S) >= LOG_PERIOD_S:
            self._logged_s[kind] = now_s
            log.warning("%s: dropped a %s message (%d so far): %s", error.code, kind, self._dropped[kind], error)

    # --- facts ----------------------------------------------------------------------------------

    async def _on_heartbeat(self, subject: str, message: bytes) -> None:
        heartbeat = checks.heartbeat(subject, message)
        now_s = self._clock.monotonic_s()
        before = self.fleet.members.get(heartbeat.node)
        fleet = self.fleet.with_heartbeat(heartbeat, now_s, self._config.membership)
        if fleet is None:
            return
        self.fleet = fleet
        after = fleet.members[heartbeat.node]
        was_present = before is not None and before.presence is Presence.PRESENT
        if membership.restarted(before, after):
            await self._announce_gone(heartbeat.node, "it was started anew")
            self._placer.on_loss()
            was_present = False
        self._recent.settle(heartbeat.node, now_s)
        self._placer.on_heartbeat(before.heartbeat if before and was_present else None, heartbeat)
        if not was_present:
            log.info("node %s (%s) is here", heartbeat.node[:8], heartbeat.name)
            self._placer.on_join()

    async def _on_leaving(self, _: str, message: bytes) -> None:
        await self._depart(checks.leaving(message).node, Presence.LEFT, "it said goodbye")

    def _on_disconnect(self, client: str, reason: str) -> None:
        self._spawn(self._depart(NodeId(client), Presence.GONE, f"its connection to the bus broke: {reason}"))

    async def _depart(self, node: NodeId, presence: Presence, reason: str) -> None:
        before = self.fleet.members.get(node)
        self.fleet = self.fleet.with_departure(node, presence, self._clock.monotonic_s())
        if before is None or before.presence is not Presence.PRESENT:
            return
        log.info("node %s (%s) is gone: %s", node[:8], before.heartbeat.name, reason)
        self._recent.forget(node)
        self._placer.on_loss()
        await self._announce_gone(node, reason)

    async def _announce_gone(self, node: NodeId, reason: str) -> None:
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
                self.fleet = self.fleet.with_excuse(now_s - checked_s)
            checked_s = now_s
            for node in membership.silent(self.fleet.members, now_s, rules):
                await self._depart(node, Presence.GONE, f"nothing was heard for {rules.silence_max_s:g} s")
            self.fleet = self.fleet.without_forgotten(now_s, rules)

    async def _on_store(self, _: str, message: bytes) -> None:
        announced = checks.store_announced(message)
        before = self.fleet.stores.get(announced.address.node)
        self.fleet = self.fleet.with_store(announced, self._clock.monotonic_s())
        if before is None or before.announced.models != announced.models:
            log.info("store %s serves %d models", announced.address.node[:8], len(announced.models))
            self._placer.on_change()

    async def _on_gateway(self, _: str, message: bytes) -> None:
        self.fleet = self.fleet.with_gateway(checks.gateway_report(message), self._clock.monotonic_s())

    # --- questions ------------------------------------------------------------------------------

    async def _on_route(self, _: str, message: bytes) -> bytes:
        return msgspec.json.encode(self.route(checks.route_request(message)))

    def route(self, request: RouteRequest) -> RouteReply:
        """A chain for a session, by what is known now."""
        entry = self.fleet.entries().get(request.model)
        if entry is None:
            return RouteReply(error=f"no store of this cell announces a model {request.model[:12]}")
        shape = registry.shape_of(entry)
        carriers = self._recent.loaded(registry.carriers_of(self.fleet, entry), request.session)
        reply = route(request, shape, carriers, self._config.routing)
        if reply.hops:
            self._recent.add(request, reply.hops, shape, self._clock.monotonic_s())
        return reply

    async def _on_catalogue(self, _: str, __: bytes) -> bytes:
        return msgspec.json.encode(self.catalogue())

    def catalogue(self) -> Catalogue:
        models = tuple(
            msgspec.structs.replace(entry, servable=registry.servable(self.fleet, entry))
            for entry in self.fleet.entries().values()
        )
        return Catalogue(models=models, stores=tuple(heard.announced.address for heard in self.fleet.stores.values()))

    async def _on_status(self, _: str, __: bytes) -> bytes:
        status = self.status()
        encoded = msgspec.json.encode(status)
        if len(encoded) > MAX_BUS_MESSAGE_BYTES:
            # Links are the bulk of it: a fleet of hundreds is told without them, one of thousands in part.
            nodes = tuple(msgspec.structs.replace(node, link_rtt_s={}) for node in status.nodes[:STATUS_NODES_MAX])
            encoded = msgspec.json.encode(msgspec.structs.replace(status, nodes=nodes))
        return encoded

    def status(self) -> FleetStatus:
        now_s = self._clock.monotonic_s()
        present = self.fleet.present()
        return FleetStatus(
            nodes=tuple(present.values()),
            silent_s={node: now_s - self.fleet.members[node].heard_s for node in present},
            models=self.catalogue().models,
            gateways=tuple(heard.report for heard in self.fleet.gateways.values()),
            coordinator_uptime_s=now_s - self._started_s,
            unplaceable=dict(self._placer.unplaceable),
            dropped_messages=dict(self._dropped),
        )

    # --- helpers --------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the coordinator failed", exc_info=task.exception())
