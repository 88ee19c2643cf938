"""Brings nodes to host what they should: works out the placement when it is due and sends the orders.

Rules
- Nothing is ordered in the first heartbeat interval after a start: a coordinator that has just started knows less than
  the nodes do, and must not move what is fine.
- Joins are awaited for a moment, so that devices that start together are placed together. A loss that leaves a layer
  without a holder is acted on at once; one that only thins out copies waits, because the device may come back.
- An order is sent until it is acknowledged, `ORDER_TRIES_MAX` times. A newer order for the same node and model replaces
  it. What came of it shows in heartbeats; nothing is remembered beyond `asked_valid_s`.
- A node that failed to load a model is not asked again for `failure_retry_s`.
- Every order is signed, for each attempt anew and for the run of the device that was heard of last, and none is given
  while we may not work (`trust/`). That a device has been started anew meanwhile is no failure: it is asked again.
- Every order carries the epoch of our term, and is sent only while it lasts. What devices say of higher epochs is
  judged by `witnesses.py`; one that refuses for such gets no orders for a while.

What goes where is decided in `policy/placement.py`, and in which order in `policy/placement_plan.py`.
"""

import asyncio
import logging
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import msgspec

from fallow.coordinator import registry
from fallow.coordinator.leadership import Authority
from fallow.coordinator.registry import Fleet
from fallow.coordinator.roll import BELOW_TIER, Roll
from fallow.coordinator.witnesses import Witnesses
from fallow.domain.charter import Standing
from fallow.domain.clock import Clock
from fallow.domain.errors import FabricError, TrustError
from fallow.domain.fleet import Accepted, DropStage, Heartbeat, ModelEntry, NodeCommand, PlaceStage, Subjects, Tier
from fallow.domain.ids import Digest, NodeId
from fallow.domain.model import StageSpec
from fallow.fabric.contract import Bus
from fallow.policy.membership import MembershipRules, flapping
from fallow.policy.placement import Placement, place
from fallow.policy.placement_board import PlacementRules
from fallow.policy.placement_plan import Move, NodeNow, plan
from fallow.trust.contract import Lease, Orders

ORDER_TIMEOUT_S = 1.0
ORDER_TRIES_MAX = 3
ORDERS_AT_ONCE = 128
"""Orders that wait for an answer at the same time; the others wait for their turn."""
LONG_S = 0.25
REST_FACTOR = 9.0
"""What a placement takes beyond `LONG_S` is followed by so many times as long a rest: with thousands of devices,
placing must not take what heartbeats and routes need."""
SOURCES_MAX = 16
SOUNDED_MAX = 8
"""Devices that are asked whether they have heard what one device claims."""
PLACED = frozenset({str(Standing.WORKING), BELOW_TIER})
"""Standings of devices that a placement looks at. Those whose tier is too low are there to be named as the reason."""
NOT_ALLOWED = "the council's policy does not allow it, or no publisher of the council has signed it"
NOBODYS_MODEL = Digest("0" * 64)
"""To stop hosting it changes nothing."""

_Asked = dict[Digest, tuple[StageSpec | None, float]]
"""What one node was ordered to host of each model, and when; not seen in a heartbeat yet."""

log = logging.getLogger(__name__)


class _Rank(NamedTuple):
    """What devices are to the registrar, and what the council asks for."""

    tiers: dict[NodeId, Tier]
    tier_min: Tier


class PlacerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """When a placement is due after what."""

    join_settle_s: float = 0.5
    join_settle_max_s: float = 2.0
    loss_settle_s: float = 5.0
    change_settle_s: float = 0.05
    period_s: float = 10.0
    asked_valid_s: float = 5.0
    failure_retry_s: float = 30.0
    orphan_grace_s: float = 30.0
    """How long stages of models that no store announces are left alone after a start."""


class Placer:
    """The part of the coordinator that gives orders."""

    def __init__(
        self,
        bus: Bus,
        clock: Clock,
        subjects: Subjects,
        fleet: Callable[[], Fleet],
        rules: PlacementRules,
        membership: MembershipRules,
        times: PlacerTimes,
        authority: Authority,
        orders: Orders,
        lease: Lease,
        roll: Roll,
    ) -> None:
        self._bus = bus
        self._clock = clock
        self._subjects = subjects
        self._fleet = fleet
        self._rules = rules
        self._membership = membership
        self._times = times
        self._authority = authority
        self._sealing = orders
        self._lease = lease
        self._roll = roll
        self._started_s = clock.monotonic_s()
        self._due_s = self._started_s + membership.heartbeat_interval_s
        self._joins_since_s: float | None = None
        self._changed = asyncio.Event()
        self._asked: dict[NodeId, _Asked] = {}
        self._failed_s: dict[tuple[NodeId, Digest], float] = {}
        self._witnesses = Witnesses(authority, clock)
        self._orders: dict[tuple[NodeId, Digest], asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(ORDERS_AT_ONCE)
        self.unplaceable: dict[Digest, str] = {}

    # --- what makes a placement due -------------------------------------------------------------

    def on_join(self) -> None:
        now_s = self._clock.monotonic_s()
        if self._joins_since_s is None:
            self._joins_since_s = now_s
        due_s = min(now_s + self._times.join_settle_s, self._joins_since_s + self._times.join_settle_max_s)
        self._due_s = max(due_s, self._started_s + self._membership.heartbeat_interval_s)
        self._changed.set()

    def on_loss(self, node: NodeId) -> None:
        """A node is gone, or was started anew: what it was asked and what it said died with it."""
        self._asked.pop(node, None)
        self._witnesses.forget(node)
        self._due_in(0.0 if self._uncovered() else self._times.loss_settle_s)

    def on_change(self) -> None:
        """Something was loaded, failed, or the catalogue is another one."""
        self._due_in(self._times.change_settle_s)

    def on_heartbeat(self, before: Heartbeat | None, after: Heartbeat) -> None:
        """Keep track of orders that were heard and of loads that failed."""
        for model, (stage, _) in list(self._asked.get(after.node, {}).items()):
            if registry.asked_stage(after, model) == stage:
                self._no_longer_asked(after.node, model)
        new_failures = registry.failed_models(after) - (registry.failed_models(before) if before else frozenset())
        for model in new_failures:
            self._note_failure(after.node, model)
        if before is not None and before.standing != after.standing:
            self.on_change()
        elif before is not None and (before.hosted, before.draining) != (after.hosted, after.draining):
            statuses = [[(item.stage, item.status) for item in beat.hosted] for beat in (before, after)]
            if statuses[0] != statuses[1] or before.draining != after.draining:
                self.on_change()

    def forget(self) -> None:
        """Drop what is too old to count. To be called now and then, whether this coordinator leads or stands by."""
        oldest_s = self._clock.monotonic_s() - self._times.failure_retry_s
        self._failed_s = {key: at_s for key, at_s in self._failed_s.items() if at_s > oldest_s}
        self._witnesses.prune()

    def _note_failure(self, node: NodeId, model: Digest) -> None:
        """Only of models that are placed: a device may claim to have failed with any digest."""
        if model in self._fleet().entries():
            self._failed_s[node, model] = self._clock.monotonic_s()

    def _due_in(self, delay_s: float) -> None:
        earliest_s = self._started_s + self._membership.heartbeat_interval_s
        self._due_s = max(min(self._due_s, self._clock.monotonic_s() + delay_s), earliest_s)
        self._changed.set()

    def _uncovered(self) -> bool:
        """Whether a model that may be placed has a layer that nobody holds: others stay so whatever is ordered."""
        fleet = self._fleet()
        missing = (model for model, entry in fleet.entries().items() if not registry.servable(fleet, entry))
        return any(self._lease.allows(model) for model in missing)

    # --- the loop -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Place whenever it is due, until cancelled."""
        try:
            while True:
                delay_s = self._due_s - self._clock.monotonic_s()
                if delay_s > 0:
                    await self._wait(delay_s)
                    continue
                self._joins_since_s = None
                began_s = self._clock.monotonic_s()
                self._due_s = began_s + self._times.period_s
                try:
                    await self._place()
                except Exception:
                    log.exception("working out the placement failed; the next attempt is in %s s", self._times.period_s)
                await self._clock.sleep(REST_FACTOR * (self._clock.monotonic_s() - began_s - LONG_S))
        finally:
            for order in self._orders.values():
                order.cancel()
            await asyncio.gather(*self._orders.values(), return_exceptions=True)

    async def _wait(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

    async def _place(self) -> None:
        now_s = self._clock.monotonic_s()
        fleet = self._fleet()
        entries = {model: entry for model, entry in fleet.entries().items() if self._lease.allows(model)}
        self.forget()
        if not fleet.entries() or self._lease.standing is not Standing.WORKING:
            return
        settled = [
            heartbeat
            for node, heartbeat in fleet.present().items()
            if heartbeat.standing in PLACED
            and not heartbeat.draining
            and not flapping(fleet.members[node], now_s, self._membership)
        ]
        lately = {node: dict(asked) for node, asked in self._asked.items()}
        barred = frozenset(self._failed_s) | {(node, model) for node in self._witnesses.deaf() for model in entries}
        rank = _Rank({heartbeat.node: self._roll.tier(heartbeat.node) for heartbeat in settled}, self._roll.tier_min)
        # In a thread: hundreds of devices take a tenth of a second, and routes must not wait for it.
        placement, moves = await asyncio.to_thread(self._work_out, settled, entries, lately, barred, rank, now_s)
        forbidden = dict.fromkeys(fleet.entries().keys() - entries.keys(), NOT_ALLOWED)
        unplaceable = placement.unplaceable | forbidden
        if unplaceable != self.unplaceable:
            for model, reason in unplaceable.items():
                log.warning("model %s cannot be served: %s", model[:12], reason)
        self.unplaceable = unplaceable
        for move in moves:
            self._order(move, entries.get(move.model))

    def _work_out(
        self,
        settled: list[Heartbeat],
        entries: dict[Digest, ModelEntry],
        lately: dict[NodeId, _Asked],
        failed: frozenset[tuple[NodeId, Digest]],
        rank: _Rank,
        now_s: float,
    ) -> tuple[Placement, list[Move]]:
        """What should be where, and the moves towards it. Runs in a thread: it reads nothing that changes."""
        asked = {beat.node: self._asked_of(beat, entries, lately.get(beat.node, {}), now_s) for beat in settled}
        barred = {beat.node: frozenset(model for model in entries if (beat.node, model) in failed) for beat in settled}
        rooms = [
            registry.room_of(beat, asked[beat.node], entries, barred[beat.node], rank.tiers[beat.node])
            for beat in settled
        ]
        needs = [registry.need_of(entry, self._rules.regions, rank.tier_min) for entry in entries.values()]
        placement = place(needs, rooms, self._rules)
        nodes = [NodeNow(node=beat.node, asked=asked[beat.node], ready=_ready_of(beat, entries)) for beat in settled]
        return placement, list(plan(nodes, placement.stages))

    def _asked_of(
        self, heartbeat: Heartbeat, entries: dict[Digest, ModelEntry], lately: _Asked, now_s: float
    ) -> tuple[StageSpec, ...]:
        """What a node has been asked to host: as it reports it, or as ordered a moment ago."""
        models = {item.stage.model: None for item in heartbeat.hosted} | dict.fromkeys(entries)
        stages: list[StageSpec] = []
        for model in models:
            stage = registry.asked_stage(heartbeat, model)
            if model in lately and now_s - lately[model][1] < self._times.asked_valid_s:
                stage = lately[model][0]
            if stage is not None and (model in entries or self._orphans_may_go(now_s)):
                stages.append(stage)
        return tuple(stages)

    def _orphans_may_go(self, now_s: float) -> bool:
        return now_s - self._started_s > self._times.orphan_grace_s

    # --- orders ---------------------------------------------------------------------------------

    def _order(self, move: Move, entry: ModelEntry | None) -> None:
        key = (move.node, move.model)
        epoch = self._authority.epoch()
        if epoch is None or self._lease.standing is not Standing.WORKING:
            return
        command: NodeCommand
        if move.stage is None:
            command = DropStage(model=move.model, epoch=epoch)
        elif entry is not None:
            now_s = self._clock.monotonic_s()
            sources = registry.sources_of(self._fleet(), move.model, move.node, now_s, SOURCES_MAX)
            command = PlaceStage(stage=move.stage, manifest_bytes=entry.manifest_bytes, sources=sources, epoch=epoch)
        else:
            return
        self._asked.setdefault(move.node, {})[move.model] = (move.stage, self._clock.monotonic_s())
        older = self._orders.pop(key, None)
        if older is not None:
            older.cancel()
        task = asyncio.get_running_loop().create_task(self._send_in_turn(key, command))
        self._orders[key] = task
        task.add_done_callback(lambda done: self._orders.pop(key) if self._orders.get(key) is done else None)

    async def _send_in_turn(self, key: tuple[NodeId, Digest], command: NodeCommand) -> None:
        async with self._room:
            await self._send(key, command)

    async def _send(self, key: tuple[NodeId, Digest], command: NodeCommand) -> None:
        node = key[0]
        what = ", ".join(map(str, command.stage.pieces)) if isinstance(command, PlaceStage) else "nothing"
        log.info("asking node %s to host %s of model %s", node[:8], what, key[1][:8])
        for attempt in range(ORDER_TRIES_MAX):
            member = self._fleet().members.get(node)
            if self._authority.epoch() != command.epoch or self._lease.standing is not Standing.WORKING:
                break
            if member is None:
                break
            boot = member.heartbeat.boot
            message = self._sealing.seal(command, node, boot)
            try:
                reply = await self._bus.request(self._subjects.command(node), message, ORDER_TIMEOUT_S)
                accepted = msgspec.json.decode(reply, type=Accepted)
            except (FabricError, TrustError, msgspec.MsgspecError) as error:
                log.info("node %s did not take an order (%s), attempt %d", node[:8], error, attempt + 1)
                await self._clock.sleep(ORDER_TIMEOUT_S / 4)
                continue
            if accepted.epoch is not None and accepted.epoch > command.epoch:
                if self._witnesses.refused(node, accepted.epoch, self._fleet().present().keys()):
                    self._sound_out()
                self.on_change()
                break
            if accepted.boot not in {None, boot}:
                log.info("node %s was started anew before it took an order, attempt %d", node[:8], attempt + 1)
                await self._clock.sleep(ORDER_TIMEOUT_S / 4)
                continue
            if not accepted.ok:
                log.warning("node %s refused to host %s: %s", node[:8], what, accepted.message)
                self._note_failure(*key)
                self._no_longer_asked(*key)
                self.on_change()
            return
        self._no_longer_asked(*key)

    def _sound_out(self) -> None:
        """Give some devices an order without effect, to learn whether they have heard of a higher epoch, too."""
        deaf = self._witnesses.deaf()
        for node in list(islice((node for node in self._fleet().present() if node not in deaf), SOUNDED_MAX)):
            self._order(Move(node=node, model=NOBODYS_MODEL, stage=None), None)

    def _no_longer_asked(self, node: NodeId, model: Digest) -> None:
        asked = self._asked.get(node, {})
        asked.pop(model, None)
        if not asked:
            self._asked.pop(node, None)


def _ready_of(heartbeat: Heartbeat, entries: dict[Digest, ModelEntry]) -> tuple[StageSpec, ...]:
    ready = (registry.ready_stage(heartbeat, model) for model in entries)
    return tuple(item.stage for item in ready if item is not None)
